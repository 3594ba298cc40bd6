/* Keys and values of a tile multiplied as they lie in the cache: for tiles of few queries, as in decoding, where unpacking them first
 * would take longer than multiplying. Scores are those of score_rows and sums those of value_rows, bit for bit. */
#ifndef RK_ATTENTION_FEW_H
#define RK_ATTENTION_FEW_H

#include "attention_rows.h"

#if defined(__AVX512F__) /* elsewhere bringing four rows side by side takes too long, and registers are too few */
#define TAKES_CACHED 1
#else
#define TAKES_CACHED 0
#endif

/* Whether keys are multiplied so. */
RK_INLINE int takes_cached_keys(const query_tile *t, const head_layout *l) {
    return TAKES_CACHED && t->rows <= BLOCK_ROWS && in_whole_quads(l);
}

/* Whether a tile of so many values is multiplied so. */
RK_INLINE int takes_cached_values(const query_tile *t, const head_layout *l, const cache_reader *r, int64_t keys) {
    return TAKES_CACHED && t->rows <= BLOCK_ROWS && l->width[0] % 2 == 0 && r->left >= rk_round_up(keys, 4) * r->bytes + SLACK;
}

#if TAKES_CACHED

/* sums[r] = sums[r] + q[r] . v for a quad of each of some rows of limbs. */
RK_INLINE void add_quad(const int8_t *q, i32v v, const int nibbles, const int rows, i32v sums[BLOCK_LIMBS]) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        int32_t four;
        memcpy(&four, q + r * QUERY_SPACE, sizeof four);
        sums[r] = rk_dot_quads(sums[r], v, rk_splat_i32(four), nibbles);
    }
}

/* sums[part] = q . k of some rows of limbs and RK_WIDTH cached keys; behind: the three quads behind their codes. The last quads come
 * first, since they are what scores wait for. */
RK_INLINE void sum_cached_keys(const attention_space *w, const uint8_t *cached, int64_t stride, const int rows,
                               i32v sums[2][BLOCK_LIMBS], i32v behind[3]) {
    const int64_t low = w->key.quads[0], both = low + w->key.quads[1];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        sums[0][r] = sums[1][r] = (i32v){0};
    for (int64_t first = (both + 2) / 4 * 4; first >= 0; first -= 4) {
        i32v v[4];
        four_quads(cached + 4 * first, stride, v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int64_t quad = first + i;
            if (quad < low) {
                add_quad(w->queries + 8 * quad, v[i] & 0x0f0f0f0f, 1, rows, sums[0]);
                add_quad(w->queries + 8 * quad + 4, v[i] >> 4 & 0x0f0f0f0f, 1, rows, sums[0]);
            } else if (quad < both)
                add_quad(w->queries + 4 * (low + quad), v[i], 0, rows, sums[1]);
            else if (quad < both + 3)
                behind[quad - both] = v[i];
        }
    }
}

/* Scores of some rows with RK_WIDTH cached keys. */
RK_INLINE void score_cached_keys(attention_space *w, const uint8_t *cached, int64_t stride, int64_t key, const int rows) {
    i32v sums[2][BLOCK_LIMBS], behind[3];
    sum_cached_keys(w, cached, stride, LIMBS * rows, sums, behind);
    const row_scales scales = scales_of(w->key, behind);
    const int low = w->key.width[0] > 0, high = w->key.width[1] > 0;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        f32v score[2];
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) {
            const i32v *s = sums[part] + LIMBS * r;
            score[part] = score_of(&w->codes[r][part], s[0], s[1], s[2], scales.scale[part], (u32v)scales.zero_point[part]);
        }
        rk_store(w->scores[r] + key, low && high ? score[0] + score[1] : score[high]);
    }
}

/* Up to a multiple of 16 keys. */
RK_INLINE void cached_score_rows(attention_space *w, int64_t keys, const int rows) {
    uint8_t space[RK_WIDTH * ROW_BYTES + SLACK];
    cache_reader reader = w->key_rows;
    for (int64_t j = 0; j < keys; j += RK_WIDTH)
        score_cached_keys(w, next_rows(&reader, keys - j, 1, space), reader.bytes, j, rows);
}

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

RK_INLINE void cached_score_rows(attention_space *w, int64_t keys, const int rows) { (void)w, (void)keys, (void)rows; }

RK_INLINE void cached_value_rows(attention_space *w, const int part, int64_t keys, const int rows) {
    (void)w, (void)part, (void)keys, (void)rows;
}

#endif

#endif
