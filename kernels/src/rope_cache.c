/* q/k norm, rotary embedding, the basis of keys, and appending of keys and values to the packed cache: formulas in resq_kernels.h. */
#include <math.h>

#include "cache_rows.h"

static int64_t rope_cache_units(const rk_rope_cache_args *a) { return a->batch * a->tokens * (a->heads + 2 * a->kv_heads); }

static void norm_head(const float *weight, float epsilon, int64_t columns, float *x) {
    const float factor = 1.0f / sqrtf(rk_sum_of(x, columns, 0, 1) / (float)columns + epsilon);
    for (int64_t i = 0; i < columns; i++)
        x[i] = x[i] * factor * weight[i];
}

/* Columns i and i + rotary / 2 turn by one angle. */
static void rotate_head(const float *cos, const float *sin, int64_t rotary, float *x) {
    const int64_t half = rotary / 2;
    int64_t i = 0;
    for (; i + RK_WIDTH <= half; i += RK_WIDTH) {
        const f32v a = rk_load(x + i), b = rk_load(x + i + half);
        rk_store(x + i, a * rk_load(cos + i) - b * rk_load(sin + i));
        rk_store(x + i + half, b * rk_load(cos + i + half) + a * rk_load(sin + i + half));
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* y = x U; sums in the order of the rows of U */
#define BASIS_VECTORS 4
static void turn_head(const float *u, int64_t d, const float *x, float *y) {
    int64_t at = 0;
    for (; at + BASIS_VECTORS * RK_WIDTH <= d; at += BASIS_VECTORS * RK_WIDTH) {
        f32v sums[BASIS_VECTORS] = {{0}};
        for (int64_t i = 0; i < d; i++)
#pragma GCC unroll 4
            for (int j = 0; j < BASIS_VECTORS; j++)
                sums[j] += x[i] * rk_load(u + i * d + at + j * RK_WIDTH);
#pragma GCC unroll 4
        for (int j = 0; j < BASIS_VECTORS; j++)
            rk_store(y + at + j * RK_WIDTH, sums[j]);
    }
    for (; at < d; at += RK_WIDTH) {
        const int64_t count = rk_min(RK_WIDTH, d - at);
        f32v sum = {0};
        for (int64_t i = 0; i < d; i++)
            sum += x[i] * rk_load_some(u + i * d + at, count);
        rk_store_some(y + at, sum, count);
    }
}

/* A query or key head, as scores need it. key_head: the one it belongs to. */
static void prepare_head(const rk_rope_cache_args *a, const float *x, const float *norm, int64_t batch, int64_t token,
                         int64_t key_head, float *y) {
    const int64_t d = a->key.low + a->key.high, at = batch * a->rotary_batch_stride + token * a->rotary;
    float space[RK_MAX_HEAD];
    float *head = a->basis ? space : y;
    memcpy(head, x, sizeof(float) * (size_t)d);
    if (norm)
        norm_head(norm, a->epsilon, d, head);
    if (a->rotary)
        rotate_head(a->cos + at, a->sin + at, a->rotary, head);
    if (a->basis)
        turn_head(a->basis + (a->bases > 1 ? key_head * d * d : 0), d, head, y);
}

static uint8_t *slot_of(const rk_rope_cache_args *a, uint8_t *cache, const rk_head *h, int64_t batch, int64_t head, int64_t token) {
    return cache + ((batch * a->kv_heads + head) * a->capacity + a->start[batch] + token) * rk_head_bytes(h);
}

static void one_head(const rk_rope_cache_args *a, int64_t batch, int64_t token, int64_t head) {
    const int64_t row = batch * a->tokens + token, d = a->key.low + a->key.high, e = a->value.low + a->value.high;
    if (head < a->heads) {
        float *y = a->q_out + (row * a->heads + head) * d;
        prepare_head(a, a->q + row * a->q_stride + head * d, a->q_norm, batch, token, head / (a->heads / a->kv_heads), y);
        return;
    }
    head -= a->heads;
    if (head < a->kv_heads) {
        float y[RK_MAX_HEAD];
        prepare_head(a, a->k + row * a->k_stride + head * d, a->k_norm, batch, token, head, y);
        write_row(&a->key, y, a->clip, slot_of(a, a->key_cache, &a->key, batch, head, token));
        return;
    }
    head -= a->kv_heads;
    write_row(&a->value, a->v + row * a->v_stride + head * e, a->clip, slot_of(a, a->value_cache, &a->value, batch, head, token));
}

static void rope_cache(const rk_rope_cache_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t heads = a->heads + 2 * a->kv_heads;
    for (int64_t unit = begin; unit < end; unit++)
        one_head(a, unit / heads / a->tokens, unit / heads % a->tokens, unit % heads);
    rk_leave(mode);
}
