/* Keys of a tile multiplied as they lie in the cache: scores are those of score_rows, bit for bit. */
#ifndef RK_CACHED_KEYS_H
#define RK_CACHED_KEYS_H

#include "attention_rows.h"

#define KEY_VECTORS 2 /* vectors of keys that are multiplied with a quad of queries once it is loaded */

/* sums[part] = q . k of some rows and some vectors of cached keys of `low` quads and others up to `both`; behind: the three quads behind
 * their codes. The last quads come first, since they are what scores wait for. */
RK_INLINE void sum_cached_keys(const attention_space *w, const uint8_t *cached, int64_t stride, int64_t low, int64_t both, const int rows,
                               const int vectors, i32v sums[2][BLOCK_ROWS][BLOCK_VECTORS], i32v behind[3][KEY_VECTORS]) {
    clear_sums(rows, vectors, sums[0]);
    clear_sums(rows, vectors, sums[1]);
#pragma GCC unroll 3
    for (int64_t first = (both + 2) / 4 * 4; first >= 0; first -= 4) {
        i32v quads[KEY_VECTORS][4];
#pragma GCC unroll 2
        for (int i = 0; i < vectors; i++)
            four_quads(cached + 4 * first + i * RK_WIDTH * stride, stride, quads[i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const int64_t quad = first + j;
            i32v v[BLOCK_VECTORS], high[BLOCK_VECTORS];
#pragma GCC unroll 2
            for (int i = 0; i < vectors; i++)
                v[i] = quads[i][j];
            if (quad < low) {
#pragma GCC unroll 2
                for (int i = 0; i < vectors; i++)
                    high[i] = v[i] >> 4 & 0x0f0f0f0f, v[i] &= 0x0f0f0f0f;
                add_quads(w->queries + 8 * quad, QUERY_SPACE, v, 1, QUERIES, rows, vectors, sums[0]);
                add_quads(w->queries + 8 * quad + 4, QUERY_SPACE, high, 1, QUERIES, rows, vectors, sums[0]);
            } else if (quad < both)
                add_quads(w->queries + 4 * (low + quad), QUERY_SPACE, v, 0, QUERIES, rows, vectors, sums[1]);
            else if (quad < both + 3)
                memcpy(behind[quad - both], v, sizeof(i32v) * (size_t)vectors);
        }
    }
}

/* Scores of some rows with some vectors of cached keys. minus: the sums of codes of the queries' parts, negative. */
RK_INLINE void score_cached_keys(attention_space *w, const uint8_t *cached, int64_t stride, int64_t key, int64_t low, int64_t both,
                                 const int16_t minus[BLOCK_ROWS][2], const int rows, const int vectors) {
    i32v sums[2][BLOCK_ROWS][BLOCK_VECTORS], behind[3][KEY_VECTORS];
    sum_cached_keys(w, cached, stride, low, both, rows, vectors, sums, behind);
#pragma GCC unroll 2
    for (int i = 0; i < vectors; i++) {
        const i32v last[3] = {behind[0][i], behind[1][i], behind[2][i]};
        const row_scales s = scales_of(w->key, last);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) { /* a part without columns adds nothing */
            f32v score[2];
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                const __m512i sum = (__m512i)sums[part][r][i], factor = _mm512_set1_epi32((uint16_t)minus[r][part]);
                const i32v product = (i32v)_mm512_dpwssd_epi32(sum, (__m512i)s.zero_point[part], factor);
                score[part] = __builtin_convertvector(product, f32v) * (s.scale[part] * w->codes[r][part].scale);
            }
            rk_store(w->scores[r] + key + i * RK_WIDTH, score[0] + score[1]);
        }
    }
}

RK_INLINE void score_all_cached_keys(attention_space *w, int64_t keys, int64_t stride, int64_t low, int64_t both, const int rows) {
    uint8_t space[KEY_VECTORS * RK_WIDTH * ROW_BYTES + SLACK];
    int16_t minus[BLOCK_ROWS][2];
    cache_reader r = w->key_rows;
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 2; part++)
            minus[row][part] = (int16_t)-w->codes[row][part].sum;
    int64_t j = 0;
    for (; j + RK_WIDTH < keys; j += KEY_VECTORS * RK_WIDTH) {
        const uint8_t *next = r.row + TILE_KEYS * stride;
#pragma GCC unroll 32
        for (int64_t i = 0; i < KEY_VECTORS * RK_WIDTH * stride; i += 64)
            __builtin_prefetch(next + i, 0, 2);
        score_cached_keys(w, next_rows(&r, KEY_VECTORS * RK_WIDTH, keys - j, 0, space), stride, j, low, both, minus, rows, KEY_VECTORS);
    }
    if (j < keys)
        score_cached_keys(w, next_rows(&r, RK_WIDTH, keys - j, 0, space), stride, j, low, both, minus, rows, 1);
}

/* Up to a multiple of 16 keys. Without branches for heads of 64 columns with 1/8 of them high: these would take a fifth of the time. */
RK_INLINE void cached_score_rows(attention_space *w, int64_t keys, const int rows) {
    const int64_t low = w->key.quads[0], both = low + w->key.quads[1];
    if (low == 7 && both == 9)
        score_all_cached_keys(w, keys, 46, 7, 9, rows);
    else
        score_all_cached_keys(w, keys, w->key_rows.bytes, low, both, rows);
}

#endif
