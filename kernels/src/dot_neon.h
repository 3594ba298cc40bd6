/* Arm: sdot on 4 x 4 codes, or smmla on 2 rows x 8 columns x 2 channels, 16 channels (one 64-byte piece of a block) at a time.
 * Bytes are taken as signed weights: the stored offset is removed by flipping the highest bit. */
#include <arm_neon.h>

#define DOT_ROWS 6
#define BYTE_OFFSET 0

RK_INLINE int8x16_t dot_weights(const uint8_t *w, const int nibbles, const int half) {
    uint8x16_t v = vld1q_u8(w + (nibbles ? 0 : 256 * half));
    if (!nibbles)
        return vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(128)));
    return vreinterpretq_s8_u8(half ? vshrq_n_u8(v, 4) : vandq_u8(v, vdupq_n_u8(15)));
}

#if defined(RK_NEON_I8MM)

RK_INLINE int8x16_t dot_two_rows(const int8_t *x, int64_t stride, const int two) {
    int8x8_t first = vld1_s8(x);
    return vcombine_s8(first, two ? vld1_s8(x + stride) : vdup_n_s8(0));
}

/* sums [rows][64] += ...; acc[p][2 i + j]: rows 2 p and 2 p + 1 with channels 4 i + 2 j and 4 i + 2 j + 1 */
RK_INLINE void dot_piece(DOT_PARAMETERS, const int rows, const int nibbles, int32_t *sums) {
    const int pairs = (rows + 1) / 2;
    int32x4_t acc[DOT_ROWS / 2][8];
#pragma GCC unroll 3
    for (int p = 0; p < pairs; p++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const int32_t *at = sums + 128 * p + 2 * i;
            acc[p][i] = vcombine_s32(vld1_s32(at), 2 * p + 1 < rows ? vld1_s32(at + 64) : vdup_n_s32(0));
        }
    for (int64_t k = 0; k < blocks; k++, w += nibbles ? NIBBLE_BLOCK : BYTE_BLOCK, x += 8) {
        int8x16_t codes[DOT_ROWS / 2];
#pragma GCC unroll 3
        for (int p = 0; p < pairs; p++)
            codes[p] = dot_two_rows(x + 2 * p * stride, stride, 2 * p + 1 < rows);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            int32x4_t first = vreinterpretq_s32_s8(dot_weights(w + 16 * i, nibbles, 0));
            int32x4_t second = vreinterpretq_s32_s8(dot_weights(w + 16 * i, nibbles, 1));
            int8x16_t even = vreinterpretq_s8_s32(vzip1q_s32(first, second));
            int8x16_t odd = vreinterpretq_s8_s32(vzip2q_s32(first, second));
#pragma GCC unroll 3
            for (int p = 0; p < pairs; p++) {
                acc[p][2 * i] = vmmlaq_s32(acc[p][2 * i], codes[p], even);
                acc[p][2 * i + 1] = vmmlaq_s32(acc[p][2 * i + 1], codes[p], odd);
            }
        }
    }
#pragma GCC unroll 3
    for (int p = 0; p < pairs; p++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            vst1_s32(sums + 128 * p + 2 * i, vget_low_s32(acc[p][i]));
            if (2 * p + 1 < rows)
                vst1_s32(sums + 128 * p + 64 + 2 * i, vget_high_s32(acc[p][i]));
        }
}

#else

RK_INLINE void dot_piece(DOT_PARAMETERS, const int rows, const int nibbles, int32_t *sums) {
    int32x4_t acc[DOT_ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            acc[r][i] = vld1q_s32(sums + 64 * r + 4 * i);
    for (int64_t k = 0; k < blocks; k++, w += nibbles ? NIBBLE_BLOCK : BYTE_BLOCK, x += 8)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            int8x16_t v[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                v[i] = dot_weights(w + 16 * i, nibbles, half);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int8x16_t codes = vreinterpretq_s8_s32(vdupq_n_s32(rk_load32(x + r * stride + 4 * half)));
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    acc[r][i] = vdotq_s32(acc[r][i], v[i], codes);
            }
        }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            vst1q_s32(sums + 64 * r + 4 * i, acc[r][i]);
}

#endif

RK_INLINE void dot_nibbles(DOT_PARAMETERS, const int rows, dot_sums acc) {
    for (int i = 0; i < 4; i++)
        dot_piece(w + 64 * i, blocks, x, stride, rows, 1, (int32_t *)acc + 16 * i);
}

RK_INLINE void dot_bytes(DOT_PARAMETERS, const int rows, dot_sums acc) {
    for (int i = 0; i < 4; i++)
        dot_piece(w + 64 * i, blocks, x, stride, rows, 0, (int32_t *)acc + 16 * i);
}
