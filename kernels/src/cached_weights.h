/* Weights of tiles of few queries whose values are multiplied as they lie in the cache: those of `raise_highest`, `weigh` and
 * `code_weights`, bit for bit, with steps across lanes taken for all rows together. */
#ifndef RK_CACHED_WEIGHTS_H
#define RK_CACHED_WEIGHTS_H

#include "attention_rows.h"

#define GROUP_KEYS 64 /* keys whose codes lie together: quad k of each 16 of them in part k of a vector */

#define PARTS_OF(a, b, w, x, y, z) (i32v)_mm512_shuffle_i64x2((__m512i)(a), (__m512i)(b), (w) | (x) << 2 | (y) << 4 | (z) << 6)

/* Vector r combined with itself across lanes, in part r of the result; in the order of rk_total. */
#define ROWS_ACROSS(type, f) \
    const type a = f((type)PARTS_OF(v[0], v[1], 0, 1, 0, 1), (type)PARTS_OF(v[0], v[1], 2, 3, 2, 3)); \
    const type b = f((type)PARTS_OF(v[2], v[3], 0, 1, 0, 1), (type)PARTS_OF(v[2], v[3], 2, 3, 2, 3)); \
    type c = f((type)PARTS_OF(a, b, 0, 2, 0, 2), (type)PARTS_OF(a, b, 1, 3, 1, 3)); \
    c = f(c, (type)_mm512_shuffle_epi32((__m512i)c, _MM_PERM_BADC)); \
    return f(c, (type)_mm512_shuffle_epi32((__m512i)c, _MM_PERM_CDAB))

RK_INLINE f32v rk_add_floats(f32v a, f32v b) { return a + b; }
RK_INLINE f32v totals_of_rows(const f32v v[BLOCK_ROWS]) { ROWS_ACROSS(f32v, rk_add_floats); }
RK_INLINE f32v highest_of_rows(const f32v v[BLOCK_ROWS]) { ROWS_ACROSS(f32v, rk_highest); }
RK_INLINE i32v sums_of_rows(const i32v v[BLOCK_ROWS]) { ROWS_ACROSS(i32v, rk_add); }

/* A number of every row, in its part. */
RK_INLINE f32v in_parts(const float *x, int64_t stride, const int rows) {
    f32v v = {0};
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        v = (f32v)_mm512_mask_broadcastss_ps((__m512)v, (__mmask16)(0xf << 4 * r), _mm_load_ss(x + r * stride));
    return v;
}

/* Bytes of four vectors: quad k of vector i is lane 4 k + i. */
RK_INLINE void store_group(uint8_t *p, const i32v v[4]) {
    const i32v first = ACROSS(packus_epi32, v[0], v[1]), last = ACROSS(packus_epi32, v[2], v[3]);
    const i32v bytes = ACROSS(packus_epi16, first, last);
    memcpy(p, &bytes, sizeof bytes);
}

/* The highest scores of all rows, this tile's included, and what their earlier sums shrink by. */
RK_INLINE void raise_few(attention_space *w, int64_t keys, const int rows) {
    f32v highest[BLOCK_ROWS] = {{0}};
    float now[RK_WIDTH], shrink[RK_WIDTH];
    const f32v before = in_parts(&w->state[0].highest, sizeof(row_state) / sizeof(float), rows);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        highest[r] = rk_splat(w->state[r].highest);
        for (int64_t j = 0; j < keys; j += RK_WIDTH)
            highest[r] = rk_highest(highest[r], rk_load(w->scores[r] + j));
    }
    const f32v raised = highest_of_rows(highest);
    rk_store(now, raised), rk_store(shrink, weight_of(before - raised));
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        w->state[r].highest = now[4 * r], w->shrink[r] = shrink[4 * r];
}

/* Scales and zero points of 16 cached values, 0 from the count-th on. */
RK_INLINE row_scales cached_value_scales(const attention_space *w, int64_t key, int64_t count) {
    i32v quads[4];
    four_quads(w->value_rows + key * w->value_bytes + w->value.bytes[0] + w->value.bytes[1], w->value_bytes, quads);
    row_scales s = scales_of(w->value, quads);
    if (count < RK_WIDTH)
        for (int part = 0; part < 2; part++)
            s.scale[part] = (f32v)_mm512_maskz_mov_ps((__mmask16)((1u << count) - 1), (__m512)s.scale[part]);
    return s;
}

/* Where the codes of the quad that begins with a key lie. */
RK_INLINE int64_t quad_at(int64_t key) { return key / GROUP_KEYS * GROUP_KEYS + key % GROUP_KEYS / 16 * 4 + key % 16 * 4; }

/* Codes of weights that are multiplied by their value's scale; `highest` of each row in its part. */
RK_INLINE void code_few(attention_space *w, const int part, const float scaled[BLOCK_ROWS][TILE_KEYS], f32v highest, int64_t keys,
                        const int rows) {
    const f32v most = rk_splat(LARGEST_WEIGHT);
    float factor[RK_WIDTH], scale[RK_WIDTH];
    const i32v some = highest > SMALLEST_RANGE;
    rk_store(factor, rk_choose(some, most / highest, rk_splat(0)));
    rk_store(scale, rk_choose(some, highest * (1.0f / LARGEST_WEIGHT), rk_splat(0)));
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        w->weight_scale[r][part] = scale[4 * r];
        for (int64_t j = 0; j < keys; j += GROUP_KEYS) {
            i32v codes[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) /* rounds halves to even as code_of does */
                codes[i] = (i32v)_mm512_cvtps_epi32((__m512)(rk_load(scaled[r] + j + i * RK_WIDTH) * factor[4 * r]));
            store_group(w->weights[part] + r * TILE_KEYS + j, codes);
        }
    }
}

/* Scores of a tile to codes of weights. */
RK_INLINE void weigh_few(attention_space *w, int64_t keys, const int rows) {
    float scaled[2][BLOCK_ROWS][TILE_KEYS];
    f32v sums[BLOCK_ROWS] = {{0}}, highest[2][BLOCK_ROWS] = {{{0}}};
    i32v zero_points[2][TILE_KEYS / RK_WIDTH];
    const int64_t whole = rk_round_up(keys, RK_WIDTH), groups = rk_round_up(keys, GROUP_KEYS);
    raise_few(w, whole, rows);
    for (int64_t j = 0; j < whole; j += RK_WIDTH) {
        const row_scales s = cached_value_scales(w, j, keys - j);
        zero_points[0][j / RK_WIDTH] = s.zero_point[0], zero_points[1][j / RK_WIDTH] = s.zero_point[1];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const f32v p = weight_of(rk_load(w->scores[r] + j) - w->state[r].highest);
            sums[r] += p;
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                const f32v weight = p * s.scale[part];
                highest[part][r] = rk_highest(highest[part][r], weight);
                rk_store(scaled[part][r] + j, weight);
            }
        }
    }
    for (int64_t j = whole; j < groups; j += RK_WIDTH)
        for (int part = 0; part < 2; part++) {
            zero_points[part][j / RK_WIDTH] = (i32v){0};
            for (int r = 0; r < rows; r++)
                rk_store(scaled[part][r] + j, rk_splat(0));
        }
    float totals[RK_WIDTH];
    rk_store(totals, totals_of_rows(sums));
    for (int r = 0; r < rows; r++)
        w->state[r].total = w->state[r].total * w->shrink[r] + totals[4 * r];
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
        code_few(w, part, scaled[part], highest_of_rows(highest[part]), whole, rows);
        for (int64_t j = 0; j < groups; j += GROUP_KEYS)
            store_group(w->value_scales.zero_point[part] + j, zero_points[part] + j / RK_WIDTH);
    }
}

/* Sums of weights times the zero points of their values, for all rows. */
RK_INLINE void weigh_zero_points_few(const attention_space *w, const int part, int64_t keys, const int rows, int32_t zeros[BLOCK_ROWS]) {
    i32v sums[BLOCK_ROWS] = {{0}};
    int32_t found[RK_WIDTH];
    for (int64_t j = 0; j < keys; j += GROUP_KEYS) {
        const i32v zero_points = rk_load_i32(w->value_scales.zero_point[part] + j);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            sums[r] = rk_dot_unsigned(sums[r], zero_points, rk_load_i32(w->weights[part] + r * TILE_KEYS + j), part == 0);
    }
    rk_store_i32(found, sums_of_rows(sums));
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        zeros[r] = found[4 * r];
}

#endif
