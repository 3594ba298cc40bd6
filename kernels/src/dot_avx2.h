/* 256-bit forms: rows go over 16 channels (one 64-byte piece of every block) at a time, or over all four pieces.
 *
 * AVX-VNNI: vpdpbusd as in the 512-bit form. AVX2: vpmaddubsw adds two products in 16 bits, at most 2 * 15 * 128 with weights of 4
 * bits, so eight of them fit before they are widened; bytes are taken as two nibbles, the second worth 16 times as much. */
#include <immintrin.h>

#if defined(RK_AVXVNNI)
#define DOT_ROWS 6
#define DOT_SWITCH RK_ROWS_6
#define PIECES(rows) ((rows) == 1 ? 4 : 1)
#else
#define DOT_ROWS 4 /* more accumulators than that do not fit into 16 registers beside a product */
#define DOT_SWITCH RK_ROWS_4
#define PIECES(rows) 1
#endif
#define BYTE_OFFSET 128
#define PREFETCH_DISTANCE 2048
#define VECTORS(rows) (2 * PIECES(rows))
#define WIDEN_EVERY 4 /* blocks: two vpmaddubsw each */

typedef __m256i piece_sums[DOT_ROWS][8];

RK_INLINE __m256i dot_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
RK_INLINE __m256i dot_codes(const int8_t *x) { return _mm256_set1_epi32(rk_load32(x)); }

/* One nibble of 32 bytes. */
RK_INLINE __m256i dot_nibble(const uint8_t *w, const int high) {
    __m256i v = dot_load(w);
    return _mm256_and_si256(high ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
}

RK_INLINE void dot_clear(const int rows, piece_sums acc) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            if (i < VECTORS(rows))
                acc[r][i] = _mm256_setzero_si256();
}

/* With one row memory is the limit: ask for what the next tiles need. */
RK_INLINE void dot_prefetch(const uint8_t *w, const int rows, const int block) {
    if (rows == 1)
#pragma GCC unroll 8
        for (int i = 0; i < block; i += 64)
            _mm_prefetch((const char *)w + PREFETCH_DISTANCE + i, _MM_HINT_T0);
}

#if defined(RK_AVXVNNI)

RK_INLINE void dot_pieces(DOT_PARAMETERS, const int rows, const int nibbles, int first, dot_sums sums) {
    const int block = nibbles ? NIBBLE_BLOCK : BYTE_BLOCK;
    piece_sums acc;
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            if (i < VECTORS(rows))
                acc[r][i] = (__m256i)sums[r][first + i];
    for (int64_t k = 0; k < blocks; k++, w += block, x += 8) {
        dot_prefetch(w, rows, block);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
                if (i >= VECTORS(rows))
                    break;
                const uint8_t *at = w + 32 * i + (nibbles ? 0 : 256 * half);
                __m256i v0 = nibbles ? dot_nibble(at, half) : dot_load(at);
                __m256i v1 = nibbles ? dot_nibble(at + 32, half) : dot_load(at + 32);
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) {
                    __m256i codes = dot_codes(x + r * stride + 4 * half);
                    acc[r][i] = _mm256_dpbusd_avx_epi32(acc[r][i], v0, codes);
                    acc[r][i + 1] = _mm256_dpbusd_avx_epi32(acc[r][i + 1], v1, codes);
                }
            }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            if (i < VECTORS(rows))
                sums[r][first + i] = (i32v)acc[r][i];
}

RK_INLINE void dot_nibbles(DOT_PARAMETERS, const int rows, dot_sums acc) {
    for (int i = 0; i < 4; i += PIECES(rows))
        dot_pieces(w + 64 * i, blocks, x, stride, rows, 1, 2 * i, acc);
}

RK_INLINE void dot_bytes(DOT_PARAMETERS, const int rows, dot_sums acc) {
    for (int i = 0; i < 4; i += PIECES(rows))
        dot_pieces(w + 64 * i, blocks, x, stride, rows, 0, 2 * i, acc);
}

#else

/* sums += factor * acc, acc = 0 */
RK_INLINE void dot_widen(piece_sums acc, const int rows, const int factor, int first, dot_sums sums) {
    const __m256i factors = _mm256_set1_epi16((short)factor);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            if (i < VECTORS(rows))
                sums[r][first + i] += (i32v)_mm256_madd_epi16(acc[r][i], factors);
    dot_clear(rows, acc);
}

/* sums += factor * product with one nibble of every byte. Columns 4..7 of a block lie `second_at` bytes behind columns 0..3;
 * first_high, second_high: whether they are in the high nibbles. */
RK_INLINE void dot_pieces(DOT_PARAMETERS, const int rows, const int block, const int second_at, const int first_high,
                          const int second_high, const int factor, int first, dot_sums sums) {
    piece_sums acc;
    dot_clear(rows, acc);
    for (int64_t k = 0; k < blocks;) {
        for (int64_t stop = rk_min(k + WIDEN_EVERY, blocks); k < stop; k++, w += block, x += 8) {
            dot_prefetch(w, rows, block);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
                for (int i = 0; i < 8; i += 2) {
                    if (i >= VECTORS(rows))
                        break;
                    const uint8_t *at = w + 32 * i + half * second_at;
                    __m256i v0 = dot_nibble(at, half ? second_high : first_high);
                    __m256i v1 = dot_nibble(at + 32, half ? second_high : first_high);
#pragma GCC unroll 6
                    for (int r = 0; r < rows; r++) {
                        __m256i codes = dot_codes(x + r * stride + 4 * half);
                        acc[r][i] = _mm256_add_epi16(acc[r][i], _mm256_maddubs_epi16(v0, codes));
                        acc[r][i + 1] = _mm256_add_epi16(acc[r][i + 1], _mm256_maddubs_epi16(v1, codes));
                        /* keeps GCC from regrouping the sums of both halves, for which there are not enough registers */
                        __asm__("" : "+x"(acc[r][i]), "+x"(acc[r][i + 1]));
                    }
                }
        }
        dot_widen(acc, rows, factor, first, sums);
    }
}

RK_INLINE void dot_nibbles(DOT_PARAMETERS, const int rows, dot_sums acc) {
    for (int i = 0; i < 4; i += PIECES(rows))
        dot_pieces(w + 64 * i, blocks, x, stride, rows, NIBBLE_BLOCK, 0, 0, 1, 1, 2 * i, acc);
}

RK_INLINE void dot_bytes(DOT_PARAMETERS, const int rows, dot_sums acc) {
    for (int i = 0; i < 4; i += PIECES(rows)) {
        dot_pieces(w + 64 * i, blocks, x, stride, rows, BYTE_BLOCK, 256, 0, 0, 1, 2 * i, acc);
        dot_pieces(w + 64 * i, blocks, x, stride, rows, BYTE_BLOCK, 256, 1, 1, 16, 2 * i, acc);
    }
}

#endif
