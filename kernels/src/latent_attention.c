/* Latent attention over the packed cache, with a running softmax over tiles of keys: formula and operands in resq_kernels.h.
 *
 * A unit is a few queries, head by head. Queries are turned into the basis of the cached vectors by the weights of keys, so that scores and
 * sums are those of one key head whose keys are [vector | rotary columns] and whose values are the vectors; the sums are turned by the
 * weights of values. Where keys and values have been made already, a unit's queries are those of one head. A tile of keys is read as
 * floats once and serves all rows of a unit. */
#include "latent_weights.h"

#define TURNED_ROWS 8 /* of a unit; many enough for a tile's reading, few enough that the heads of one query make several units */
#define MADE_ROWS 32
#define LATENT_KEYS 32
#define LATENT_COLUMNS (RK_MAX_ENTRY + RK_MAX_HEAD + 2 * PARTIAL) /* of a key; and of a key with its value, where they are made */
#if RK_WIDTH == 16 /* pairs of a row and a key whose sums stay in registers */
#define SCORE_BLOCK 4
#else
#define SCORE_BLOCK 2
#endif
#define VALUE_ROWS 4
#define VALUE_VECTORS 2

typedef struct {
    const rk_latent_attention_args *args;
    int64_t batch, first_row, rows; /* row: head * tokens + token */
} latent_tile;

typedef struct {
    int64_t key_columns, value_columns; /* whole vectors; key_columns: a multiple of PARTIAL */
    int64_t stride, sum_stride;         /* floats from row to row of a tile and of sums; of queries: key_columns */
    row_state state[MADE_ROWS];
    float scores[MADE_ROWS][LATENT_KEYS];
    float queries[MADE_ROWS * 2 * RK_MAX_HEAD + PARTIAL];
    float sums[TURNED_ROWS * (RK_MAX_ENTRY + PARTIAL)];
    float tile[LATENT_KEYS * LATENT_COLUMNS + PARTIAL]; /* [key][stride] */
} latent_space;

static int64_t latent_columns(const rk_head *h) { return h->low + h->high; }
static int64_t tiles_of_head(const rk_latent_attention_args *a) { return (a->tokens + MADE_ROWS - 1) / MADE_ROWS; }

static int64_t latent_tiles(const rk_latent_attention_args *a) {
    return a->expanded ? a->heads * tiles_of_head(a) : (a->heads * a->tokens + TURNED_ROWS - 1) / TURNED_ROWS;
}

static int64_t latent_attention_units(const rk_latent_attention_args *a) { return a->batch * latent_tiles(a); }

static latent_tile latent_tile_of(const rk_latent_attention_args *a, int64_t unit) {
    const int64_t tiles = latent_tiles(a), tile = unit % tiles, each = tiles_of_head(a);
    if (a->expanded) {
        const int64_t first = tile % each * MADE_ROWS;
        return (latent_tile){a, unit / tiles, tile / each * a->tokens + first, rk_min(MADE_ROWS, a->tokens - first)};
    }
    return (latent_tile){a, unit / tiles, tile * TURNED_ROWS, rk_min(TURNED_ROWS, a->heads * a->tokens - tile * TURNED_ROWS)};
}

static int64_t latent_head(const latent_tile *t, int64_t row) { return (t->first_row + row) / t->args->tokens; }
static int64_t latent_slot(const latent_tile *t, int64_t row) { return t->args->start[t->batch] + (t->first_row + row) % t->args->tokens; }

/* Rows -------------------------------------------------------------------------------------------------------------------- */

/* A query as keys are: its own columns, or what they are in the basis of cached vectors, then the rotary ones. */
static void begin_latent_row(const latent_tile *t, latent_space *w, int64_t row) {
    const rk_latent_attention_args *a = t->args;
    const int64_t rotary = latent_columns(&a->rotary), made = a->expanded ? a->own : latent_columns(&a->latent);
    const float *q = a->q + (t->batch * a->heads * a->tokens + t->first_row + row) * (a->own + rotary);
    float *y = w->queries + row * w->key_columns;
    if (a->expanded)
        memcpy(y, q, sizeof(float) * (size_t)a->own);
    else
        turn_into_columns(a, latent_head(t, row) * a->own, a->own, q, y);
    memcpy(y + made, q + a->own, sizeof(float) * (size_t)rotary);
    memset(y + made + rotary, 0, sizeof(float) * (size_t)(w->key_columns - made - rotary));
    memset(w->sums + row * w->sum_stride, 0, sizeof(float) * (size_t)w->sum_stride);
    w->state[row] = (row_state){LOWEST, 0};
}

static void end_latent_row(const latent_tile *t, latent_space *w, int64_t row) {
    const rk_latent_attention_args *a = t->args;
    const int64_t head = latent_head(t, row), token = (t->first_row + row) % a->tokens, latent = latent_columns(&a->latent);
    const float total = w->state[row].total, factor = total > 0 ? 1.0f / total : 0.0f;
    float *sums = w->sums + row * w->sum_stride, *y = a->out + ((t->batch * a->tokens + token) * a->heads + head) * a->values;
    for (int64_t i = 0; i < w->value_columns; i += RK_WIDTH)
        rk_store(sums + i, rk_load(sums + i) * factor);
    if (a->expanded)
        memcpy(y, sums, sizeof(float) * (size_t)a->values);
    else {
        memset(sums + latent, 0, sizeof(float) * (size_t)(w->sum_stride - latent)); /* what the padding of weights is multiplied with */
        turn_into_channels(a, a->heads * a->own + head * a->values, a->values, sums, y);
    }
}

/* Tiles ------------------------------------------------------------------------------------------------------------------- */

static const uint8_t *latent_row(const latent_tile *t, const rk_head *h, const uint8_t *cache, int64_t slot) {
    return cache + (t->batch * t->args->capacity + slot) * rk_head_bytes(h);
}

/* Keys, zeros up to key_columns, and their values: the first columns of keys, or behind them where they are made. */
static void read_latent_tile(const latent_tile *t, latent_space *w, int64_t first, int64_t keys) {
    const rk_latent_attention_args *a = t->args;
    const int64_t rotary = latent_columns(&a->rotary), head = latent_head(t, 0), channels = a->heads * (a->own + a->values);
    for (int64_t j = 0; j < keys; j++) {
        float *key = w->tile + j * w->stride;
        int64_t made = a->own;
        if (a->expanded) {
            const float *from = a->expanded + (t->batch * a->total + first + j) * channels;
            memcpy(key, from + head * a->own, sizeof(float) * (size_t)a->own);
            memcpy(key + w->key_columns, from + a->heads * a->own + head * a->values, sizeof(float) * (size_t)a->values);
        } else {
            made = latent_columns(&a->latent);
            read_row(&a->latent, latent_row(t, &a->latent, a->latent_cache, first + j), key);
        }
        read_row(&a->rotary, latent_row(t, &a->rotary, a->rotary_cache, first + j), key + made);
        memset(key + made + rotary, 0, sizeof(float) * (size_t)(w->key_columns - made - rotary));
    }
}

RK_INLINE void latent_scores(latent_space *w, int64_t row, int64_t key, const int rows, const int keys) {
    const float *q = w->queries + row * w->key_columns, *k = w->tile + key * w->stride;
    rk_lanes sums[SCORE_BLOCK][SCORE_BLOCK] = {{{{{0}}}}};
    for (int64_t c = 0; c < w->key_columns; c += PARTIAL)
#pragma GCC unroll 4
        for (int i = 0; i < PARTIAL / RK_WIDTH; i++)
#pragma GCC unroll 4
            for (int j = 0; j < keys; j++) {
                const f32v column = rk_load(k + j * w->stride + c + i * RK_WIDTH);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++)
                    sums[r][j].part[i] += column * rk_load(q + r * w->key_columns + c + i * RK_WIDTH);
            }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < keys; j++)
            w->scores[row + r][key + j] = rk_total(sums[r][j]);
}

RK_INLINE void latent_score_rows(latent_space *w, int64_t row, int64_t keys, const int rows) {
    int64_t key = 0;
    for (; key + SCORE_BLOCK <= keys; key += SCORE_BLOCK)
        latent_scores(w, row, key, rows, SCORE_BLOCK);
    for (; key < keys; key++)
        latent_scores(w, row, key, rows, 1);
}

/* Scores of a row to weights, those of keys that it does not see to nothing; returns what its earlier sums shrink by. */
static float latent_weigh(const latent_tile *t, latent_space *w, int64_t row, int64_t first, int64_t keys) {
    const rk_latent_attention_args *a = t->args;
    const int32_t last = (int32_t)rk_min(keys - 1, latent_slot(t, row) - first);
    float *scores = w->scores[row];
    uint8_t seen[LATENT_KEYS];
    memset(seen, 1, sizeof seen);
    if (a->mask)
        memcpy(seen, a->mask + t->batch * a->mask_stride + first, (size_t)keys);
    f32v highest = rk_splat(w->state[row].highest);
    for (int j = 0; j < LATENT_KEYS; j += RK_WIDTH) {
        const i32v there = (rk_lane + j <= last) & (rk_load_bytes(seen + j) != 0);
        const f32v score = rk_choose(there, rk_load(scores + j) * (a->scale * LOG2_E), rk_splat(UNSEEN));
        highest = rk_highest(highest, score);
        rk_store(scores + j, score);
    }
    const float now = rk_highest_of(highest), shrink = weight_of_one(w->state[row].highest - now);
    rk_lanes sums = {{{0}}};
    for (int j = 0; j < LATENT_KEYS; j += 16)
        for (int i = 0; i < 16 / RK_WIDTH; i++) {
            const f32v weight = weight_of(rk_load(scores + j + i * RK_WIDTH) - now);
            rk_store(scores + j + i * RK_WIDTH, weight);
            sums.part[i] += weight;
        }
    w->state[row] = (row_state){now, w->state[row].total * shrink + rk_total(sums)};
    return shrink;
}

/* sums = sums * shrink + weights . values, key by key */
RK_INLINE void latent_values(latent_space *w, int64_t row, int64_t column, int64_t keys, const float *values, const float *shrink,
                             const int rows, const int vectors) {
    f32v sums[VALUE_ROWS][VALUE_VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++)
            sums[r][i] = rk_load(w->sums + (row + r) * w->sum_stride + column + i * RK_WIDTH) * shrink[row + r];
    for (int64_t j = 0; j < keys; j++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            const f32v value = rk_load(values + j * w->stride + column + i * RK_WIDTH);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sums[r][i] += value * w->scores[row + r][j];
        }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++)
            rk_store(w->sums + (row + r) * w->sum_stride + column + i * RK_WIDTH, sums[r][i]);
}

RK_INLINE void latent_value_rows(latent_space *w, int64_t row, int64_t keys, const float *values, const float *shrink, const int rows) {
    int64_t column = 0;
    for (; column + VALUE_VECTORS * RK_WIDTH <= w->value_columns; column += VALUE_VECTORS * RK_WIDTH)
        latent_values(w, row, column, keys, values, shrink, rows, VALUE_VECTORS);
    for (; column < w->value_columns; column += RK_WIDTH)
        latent_values(w, row, column, keys, values, shrink, rows, 1);
}

static void attend_latent_tile(const latent_tile *t, latent_space *w, int64_t first, int64_t keys) {
    const float *values = w->tile + (t->args->expanded ? w->key_columns : 0);
    float shrink[MADE_ROWS];
    int64_t row = 0;
    read_latent_tile(t, w, first, keys);
    for (; row + SCORE_BLOCK <= t->rows; row += SCORE_BLOCK)
        latent_score_rows(w, row, keys, SCORE_BLOCK);
    for (; row < t->rows; row++)
        latent_score_rows(w, row, keys, 1);
    for (row = 0; row < t->rows; row++)
        shrink[row] = latent_weigh(t, w, row, first, keys);
    for (row = 0; row + VALUE_ROWS <= t->rows; row += VALUE_ROWS)
        latent_value_rows(w, row, keys, values, shrink, VALUE_ROWS);
    for (; row < t->rows; row++)
        latent_value_rows(w, row, keys, values, shrink, 1);
}

static void latent_attention(const rk_latent_attention_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t latent = latent_columns(&a->latent), rotary = latent_columns(&a->rotary);
    latent_space w;
    w.key_columns = rk_round_up((a->expanded ? a->own : latent) + rotary, PARTIAL);
    w.value_columns = rk_round_up(a->expanded ? a->values : latent, RK_WIDTH);
    w.stride = w.key_columns + (a->expanded ? rk_round_up(a->values, PARTIAL) : 0);
    w.sum_stride = w.value_columns + (a->expanded ? 0 : PARTIAL); /* room for the padding of weights */
    for (int64_t unit = begin; unit < end; unit++) {
        const latent_tile t = latent_tile_of(a, unit);
        int64_t last = 0;
        for (int64_t row = 0; row < t.rows; row++) {
            begin_latent_row(&t, &w, row);
            last = latent_slot(&t, row) + 1 > last ? latent_slot(&t, row) + 1 : last;
        }
        for (int64_t key = 0; key < last; key += LATENT_KEYS)
            attend_latent_tile(&t, &w, key, rk_min(LATENT_KEYS, last - key));
        for (int64_t row = 0; row < t.rows; row++)
            end_latent_row(&t, &w, row);
    }
    rk_leave(mode);
}
