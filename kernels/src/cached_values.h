/* Values of a tile multiplied as they lie in the cache: sums are those of value_rows, bit for bit. */
#ifndef RK_CACHED_VALUES_H
#define RK_CACHED_VALUES_H

#include "cached_weights.h"

#define BLOCK_BYTES 32 /* of a row that are multiplied at once */
#define LINES_AT_ONCE 6 /* asked for with 8 keys: all blocks of a tile together ask for about as many as the next one has */

/* 32 bytes of a row and of the fourth one behind it. */
RK_INLINE i32v two_rows(const uint8_t *row, int64_t stride) {
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)row));
    return (i32v)_mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *)(row + 4 * stride)), 1);
}

/* Bytes of four vectors side by side: the first eight of each 16, or the last eight; quads[0] has the first four of these. */
RK_INLINE void side_by_side(const i32v v[4], const int last, i32v quads[2]) {
    const i32v a = last ? ACROSS(unpackhi_epi8, v[0], v[1]) : ACROSS(unpacklo_epi8, v[0], v[1]);
    const i32v b = last ? ACROSS(unpackhi_epi8, v[2], v[3]) : ACROSS(unpacklo_epi8, v[2], v[3]);
    quads[0] = ACROSS(unpacklo_epi16, a, b), quads[1] = ACROSS(unpackhi_epi16, a, b);
}

/* Weights of a quad of keys in the first half, those of the next one in the second. */
RK_INLINE i32v eight_weights(const uint8_t *weights) {
    const __m512i four = _mm512_broadcastd_epi32(_mm_loadu_si32(weights));
    return (i32v)_mm512_mask_broadcastd_epi32(four, 0xff00, _mm_loadu_si32(weights + 16));
}

/* sums[r][last][high nibbles][i] = sum_k weights[r][k] . nibbles[k] of 32 bytes of each cached row, as side_by_side leaves them, for `last`
 * from `begin` to `end`; the two halves of a vector are sums of different keys. */
RK_INLINE void nibble_products(const attention_space *w, const uint8_t *b, const uint8_t *next, int64_t keys, const int begin, const int end,
                               const int rows, i32v sums[BLOCK_ROWS][2][2][2]) {
    const int64_t stride = w->value_bytes;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            sums[r][i / 4][i / 2 % 2][i % 2] = (i32v){0};
    for (int64_t j = 0; j < keys; j += 8, b += 8 * stride, next += 64 * LINES_AT_ONCE) {
        const uint8_t *codes = w->weights[0] + quad_at(j);
        i32v v[4], weights[BLOCK_ROWS];
#pragma GCC unroll 6
        for (int i = 0; i < LINES_AT_ONCE; i++)
            __builtin_prefetch(next + 64 * i, 0, 2);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            v[i] = two_rows(b + i * stride, stride);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            weights[r] = eight_weights(codes + r * TILE_KEYS);
#pragma GCC unroll 2
        for (int last = begin; last < end; last++) {
            i32v quads[2];
            side_by_side(v, last, quads);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const i32v low = quads[i] & 0x0f0f0f0f, high = quads[i] >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    sums[r][last][0][i] = rk_dot_quads(sums[r][last][0][i], weights[r], low, 0);
                    sums[r][last][1][i] = rk_dot_quads(sums[r][last][1][i], weights[r], high, 0);
                }
            }
        }
    }
}

/* The first 16 columns and the last 16 of a block, from sums [last][..][i] of one row. */
RK_INLINE void columns_in_order(const i32v sums[2][2][2], const int high, i32v columns[2]) {
    i32v both[2];
#pragma GCC unroll 2
    for (int last = 0; last < 2; last++) {
        const i32v a = sums[last][high][0], b = sums[last][high][1];
        both[last] = PARTS_OF(a, b, 0, 1, 0, 1) + PARTS_OF(a, b, 2, 3, 2, 3);
    }
    columns[0] = PARTS_OF(both[0], both[1], 0, 2, 0, 2), columns[1] = PARTS_OF(both[0], both[1], 1, 3, 1, 3);
}

/* A block of the low part, of which `count` bytes belong to it. */
RK_INLINE void cached_nibble_block(attention_space *w, int64_t byte, int64_t count, int64_t keys, const int rows,
                                   const int32_t zeros[BLOCK_ROWS]) {
    const int64_t half = w->value.width[0] / 2;
    const uint8_t *b = w->value_rows + byte, *next = w->next_values;
    i32v sums[BLOCK_ROWS][2][2][2];
    w->next_values += 64 * LINES_AT_ONCE * (TILE_KEYS / 8);
    if (rows < 4)
        nibble_products(w, b, next, keys, 0, 2, rows, sums);
    else { /* registers for half of the sums at a time */
        i32v last[BLOCK_ROWS][2][2][2];
        nibble_products(w, b, next, keys, 0, 1, rows, sums);
        nibble_products(w, b, next, keys, 1, 2, rows, last);
        for (int r = 0; r < rows; r++)
            memcpy(sums[r][1], last[r][1], sizeof last[r][1]);
    }
    for (int r = 0; r < rows; r++)
        for (int high = 0; high < 2; high++) {
            i32v columns[2];
            columns_in_order(sums[r], high, columns);
            for (int i = 0; i < 2 && i * RK_WIDTH < count; i++)
                add_products(w, 0, 0, r, high * half + byte + i * RK_WIDTH, count - i * RK_WIDTH, columns[i], zeros);
        }
}

/* sums[r][i] = sum_k weights[r][k] . bytes[k] for 16 bytes of each cached row, or the first 8: vector i has columns 4 i to 4 i + 3, its
 * four parts are sums of different keys. */
RK_INLINE void byte_products(const attention_space *w, const uint8_t *b, int64_t keys, const int vectors, const int rows,
                             i32v sums[BLOCK_ROWS][BLOCK_VECTORS]) {
    const int64_t stride = w->value_bytes;
    clear_sums(rows, vectors, sums);
    for (int64_t j = 0; j < keys; j += RK_WIDTH, b += RK_WIDTH * stride) {
        i32v v[4], quads[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            v[i] = every_fourth(b, stride, i);
        side_by_side(v, 0, quads);
        if (vectors > 2)
            side_by_side(v, 1, quads + 2);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const i32v codes = rk_load_i32(w->weights[1] + r * TILE_KEYS + quad_at(j));
            const i32v weights = (i32v)_mm512_shuffle_epi32((__m512i)codes, _MM_PERM_AAAA);
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++)
                sums[r][i] = rk_dot_unsigned(sums[r][i], quads[i], weights, 0);
        }
    }
}

/* Columns in order from the sums of one row. */
RK_INLINE i32v byte_columns(const i32v sums[BLOCK_VECTORS], const int vectors) {
    const i32v none = {0}, c = vectors > 2 ? sums[2] : none, d = vectors > 2 ? sums[3] : none;
    const i32v first = PARTS_OF(sums[0], sums[1], 0, 1, 0, 1) + PARTS_OF(sums[0], sums[1], 2, 3, 2, 3);
    const i32v second = PARTS_OF(c, d, 0, 1, 0, 1) + PARTS_OF(c, d, 2, 3, 2, 3);
    return PARTS_OF(first, second, 0, 2, 0, 2) + PARTS_OF(first, second, 1, 3, 1, 3);
}

/* A block of the high part, of which `count` bytes belong to it. */
RK_INLINE void cached_byte_block(attention_space *w, int64_t byte, int64_t count, int64_t keys, const int rows,
                                 const int32_t zeros[BLOCK_ROWS]) {
    const uint8_t *b = w->value_rows + w->value.bytes[0] + byte;
    i32v sums[BLOCK_ROWS][BLOCK_VECTORS];
    if (count > RK_WIDTH / 2)
        byte_products(w, b, keys, 4, rows, sums);
    else
        byte_products(w, b, keys, 2, rows, sums);
    for (int r = 0; r < rows; r++) {
        const i32v columns = count > RK_WIDTH / 2 ? byte_columns(sums[r], 4) : byte_columns(sums[r], 2);
        add_products(w, 1, 0, r, w->value.column_at[1] + byte, count, columns, zeros);
    }
}

/* Both parts of the values. */
RK_INLINE void cached_value_rows(attention_space *w, int64_t keys, const int rows) {
    const int64_t count[2] = {w->value.width[0] / 2, w->value.width[1]};
    int32_t zeros[BLOCK_ROWS];
    if (count[0])
        weigh_zero_points_few(w, 0, keys, rows, zeros);
    for (int64_t i = 0; i < count[0]; i += BLOCK_BYTES)
        cached_nibble_block(w, i, count[0] - i, keys, rows, zeros);
    if (count[1])
        weigh_zero_points_few(w, 1, keys, rows, zeros);
    for (int64_t i = 0; i < count[1]; i += RK_WIDTH)
        cached_byte_block(w, i, count[1] - i, keys, rows, zeros);
}

#endif
