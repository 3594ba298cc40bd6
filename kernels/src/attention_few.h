/* Values of a tile multiplied as they lie in the cache: for tiles of few queries, as in decoding, where unpacking them first would take
 * longer than multiplying. The sums are those of value_rows, bit for bit. */
#ifndef RK_ATTENTION_FEW_H
#define RK_ATTENTION_FEW_H

#include "attention_rows.h"

#if defined(__AVX512F__) /* elsewhere bringing four rows side by side takes too long, and registers are too few */
#define TAKES_CACHED_VALUES 1
#else
#define TAKES_CACHED_VALUES 0
#endif

/* Whether a tile of so many keys is multiplied so. */
RK_INLINE int takes_cached_values(const query_tile *t, const head_layout *l, const cache_reader *r, int64_t keys) {
    return TAKES_CACHED_VALUES && t->rows <= BLOCK_ROWS && l->width[0] % 2 == 0 && r->left >= rk_round_up(keys, 4) * r->bytes + SLACK;
}

#if TAKES_CACHED_VALUES

/* sums[r][0] = sum_k a[r][k] . b[k] for some rows of limbs and a vector of bytes of cached rows; of their low nibbles where vectors is 2,
 * and then sums[r][1] is that of their high nibbles. Asks for the next tile's values on the way: all passes over a tile together ask for
 * about as many bytes as it has. */
RK_INLINE void product_of_cached(attention_space *w, const int8_t *a, const uint8_t *b, int64_t quads, const int rows, const int vectors,
                                 i32v sums[BLOCK_LIMBS][BLOCK_VECTORS]) {
    clear_sums(rows, vectors, sums);
    for (int64_t j = 0; j < quads; j++, a += 4, b += 4 * w->value_bytes, w->next_values += 64) {
        __builtin_prefetch(w->next_values, 0, 2);
        const i32v codes = four_rows(b, w->value_bytes);
        const i32v v[BLOCK_VECTORS] = {vectors == 2 ? codes & 0x0f0f0f0f : codes, codes >> 4 & 0x0f0f0f0f};
        add_quads(a, TILE_KEYS, v, vectors == 2, rows, vectors, sums);
    }
}

/* One part of the values. */
RK_INLINE void cached_value_rows(attention_space *w, const int part, int64_t keys, const int rows) {
    const int64_t half = w->value.width[0] / 2, count = part ? w->value.width[1] : half;
    const uint8_t *cached = w->value_rows + (part ? w->value.bytes[0] : 0);
    i32v sums[BLOCK_LIMBS][BLOCK_VECTORS];
    int32_t zeros[BLOCK_LIMBS];
    if (count)
        weigh_zero_points(w, part, rk_round_up(keys, 16), LIMBS * rows, zeros);
    for (int64_t i = 0; i < count; i += RK_WIDTH) {
        product_of_cached(w, w->weights[part], cached + i, (keys + 3) / 4, LIMBS * rows, part ? 1 : 2, sums);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            add_products(w, part, 0, r, (part ? w->value.column_at[1] : 0) + i, count - i, zeros, 0, sums);
            if (!part)
                add_products(w, 0, 0, r, half + i, count - i, zeros, 1, sums);
        }
    }
}

#else

RK_INLINE void cached_value_rows(attention_space *w, const int part, int64_t keys, const int rows) {
    (void)w, (void)part, (void)keys, (void)rows;
}

#endif

#endif
