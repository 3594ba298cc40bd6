/* Attention over the packed cache, with a running softmax over tiles of keys: formula and operands in resq_kernels.h.
 *
 * The rows of a unit are queries of the heads that share a key head, token by token. Where few queries see many keys, as in decoding,
 * the keys are cut into chunks, each a unit; whoever finishes a head's last chunk puts its results together, in the same order always. */
#include "attention_few.h"

static int64_t key_chunks(const rk_attention_args *a) { return a->scratch ? chunks_of_keys(a) : 1; }

static int64_t attention_units(const rk_attention_args *a) { return a->batch * a->kv_heads * row_tiles(a) * key_chunks(a); }

static int64_t columns_of_head(const rk_head *h) { return h->low + h->high; }

static const float *query_of(const query_tile *t, int64_t row) {
    const rk_attention_args *a = t->args;
    return a->q + ((t->batch * a->tokens + token_of(t, row)) * a->heads + head_of(t, row)) * columns_of_head(&a->key);
}

/* Rows -------------------------------------------------------------------------------------------------------------------- */

/* values = values * shrink + weight * v */
RK_INLINE void add_value(const float *v, float weight, float shrink, int64_t columns, float *values) {
    for (int64_t i = 0; i < columns; i += RK_WIDTH) {
        const int64_t count = rk_min(RK_WIDTH, columns - i);
        rk_store_some(values + i, rk_load_some(values + i, count) * shrink + weight * rk_load_some(v + i, count), count);
    }
}

static float dot_of(const float *a, const float *b, int64_t columns) {
    float products[RK_MAX_HEAD];
    for (int64_t i = 0; i < columns; i++)
        products[i] = a[i] * b[i];
    return rk_sum_of(products, columns, 0, 0);
}

/* What a row begins with: in the first chunk the sink and the prefix, in others nothing. */
static row_state begin_values(const query_tile *t, int64_t row, float *values) {
    const rk_attention_args *a = t->args;
    const int64_t d = columns_of_head(&a->key), e = columns_of_head(&a->value);
    row_state s = {LOWEST, 0};
    memset(values, 0, sizeof(float) * (size_t)e);
    if (t->chunk)
        return s;
    if (a->sinks)
        s = (row_state){a->sinks[head_of(t, row)] * LOG2_E, 1};
    for (int64_t p = 0; p < a->prefix; p++) {
        const int64_t at = t->kv_head * a->prefix + p;
        const float product = dot_of(query_of(t, row), a->prefix_keys + at * d, d) * score_factor(a);
        const float score = a->softcap > 0 ? capped(rk_splat(product), a->softcap)[0] : product;
        const float now = score > s.highest ? score : s.highest;
        const float shrink = weight_of_one(s.highest - now), weight = weight_of_one(score - now);
        add_value(a->prefix_values + at * e, weight, shrink, e, values);
        s = (row_state){now, s.total * shrink + weight};
    }
    return s;
}

static void begin_row(const query_tile *t, attention_space *w, int64_t row) {
    float values[RK_MAX_HEAD], *sums = w->sums + row * COLUMN_SPACE;
    w->state[row] = begin_values(t, row, values);
    memcpy(sums, values, sizeof(float) * (size_t)w->value.width[0]);
    memcpy(sums + w->value.column_at[1], values + w->value.width[0], sizeof(float) * (size_t)w->value.width[1]);
}

static void code_query(const query_tile *t, attention_space *w, int64_t row) {
    const float *q = query_of(t, row), factor = score_factor(t->args);
    int8_t *codes = w->queries + row * QUERY_SPACE;
    w->codes[row][0] = code_low(q, w->key.width[0], w->key.quads[0], codes);
    w->codes[row][1] = code_high(q + w->key.width[0], w->key.width[1], w->key.quads[1], codes + 8 * w->key.quads[0]);
    w->codes[row][0].scale *= factor, w->codes[row][1].scale *= factor;
    w->slope[row] = t->args->slopes ? t->args->slopes[head_of(t, row)] * LOG2_E : 0;
}

/* What a chunk leaves for the last one to put together: for every row its state and values. */
static float *chunk_row(const query_tile *t, int64_t chunk, int64_t row) {
    const rk_attention_args *a = t->args;
    const int64_t heads = a->batch * a->kv_heads, head = t->batch * a->kv_heads + t->kv_head;
    float *results = (float *)((int32_t *)a->scratch + heads);
    return results + ((head * t->chunks + chunk) * t->rows + row) * (columns_of_head(&a->value) + 2);
}

/* The result of one row to where it belongs. */
static void store_row(const query_tile *t, int64_t row, row_state s, const float *values) {
    const rk_attention_args *a = t->args;
    const int64_t token = t->batch * a->tokens + token_of(t, row), head = head_of(t, row), e = columns_of_head(&a->value);
    const float factor = s.total > 0 ? 1.0f / s.total : 0.0f;
    float space[RK_MAX_HEAD], *y = space;
    for (int64_t i = 0; i < e; i += RK_WIDTH)
        rk_store_some(y + i, rk_load_some(values + i, e - i) * factor, e - i);
    if (a->out)
        memcpy(a->out + (token * a->heads + head) * e, y, sizeof(float) * (size_t)e);
    for (int i = 0; i < a->codes.parts; y += a->codes.part[i++].width)
        quantize_run(&a->codes, i, (int)head, token, i * a->heads + head, a->codes.parts * a->heads, y);
}

static void end_row(const query_tile *t, const attention_space *w, int64_t row) {
    const float *sums = w->sums + row * COLUMN_SPACE;
    float values[RK_MAX_HEAD + 2];
    memcpy(values, sums, sizeof(float) * (size_t)w->value.width[0]);
    memcpy(values + w->value.width[0], sums + w->value.column_at[1], sizeof(float) * (size_t)w->value.width[1]);
    if (t->chunks == 1) {
        store_row(t, row, w->state[row], values);
        return;
    }
    float *at = chunk_row(t, t->chunk, row);
    at[0] = w->state[row].highest, at[1] = w->state[row].total;
    memcpy(at + 2, values, sizeof(float) * (size_t)(w->value.width[0] + w->value.width[1]));
}

/* The results of all chunks of one row. */
static void combine_row(const query_tile *t, int64_t row) {
    const int64_t e = columns_of_head(&t->args->value);
    float values[RK_MAX_HEAD] = {0};
    row_state s = {LOWEST, 0};
    for (int64_t c = 0; c < t->chunks; c++) {
        const float highest = chunk_row(t, c, row)[0];
        s.highest = highest > s.highest ? highest : s.highest;
    }
    for (int64_t c = 0; c < t->chunks; c++) {
        const float *from = chunk_row(t, c, row), weight = weight_of_one(from[0] - s.highest);
        s.total += from[1] * weight;
        add_value(from + 2, weight, 1.0f, e, values);
    }
    store_row(t, row, s, values);
}

/* Tiles ------------------------------------------------------------------------------------------------------------------- */

static cache_reader open_cache(const query_tile *t, const rk_head *h, const uint8_t *cache, int64_t slot) {
    const rk_attention_args *a = t->args;
    const int64_t index = (t->batch * a->kv_heads + t->kv_head) * a->capacity + slot, bytes = rk_head_bytes(h);
    return (cache_reader){cache + index * bytes, bytes, (a->batch * a->kv_heads * a->capacity - index) * bytes};
}

static const uint8_t *mask_at(const query_tile *t, int64_t slot) {
    const rk_attention_args *a = t->args;
    return a->mask ? a->mask + t->batch * a->mask_stride + slot : NULL;
}

/* Whether all rows see all of these keys. */
static int all_seen(const query_tile *t, int64_t first, int64_t keys) {
    const uint8_t *mask = mask_at(t, first);
    const int64_t window = t->args->window;
    if (first + keys - 1 > slot_of_row(t, 0) || (window && slot_of_row(t, t->rows - 1) - first >= window) || keys % 16)
        return 0;
    return !mask || !memchr(mask, 0, (size_t)keys);
}

/* Some rows with a tile of keys. Each step goes over all rows, so that no row waits for its own last step. */
RK_INLINE void attend_block(const query_tile *t, attention_space *w, int64_t row, int64_t first, int64_t keys, int seen, const int rows) {
    const rk_attention_args *a = t->args;
    const int64_t whole = rk_round_up(keys, 16);
    if (TAKES_CACHED && w->key_rows.row)
        cached_score_rows(w, keys, rows);
    else
        score_rows(w, row, keys, rows);
    for (int r = 0; r < rows; r++) {
        const int64_t slot = slot_of_row(t, row + r);
        for (int64_t j = 0; a->softcap > 0 && j < whole; j += RK_WIDTH)
            rk_store(w->scores[r] + j, capped(rk_load(w->scores[r] + j), a->softcap));
        for (int64_t j = 0; a->slopes && j < whole; j += RK_WIDTH) {
            const f32v distance = __builtin_convertvector(rk_lane + (int32_t)(first + j - slot), f32v);
            rk_store(w->scores[r] + j, rk_load(w->scores[r] + j) + distance * w->slope[row + r]);
        }
        if (!seen)
            mask_row(t, w, w->scores[r], slot, first, keys);
    }
    if (TAKES_CACHED && w->value_rows) {
        weigh_few(w, keys, rows);
        cached_value_rows(w, keys, rows);
        return;
    }
    raise_highest(w, row, whole, rows);
    for (int r = 0; r < rows; r++)
        weigh(w, row, r, whole);
    for (int r = 0; r < rows; r++)
        for (int part = 0; part < 2; part++)
            if (w->value.width[part])
                code_weights(w, r, part, whole);
    for (int part = 0; part < 2; part++)
        if (w->value.width[part] && part == 0)
            value_rows(w, 0, row, keys, rows);
        else if (w->value.width[part])
            value_rows(w, 1, row, keys, rows);
}

/* Reads a tile of keys and values, unless they are taken from the cache. */
static void read_tile(const query_tile *t, attention_space *w, int64_t first, int64_t keys) {
    const rk_attention_args *a = t->args;
    const cache_reader k = open_cache(t, &a->key, a->key_cache, first), v = open_cache(t, &a->value, a->value_cache, first);
    w->key_rows = k;
    if (!takes_cached_keys(t, &w->key)) {
        w->key_rows.row = NULL;
        read_keys(w->key, k, keys, w->keys, &w->key_scales);
    }
    if (takes_cached_values(t, &w->value, &v, keys)) {
        w->value_rows = v.row, w->value_bytes = v.bytes, w->next_values = v.row + TILE_KEYS * v.bytes;
    } else {
        w->value_rows = NULL;
        read_values(w->value, v, keys, w->values, &w->value_scales);
    }
}

static void attend_tile(const query_tile *t, attention_space *w, int64_t first, int64_t keys) {
    const rk_attention_args *a = t->args;
    const int seen = all_seen(t, first, keys);
    read_tile(t, w, first, keys);
    if (a->mask && !seen)
        memcpy(w->mask, mask_at(t, first), (size_t)keys);
    for (int64_t row = 0; row < t->rows; row += BLOCK_ROWS)
        switch (t->rows - row) {
        case 1: attend_block(t, w, row, first, keys, seen, 1); break;
        case 2: attend_block(t, w, row, first, keys, seen, 2); break;
        case 3: attend_block(t, w, row, first, keys, seen, 3); break;
        default: attend_block(t, w, row, first, keys, seen, 4); break;
        }
}

static void attend(const query_tile *t, attention_space *w, int same_queries) {
    for (int64_t row = 0; row < t->rows && !same_queries; row++)
        code_query(t, w, row);
    for (int64_t row = 0; row < t->rows; row++)
        begin_row(t, w, row);
    for (int64_t key = t->first_key; key < t->last_key; key += TILE_KEYS)
        attend_tile(t, w, key, rk_min(TILE_KEYS, t->last_key - key));
    for (int64_t row = 0; row < t->rows; row++)
        end_row(t, w, row);
}

/* Units ------------------------------------------------------------------------------------------------------------------- */

/* Later rows see more keys: tiles alternate between the first and the last ones, so that equal shares of units are equal work. */
static int64_t tile_at(int64_t place, int64_t tiles) { return place % 2 ? tiles - 1 - place / 2 : place / 2; }

static query_tile tile_of(const rk_attention_args *a, int64_t unit) {
    const int64_t chunks = key_chunks(a), heads = a->batch * a->kv_heads;
    const int64_t head = chunks > 1 ? unit / chunks : unit % heads, place = chunks > 1 ? 0 : unit / heads;
    const int64_t first_row = tile_at(place, row_tiles(a)) * LANES;
    query_tile t = {a, head / a->kv_heads, head % a->kv_heads, a->heads / a->kv_heads, first_row, 0, 0, 0, 0, chunks};
    t.rows = rk_min(LANES, rows_of(a) - first_row);
    const int64_t first = first_key_of(a, slot_of_row(&t, 0)), last = slot_of_row(&t, t.rows - 1) + 1;
    const int64_t each = rk_round_up((last - first + chunks - 1) / chunks, 16);
    t.chunk = chunks > 1 ? unit % chunks : 0;
    t.first_key = rk_min(first + t.chunk * each, last);
    t.last_key = chunks > 1 ? rk_min(t.first_key + each, last) : last;
    return t;
}

static void finish_chunk(const query_tile *t) {
    int32_t *done = (int32_t *)t->args->scratch + t->batch * t->args->kv_heads + t->kv_head;
    if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) < t->chunks)
        return;
    for (int64_t row = 0; row < t->rows; row++)
        combine_row(t, row);
}

static void attention(const rk_attention_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    attention_space w;
    w.key = layout_of(&a->key), w.value = layout_of(&a->value);
    for (int64_t unit = begin; unit < end; unit++) {
        const query_tile t = tile_of(a, unit);
        attend(&t, &w, t.chunk > 0 && unit > begin); /* the chunk before had the same queries */
        if (t.chunks > 1)
            finish_chunk(&t);
    }
    rk_leave(mode);
}
