/* Attention over the packed cache, with a running softmax over tiles of keys: formula and operands in resq_kernels.h.
 *
 * The rows of a unit are queries of the heads that share a key head, token by token. Keys and values are made floats a tile at a
 * time. Many rows lie in the lanes of vectors, [column][row], and an element of a key or value is broadcast, so that nothing is
 * summed across lanes. Few rows, as in decoding, would leave lanes empty: there the columns lie in the lanes. */
#include "activations.h"
#include "cache_rows.h"

#define LANES 64     /* rows of a unit */
#define FEW 8        /* up to so many rows, columns lie in the lanes */
#define TILE_KEYS 32
#define TOKENS_SPACE (TILE_KEYS * RK_MAX_HEAD + RK_WIDTH)
#define VALUE_VECTORS 4 /* of columns, summed together */
#define UNSEEN (-1e30f) /* a score that is not there */

#if RK_WIDTH == 8 /* 16 registers */
#define PRODUCT_ROWS 4
#else
#define PRODUCT_ROWS 8
#endif
#define PRODUCT_LANES (2 * RK_WIDTH)

typedef struct {
    const rk_attention_args *args;
    int64_t batch, kv_head, group; /* group: query heads of a key head */
    int64_t first_row, rows;       /* row: token * group + head within the group */
    int64_t first_key, last_key;   /* slots that any row sees: [first_key, last_key) */
} query_tile;

static int64_t rows_of(const rk_attention_args *a) { return a->tokens * (a->heads / a->kv_heads); }
static int64_t row_tiles(const rk_attention_args *a) { return (rows_of(a) + LANES - 1) / LANES; }

static int64_t attention_units(const rk_attention_args *a) { return a->batch * a->kv_heads * row_tiles(a); }

static int64_t token_of(const query_tile *t, int64_t row) { return (t->first_row + row) / t->group; }
static int64_t head_of(const query_tile *t, int64_t row) { return t->kv_head * t->group + (t->first_row + row) % t->group; }
static int64_t slot_of_row(const query_tile *t, int64_t row) { return t->args->start[t->batch] + token_of(t, row); }

static const float *query_of(const query_tile *t, int64_t row) {
    const rk_attention_args *a = t->args;
    return a->q + ((t->batch * a->tokens + token_of(t, row)) * a->heads + head_of(t, row)) * (a->key.low + a->key.high);
}

/* Float images of `count` tokens from slot `first` on. */
static void read_tokens(const query_tile *t, const rk_head *h, const uint8_t *cache, int64_t first, int64_t count, float *x) {
    const rk_attention_args *a = t->args;
    const int64_t bytes = rk_head_bytes(h), d = h->low + h->high;
    const uint8_t *row = cache + ((t->batch * a->kv_heads + t->kv_head) * a->capacity + first) * bytes;
    for (int64_t i = 0; i < count; i++)
        read_row(h, row + i * bytes, x + i * d);
}

static int is_padding(const query_tile *t, int64_t slot) {
    const rk_attention_args *a = t->args;
    return a->mask && !a->mask[t->batch * a->mask_stride + slot];
}

/* c tanh(s / c) with tanh z = 1 - 2 / (e^2z + 1) */
RK_INLINE f32v capped(f32v s, float softcap) { return softcap * (1.0f - 2.0f / (rk_exp(s * (2.0f / softcap)) + 1.0f)); }

/* e^x for x <= 0; what is below e^-80 of the largest is nothing. */
RK_INLINE f32v weight_of(f32v x) { return rk_choose(x > -80.0f, rk_exp(x), rk_splat(0)); }

/* The result of one row, y [columns], to where it belongs. */
static void store_row(const query_tile *t, int64_t row, const float *y) {
    const rk_attention_args *a = t->args;
    const int64_t token = t->batch * a->tokens + token_of(t, row), head = head_of(t, row), e = a->value.low + a->value.high;
    if (a->out)
        memcpy(a->out + (token * a->heads + head) * e, y, sizeof(float) * (size_t)e);
    for (int i = 0; i < a->codes.parts; y += a->codes.part[i++].width)
        quantize_run(&a->codes, i, (int)head, token, i * a->heads + head, a->codes.parts * a->heads, y);
}

/* Many rows --------------------------------------------------------------------------------------------------------------- */

/* c[i][m] (+)= sum_k a[i * row + k * step] b[k][m] for ROWS values of i and PRODUCT_LANES lanes. */
RK_INLINE void product_block(const float *a, int64_t row, int64_t step, const float *b, int64_t k, const int rows, const int add,
                             float *c) {
    f32v sums[PRODUCT_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        sums[i][0] = add ? rk_load(c + LANES * i) : rk_splat(0);
        sums[i][1] = add ? rk_load(c + LANES * i + RK_WIDTH) : rk_splat(0);
    }
    for (int64_t j = 0; j < k; j++, a += step, b += LANES) {
        const f32v b0 = rk_load(b), b1 = rk_load(b + RK_WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const f32v v = rk_splat(a[i * row]);
            sums[i][0] = rk_fma(v, b0, sums[i][0]);
            sums[i][1] = rk_fma(v, b1, sums[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        rk_store(c + LANES * i, sums[i][0]);
        rk_store(c + LANES * i + RK_WIDTH, sums[i][1]);
    }
}

RK_INLINE void product(const float *a, int64_t row, int64_t step, const float *b, int64_t k, int64_t rows, int64_t lanes,
                       const int add, float *c) {
    for (int64_t m = 0; m < lanes; m += PRODUCT_LANES) {
        int64_t i = 0;
        for (; i + PRODUCT_ROWS <= rows; i += PRODUCT_ROWS)
            product_block(a + i * row, row, step, b + m, k, PRODUCT_ROWS, add, c + LANES * i + m);
        for (; i < rows; i++)
            product_block(a + i * row, row, step, b + m, k, 1, add, c + LANES * i + m);
    }
}

/* Scores s [keys][LANES] of one vector of lanes: capped, and unseen ones marked. */
static void mask_lanes(const query_tile *t, int64_t first, int64_t keys, i32v slots, float *s) {
    const rk_attention_args *a = t->args;
    for (int64_t j = 0; j < keys; j++, s += LANES) {
        const int32_t key = (int32_t)(first + j);
        f32v score = a->softcap > 0 ? capped(rk_load(s), a->softcap) : rk_load(s);
        i32v seen = slots >= key;
        if (a->window)
            seen &= slots - key < (int32_t)a->window;
        if (is_padding(t, key))
            seen = (i32v){0};
        rk_store(s, rk_choose(seen, score, rk_splat(UNSEEN)));
    }
}

/* Scores to weights of one vector of lanes; highest and total are brought up to date. Returns what earlier sums shrink by. */
static f32v soften_lanes(int64_t keys, float *s, float *highest, float *total) {
    const f32v before = rk_load(highest);
    f32v now = before, sum = {0};
    for (int64_t j = 0; j < keys; j++)
        now = rk_highest(now, rk_load(s + j * LANES));
    for (int64_t j = 0; j < keys; j++) {
        const f32v score = rk_load(s + j * LANES), p = rk_choose(score > UNSEEN, weight_of(score - now), rk_splat(0));
        sum += p;
        rk_store(s + j * LANES, p);
    }
    const f32v shrink = weight_of(before - now);
    rk_store(total, rk_load(total) * shrink + sum);
    rk_store(highest, now);
    return shrink;
}

typedef struct {
    int32_t slots[LANES];
    float highest[LANES], total[LANES];
    float queries[RK_MAX_HEAD * LANES], sums[RK_MAX_HEAD * LANES]; /* [column][row] */
    float tokens[TOKENS_SPACE], scores[TILE_KEYS * LANES];
} many_rows;

static void start_many(const query_tile *t, many_rows *w) {
    const rk_attention_args *a = t->args;
    const int64_t d = a->key.low + a->key.high, e = a->value.low + a->value.high;
    for (int64_t m = 0; m < LANES; m++) {
        const int there = m < t->rows;
        const float *q = query_of(t, there ? m : 0);
        w->slots[m] = there ? (int32_t)slot_of_row(t, m) : -1;
        w->highest[m] = there && a->sinks ? a->sinks[head_of(t, m)] : UNSEEN;
        w->total[m] = there && a->sinks ? 1.0f : 0.0f;
        const float factor = there ? a->scale : 0.0f;
        for (int64_t i = 0; i < d; i++)
            w->queries[i * LANES + m] = q[i] * factor;
    }
    memset(w->sums, 0, sizeof(float) * (size_t)(e * LANES));
}

static void one_tile_many(const query_tile *t, many_rows *w, int64_t first, int64_t keys, int64_t lanes) {
    const rk_attention_args *a = t->args;
    const int64_t d = a->key.low + a->key.high, e = a->value.low + a->value.high;
    read_tokens(t, &a->key, a->key_cache, first, keys, w->tokens);
    product(w->tokens, d, 1, w->queries, d, keys, lanes, 0, w->scores);
    for (int64_t m = 0; m < lanes; m += RK_WIDTH) {
        i32v slots;
        memcpy(&slots, w->slots + m, sizeof slots);
        mask_lanes(t, first, keys, slots, w->scores + m);
        const f32v shrink = soften_lanes(keys, w->scores + m, w->highest + m, w->total + m);
        for (int64_t i = 0; i < e; i++)
            rk_store(w->sums + i * LANES + m, rk_load(w->sums + i * LANES + m) * shrink);
    }
    read_tokens(t, &a->value, a->value_cache, first, keys, w->tokens);
    product(w->tokens, 1, e, w->scores, keys, e, lanes, 1, w->sums);
}

static void attend_many(const query_tile *t) {
    const int64_t e = t->args->value.low + t->args->value.high, lanes = rk_round_up(t->rows, PRODUCT_LANES);
    many_rows w;
    start_many(t, &w);
    for (int64_t key = t->first_key; key < t->last_key; key += TILE_KEYS)
        one_tile_many(t, &w, key, rk_min(TILE_KEYS, t->last_key - key), lanes);
    for (int64_t m = 0; m < t->rows; m++) {
        float y[RK_MAX_HEAD];
        const float factor = w.total[m] > 0 ? 1.0f / w.total[m] : 0.0f;
        for (int64_t i = 0; i < e; i++)
            y[i] = w.sums[i * LANES + m] * factor;
        store_row(t, m, y);
    }
}

/* Few rows ---------------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t slots[FEW];
    float highest[FEW], total[FEW];
    float queries[FEW * RK_MAX_HEAD], sums[FEW * RK_MAX_HEAD]; /* [row][column] */
    float keys[TOKENS_SPACE], values[TOKENS_SPACE];
} few_rows;

RK_INLINE float sum_across(f32v v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int i = 0; i < RK_WIDTH; i++)
        sum += v[i];
    return sum;
#endif
}

RK_INLINE float dot_floats(const float *a, const float *b, int64_t d) {
    f32v sum = {0};
    int64_t i = 0;
    for (; i + RK_WIDTH <= d; i += RK_WIDTH)
        sum = rk_fma(rk_load(a + i), rk_load(b + i), sum);
    if (i < d)
        sum = rk_fma(rk_load_some(a + i, d - i), rk_load_some(b + i, d - i), sum);
    return sum_across(sum);
}

/* y = y * shrink + sum_j p[j] v[j], for some vectors of columns, or for one of `count` values. */
RK_INLINE void add_value_block(const float *p, const float *v, int64_t keys, int64_t e, float shrink, const int vectors,
                               int64_t count, float *y) {
    f32v sums[VALUE_VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++)
        sums[i] = rk_load_some(y + i * RK_WIDTH, count) * shrink;
    for (int64_t j = 0; j < keys; j++, v += e)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++)
            sums[i] = rk_fma(rk_splat(p[j]), rk_load_some(v + i * RK_WIDTH, count), sums[i]);
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++)
        rk_store_some(y + i * RK_WIDTH, sums[i], count);
}

static void add_values(const float *p, const float *v, int64_t keys, int64_t e, float shrink, float *y) {
    int64_t i = 0;
    for (; i + VALUE_VECTORS * RK_WIDTH <= e; i += VALUE_VECTORS * RK_WIDTH)
        add_value_block(p, v + i, keys, e, shrink, VALUE_VECTORS, RK_WIDTH, y + i);
    for (; i < e; i += RK_WIDTH)
        add_value_block(p, v + i, keys, e, shrink, 1, rk_min(RK_WIDTH, e - i), y + i);
}

/* Marks the scores of keys that a row in this slot does not see. */
static void mask_row(const query_tile *t, int64_t slot, int64_t first, int64_t keys, float scores[TILE_KEYS]) {
    const int64_t window = t->args->window;
    for (int64_t j = 0; j < TILE_KEYS; j++) {
        const int64_t key = first + j;
        if (j >= keys || key > slot || (window && slot - key >= window) || is_padding(t, key))
            scores[j] = UNSEEN;
    }
}

/* One row and a tile of keys. */
static void one_tile_few(const query_tile *t, few_rows *w, int64_t row, int64_t first, int64_t keys) {
    const rk_attention_args *a = t->args;
    const int64_t d = a->key.low + a->key.high, e = a->value.low + a->value.high;
    float scores[TILE_KEYS];
    for (int64_t j = 0; j < TILE_KEYS; j++)
        scores[j] = j < keys ? dot_floats(w->keys + j * d, w->queries + row * d, d) : 0.0f;
    f32v highest = rk_splat(w->highest[row]), sum = {0};
    for (int64_t j = 0; a->softcap > 0 && j < TILE_KEYS; j += RK_WIDTH)
        rk_store(scores + j, capped(rk_load(scores + j), a->softcap));
    mask_row(t, w->slots[row], first, keys, scores);
    for (int64_t j = 0; j < TILE_KEYS; j += RK_WIDTH)
        highest = rk_highest(highest, rk_load(scores + j));
    const float now = rk_highest_of(highest);
    for (int64_t j = 0; j < TILE_KEYS; j += RK_WIDTH) {
        const f32v score = rk_load(scores + j), p = rk_choose(score > UNSEEN, weight_of(score - now), rk_splat(0));
        sum += p;
        rk_store(scores + j, p);
    }
    const float shrink = weight_of(rk_splat(w->highest[row] - now))[0];
    w->total[row] = w->total[row] * shrink + sum_across(sum);
    w->highest[row] = now;
    add_values(scores, w->values, keys, e, shrink, w->sums + row * e);
}

static void start_few(const query_tile *t, few_rows *w) {
    const rk_attention_args *a = t->args;
    const int64_t d = a->key.low + a->key.high, e = a->value.low + a->value.high;
    for (int64_t row = 0; row < t->rows; row++) {
        w->slots[row] = slot_of_row(t, row);
        w->highest[row] = a->sinks ? a->sinks[head_of(t, row)] : UNSEEN;
        w->total[row] = a->sinks ? 1.0f : 0.0f;
        for (int64_t i = 0; i < d; i++)
            w->queries[row * d + i] = query_of(t, row)[i] * a->scale;
    }
    memset(w->sums, 0, sizeof(float) * (size_t)(t->rows * e));
}

static void attend_few(const query_tile *t) {
    const rk_attention_args *a = t->args;
    const int64_t e = a->value.low + a->value.high;
    few_rows w;
    start_few(t, &w);
    for (int64_t key = t->first_key; key < t->last_key; key += TILE_KEYS) {
        const int64_t keys = rk_min(TILE_KEYS, t->last_key - key);
        read_tokens(t, &a->key, a->key_cache, key, keys, w.keys);
        read_tokens(t, &a->value, a->value_cache, key, keys, w.values);
        for (int64_t row = 0; row < t->rows; row++)
            one_tile_few(t, &w, row, key, keys);
    }
    for (int64_t row = 0; row < t->rows; row++) {
        const float factor = w.total[row] > 0 ? 1.0f / w.total[row] : 0.0f;
        for (int64_t i = 0; i < e; i++)
            w.sums[row * e + i] *= factor;
        store_row(t, row, w.sums + row * e);
    }
}

/* Later rows see more keys: tiles alternate between the first and the last ones, so that equal shares of units are equal work. */
static int64_t tile_at(int64_t place, int64_t tiles) { return place % 2 ? tiles - 1 - place / 2 : place / 2; }

static void attention(const rk_attention_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t tiles = row_tiles(a), heads = a->batch * a->kv_heads;
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t first = tile_at(unit / heads, tiles) * LANES, head = unit % heads;
        query_tile t = {a, head / a->kv_heads, head % a->kv_heads, a->heads / a->kv_heads, first, 0, 0, 0};
        t.rows = rk_min(LANES, rows_of(a) - first);
        t.last_key = slot_of_row(&t, t.rows - 1) + 1;
        if (a->window && slot_of_row(&t, 0) >= a->window)
            t.first_key = slot_of_row(&t, 0) - a->window + 1;
        if (t.rows <= FEW)
            attend_few(&t);
        else
            attend_many(&t);
    }
    rk_leave(mode);
}
