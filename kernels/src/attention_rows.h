/* Rows of attention with tiles of keys: scores, weights, sums of values.
 *
 * Queries and weights are broadcast, keys and columns of values lie in lanes, so that only a row's highest score and total are found
 * across lanes. A part of a query becomes codes, and so do the weights of a row and tile, each multiplied by its value's scale: products
 * with codes of the cache are exact integers below 2^24, which floats hold. Scores are in units of log 2: weights are powers of two. */
#ifndef RK_ATTENTION_ROWS_H
#define RK_ATTENTION_ROWS_H

#include "activations.h"
#include "attention_chunks.h"
#include "attention_images.h"

#define UNSEEN (-1e30f) /* a score that is not there */
#define LOWEST (-1e28f) /* below all others */
#define LOG2_E 1.44269504f

#define BLOCK_ROWS 4
#if RK_WIDTH == 16 || defined(__aarch64__) /* 32 registers */
#define BLOCK_VECTORS 4
#else
#define BLOCK_VECTORS 2
#endif

typedef struct {
    const rk_attention_args *args;
    int64_t batch, kv_head, group; /* group: query heads of a key head */
    int64_t first_row, rows;       /* row: token * group + head within the group */
    int64_t first_key, last_key;   /* slots that any row sees, or a chunk of them: [first_key, last_key) */
    int64_t chunk, chunks;
} query_tile;

/* The highest score of a row so far, and the total of its weights as multiples of that one's. */
typedef struct {
    float highest, total;
} row_state;

typedef struct {
    head_layout key, value;
    tile_scales key_scales, value_scales;
    uint8_t mask[TILE_KEYS];
    row_state state[LANES];
    query_codes codes[LANES][2];
    float slope[LANES], shrink[BLOCK_ROWS], weight_scale[BLOCK_ROWS][2];
    float scores[BLOCK_ROWS][TILE_KEYS];
    uint8_t weights[2][BLOCK_ROWS * TILE_KEYS + 64]; /* [part][row][key] */
    int8_t queries[LANES * QUERY_SPACE];             /* [row][quads of the low part, those of the high one] */
    float sums[LANES * COLUMN_SPACE];                /* [row][column] */
    int32_t keys[QUAD_SPACE * TILE_KEYS];            /* [quad][key] */
    int32_t values[TILE_KEYS / 4 * COLUMN_SPACE + 16]; /* [quad of keys][column] */
    cache_reader key_rows;     /* this tile's in the cache, where keys are taken from there; NULL: from `keys` */
    const uint8_t *value_rows; /* the same of values */
    int64_t value_bytes;
    const uint8_t *next_values; /* of the next tile: what to ask for meanwhile */
} attention_space;

static int64_t token_of(const query_tile *t, int64_t row) { return (t->first_row + row) / t->group; }
static int64_t head_of(const query_tile *t, int64_t row) { return t->kv_head * t->group + (t->first_row + row) % t->group; }
static int64_t slot_of_row(const query_tile *t, int64_t row) { return t->args->start[t->batch] + token_of(t, row); }

enum { BYTES, NIBBLES, TWO_NIBBLES }; /* a quad: four bytes, four nibbles each in a byte, or four low nibbles and then four high ones */
enum { QUERIES, WEIGHTS };            /* what codes of the cache are multiplied with: signed or unsigned bytes */

RK_INLINE void clear_sums(const int rows, const int vectors, i32v sums[BLOCK_ROWS][BLOCK_VECTORS]) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++)
            sums[r][i] = (i32v){0};
}

/* sums[r] = sums[r] + a[r] . v for a quad of each of some rows and some vectors. */
RK_INLINE void add_quads(const void *a, int64_t a_stride, const i32v v[BLOCK_VECTORS], const int nibbles, const int what, const int rows,
                         const int vectors, i32v sums[BLOCK_ROWS][BLOCK_VECTORS]) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        int32_t four;
        memcpy(&four, (const char *)a + r * a_stride, sizeof four);
        i32v w = rk_splat_i32(four);
        KEEP_IN_REGISTER(w);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++)
            sums[r][i] = what == WEIGHTS ? rk_dot_unsigned(sums[r][i], v[i], w, nibbles) : rk_dot_quads(sums[r][i], v[i], w, nibbles);
    }
}

/* sums[r][v] = sum_k a[r][k] . b[k][v] for some rows and vectors of quads. */
RK_INLINE void product_block(const void *a, int64_t a_stride, const int32_t *b, int64_t b_stride, int64_t k, const int kind, const int what,
                             const int rows, const int vectors, i32v sums[BLOCK_ROWS][BLOCK_VECTORS]) {
    const char *at = a;
    clear_sums(rows, vectors, sums);
    for (int64_t j = 0; j < k; j++, b += b_stride)
#pragma GCC unroll 2
        for (int high = 0; high <= (kind == TWO_NIBBLES); high++, at += 4) {
            i32v v[BLOCK_VECTORS];
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) {
                v[i] = rk_load_i32(b + i * RK_WIDTH);
                if (kind == TWO_NIBBLES)
                    v[i] = (high ? v[i] >> 4 : v[i]) & 0x0f0f0f0f;
            }
            add_quads(at, a_stride, v, kind != BYTES, what, rows, vectors, sums);
        }
}

/* Scores ------------------------------------------------------------------------------------------------------------------ */

/* Zero points of a part of keys as rk_dot_quads leaves their codes. */
RK_INLINE f32v zero_points(i32v stored, const int part) { return __builtin_convertvector(stored - (part ? BYTE_SHIFT : 0), f32v); }

/* q . k of a part of a query and a vector of keys, from the products of their codes. */
RK_INLINE f32v score_of(const query_codes *c, i32v products, f32v scale, f32v zero_point) {
    return (__builtin_convertvector(products, f32v) - zero_point * c->sum) * (scale * c->scale);
}

/* What a part adds to the scores of some rows with some vectors of keys. */
RK_INLINE void score_block(attention_space *w, const int part, int64_t row, int64_t key, const int rows, const int vectors, const int add) {
    i32v sums[BLOCK_ROWS][BLOCK_VECTORS];
    const int8_t *queries = w->queries + row * QUERY_SPACE + (part ? 8 * w->key.quads[0] : 0);
    const int32_t *keys = w->keys + (part ? w->key.quads[0] : 0) * TILE_KEYS + key;
    product_block(queries, QUERY_SPACE, keys, TILE_KEYS, w->key.quads[part], part ? BYTES : TWO_NIBBLES, QUERIES, rows, vectors, sums);
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
        const f32v scale = rk_load(w->key_scales.scale[part] + key + i * RK_WIDTH);
        const f32v zero_point = zero_points(rk_load_bytes(w->key_scales.zero_point[part] + key + i * RK_WIDTH), part);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            float *score = w->scores[r] + key + i * RK_WIDTH;
            const f32v product = score_of(&w->codes[row + r][part], sums[r][i], scale, zero_point);
            rk_store(score, add ? rk_load(score) + product : product);
        }
    }
}

/* Both parts. */
RK_INLINE void score_parts(attention_space *w, int64_t row, int64_t key, const int rows, const int vectors) {
    if (w->key.width[0])
        score_block(w, 0, row, key, rows, vectors, 0);
    if (w->key.width[0] && w->key.width[1])
        score_block(w, 1, row, key, rows, vectors, 1);
    else if (w->key.width[1])
        score_block(w, 1, row, key, rows, vectors, 0);
}

/* Up to a multiple of 16 keys. */
RK_INLINE void score_rows(attention_space *w, int64_t row, int64_t keys, const int rows) {
    int64_t j = 0;
    for (; j + BLOCK_VECTORS * RK_WIDTH <= rk_round_up(keys, RK_WIDTH); j += BLOCK_VECTORS * RK_WIDTH)
        score_parts(w, row, j, rows, BLOCK_VECTORS);
    for (; j < keys; j += RK_WIDTH)
        score_parts(w, row, j, rows, 1);
    for (; j < rk_round_up(keys, 16); j += RK_WIDTH)
        for (int r = 0; r < rows; r++)
            rk_store(w->scores[r] + j, rk_splat(UNSEEN));
}

/* What q . k is multiplied with before it is capped. */
static float score_factor(const rk_attention_args *a) { return a->softcap > 0 ? a->scale : a->scale * LOG2_E; }

/* c tanh(s / c) with tanh z = 1 - 2 / (e^2z + 1), in units of log 2 */
RK_INLINE f32v capped(f32v s, float softcap) {
    return softcap * LOG2_E * (1.0f - 2.0f / (rk_exp(s * (2.0f / softcap)) + 1.0f));
}

/* Marks the scores of keys that a row in this slot does not see, up to a multiple of 16. */
static void mask_row(const query_tile *t, attention_space *w, float *scores, int64_t slot, int64_t first, int64_t keys) {
    const int32_t window = t->args->window ? (int32_t)t->args->window : INT32_MAX;
    for (int64_t j = 0; j < rk_round_up(keys, 16); j += RK_WIDTH) {
        const i32v key = rk_lane + (int32_t)(first + j);
        i32v seen = (key <= (int32_t)slot) & ((int32_t)slot - key < window) & (key < (int32_t)(first + keys));
        if (t->args->mask)
            seen &= rk_load_bytes(w->mask + j) != 0;
        rk_store(scores + j, rk_choose(seen, rk_load(scores + j), rk_splat(UNSEEN)));
    }
}

/* Weights ----------------------------------------------------------------------------------------------------------------- */

/* 2^x for x <= 0, to 2 units in the last place; what is below 2^-126 is nothing, whatever comes out for it first. 2^f for |f| <= 1/2 is the
 * polynomial with the least relative error, 1e-7. */
RK_INLINE f32v weight_of(f32v x) {
    const f32v shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);
    f32v e = f * 1.3264727e-3f + 9.6715130e-3f;
    e = e * f + 5.5507336e-2f;
    e = e * f + 2.4022242e-1f;
    e = e * f + 6.9314700e-1f;
    e = e * f + 1.0f;
    return rk_choose(x > -126.0f, (f32v)((u32v)e + ((u32v)shifted << 23)), rk_splat(0));
}

RK_INLINE float weight_of_one(float x) { return weight_of(rk_splat(x))[0]; }

/* The highest scores of some rows, this tile's included, and what their earlier sums shrink by. */
RK_INLINE void raise_highest(attention_space *w, int64_t row, int64_t keys, const int rows) {
    for (int r = 0; r < rows; r++) {
        row_state *state = &w->state[row + r];
        f32v highest = rk_splat(state->highest);
        for (int64_t j = 0; j < keys; j += RK_WIDTH)
            highest = rk_highest(highest, rk_load(w->scores[r] + j));
        const float now = rk_highest_of(highest);
        w->shrink[r] = weight_of_one(state->highest - now);
        state->highest = now;
    }
}

/* Scores of row r of a block to weights; weight_scale becomes the highest of each part's, multiplied by their value's scale. */
RK_INLINE void weigh(attention_space *w, int64_t row, int r, int64_t keys) {
    row_state *state = &w->state[row + r];
    f32v highest[2] = {{0}, {0}};
    rk_lanes sums = {{{0}}};
    for (int64_t j = 0; j < keys; j += 16)
#pragma GCC unroll 4
        for (int i = 0; i < 16 / RK_WIDTH; i++) {
            const int64_t at = j + i * RK_WIDTH;
            const f32v p = weight_of(rk_load(w->scores[r] + at) - state->highest);
            sums.part[i] += p;
            highest[0] = rk_highest(highest[0], p * rk_load(w->value_scales.scale[0] + at));
            highest[1] = rk_highest(highest[1], p * rk_load(w->value_scales.scale[1] + at));
            rk_store(w->scores[r] + at, p);
        }
    state->total = state->total * w->shrink[r] + rk_total(sums);
    w->weight_scale[r][0] = rk_highest_of(highest[0]), w->weight_scale[r][1] = rk_highest_of(highest[1]);
}

/* Weights times the scale of their value, as codes, zeros for the rest of a tile; weight_scale becomes the scale of these. */
RK_INLINE void code_weights(attention_space *w, int r, int part, int64_t keys) {
    float *scale = &w->weight_scale[r][part];
    uint8_t *codes = w->weights[part] + r * TILE_KEYS;
    const float factor = to_codes(*scale, LARGEST_WEIGHT);
    for (int64_t j = 0; j < keys; j += RK_WIDTH) {
        const f32v weight = rk_load(w->scores[r] + j) * rk_load(w->value_scales.scale[part] + j);
        rk_store_bytes(codes + j, code_of(weight, factor));
    }
    memset(codes + keys, 0, (size_t)(TILE_KEYS - keys));
    *scale = from_codes(*scale, LARGEST_WEIGHT);
}

/* Values ------------------------------------------------------------------------------------------------------------------ */

/* Sums of weights times the zero points of their values, for some rows. */
RK_INLINE void weigh_zero_points(const attention_space *w, const int part, int64_t keys, const int rows, int32_t sums[BLOCK_ROWS]) {
    for (int r = 0; r < rows; r++) {
        i32v sum = {0};
        for (int64_t j = 0; j < keys; j += 4 * RK_WIDTH) {
            const i32v zero_points = rk_load_i32(w->value_scales.zero_point[part] + j);
            sum = rk_dot_unsigned(sum, zero_points, rk_load_i32(w->weights[part] + r * TILE_KEYS + j), part == 0);
        }
        sums[r] = rk_sum_across(sum);
    }
}

/* sums = sums * shrink + products of weights with codes - those with zero points, for row r of a block and a vector of `count` columns or
 * more. */
RK_INLINE void add_products(attention_space *w, const int part, int64_t row, const int r, int64_t column, int64_t count, i32v products,
                            const int32_t zeros[BLOCK_ROWS]) {
    float *sum = w->sums + (row + r) * COLUMN_SPACE + column;
    const f32v added = __builtin_convertvector(products - zeros[r], f32v) * w->weight_scale[r][part];
    rk_store_some(sum, rk_load_some(sum, count) * w->shrink[r] + added, count);
}

/* sums = sums * shrink + weights . (values - zero points), for some rows and vectors of columns. */
RK_INLINE void value_block(attention_space *w, const int part, int64_t row, int64_t column, int64_t quads, const int32_t zeros[BLOCK_ROWS],
                           const int rows, const int vectors) {
    i32v sums[BLOCK_ROWS][BLOCK_VECTORS];
    product_block(w->weights[part], TILE_KEYS, w->values + column, w->value.columns, quads, part ? BYTES : NIBBLES, WEIGHTS, rows, vectors, sums);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++)
            add_products(w, part, row, r, column + i * RK_WIDTH, RK_WIDTH, sums[r][i], zeros);
}

RK_INLINE void value_rows(attention_space *w, const int part, int64_t row, int64_t keys, const int rows) {
    const int64_t last = w->value.column_at[part] + w->value.width[part], quads = (keys + 3) / 4;
    int64_t i = w->value.column_at[part];
    int32_t zeros[BLOCK_ROWS];
    weigh_zero_points(w, part, rk_round_up(keys, 16), rows, zeros);
    for (; i + (BLOCK_VECTORS - 1) * RK_WIDTH < last; i += BLOCK_VECTORS * RK_WIDTH)
        value_block(w, part, row, i, quads, zeros, rows, BLOCK_VECTORS);
    for (; i < last; i += RK_WIDTH)
        value_block(w, part, row, i, quads, zeros, rows, 1);
}

#endif
