/* 512-bit vpdpbusd: weights are the unsigned operand, a broadcast of four activation codes is the signed one. */
#include <immintrin.h>

#define DOT_ROWS 6
#define BYTE_OFFSET 128
#define PREFETCH_DISTANCE 1024 /* farther ahead was slower: the processor's own guesses go as far */

RK_INLINE void dot_block(const uint8_t *w, const int8_t *x, int64_t stride, const int rows, const int nibbles, const int half, dot_sums acc) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_loadu_si512(w + 64 * i + (nibbles ? 0 : 256 * half));
        if (nibbles)
            v[i] = _mm512_and_si512(half ? _mm512_srli_epi16(v[i], 4) : v[i], _mm512_set1_epi8(15));
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        __m512i codes = _mm512_set1_epi32(rk_load32(x + r * stride + 4 * half));
        __asm__("" : "+v"(codes)); /* one load, not one for each product */
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            acc[r][i] = (i32v)_mm512_dpbusd_epi32((__m512i)acc[r][i], v[i], codes);
    }
}

RK_INLINE void dot_rows(DOT_PARAMETERS, const int rows, const int nibbles, dot_sums acc) {
    const int64_t block = nibbles ? NIBBLE_BLOCK : BYTE_BLOCK;
    for (int64_t k = 0; k < blocks; k++, w += block, x += 8) {
        if (rows == 1) /* memory is the limit: ask for what the next tiles need, into the second level, which waits for more at once */
#pragma GCC unroll 8
            for (int i = 0; i < block; i += 64)
                _mm_prefetch((const char *)w + PREFETCH_DISTANCE + i, _MM_HINT_T1);
        dot_block(w, x, stride, rows, nibbles, 0, acc);
        dot_block(w, x, stride, rows, nibbles, 1, acc);
    }
}

RK_INLINE void dot_nibbles(DOT_PARAMETERS, const int rows, dot_sums acc) { dot_rows(w, blocks, x, stride, rows, 1, acc); }
RK_INLINE void dot_bytes(DOT_PARAMETERS, const int rows, dot_sums acc) { dot_rows(w, blocks, x, stride, rows, 0, acc); }
