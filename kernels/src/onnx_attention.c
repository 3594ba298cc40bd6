/* The operators of attention. mask is bool [B, T], T all tokens, the S new ones included. Where past has fewer than T rows, present is
 * a copy with S more; where it has room for T, as a buffer that past and present share, rows are written in place. */
#include "onnx_call.h"

rk_head key_head(const node *n) {
    return (rk_head){(int32_t)n->low_width, (int32_t)n->high_width, (int32_t)n->key_low_bits, (int32_t)n->key_high_bits};
}

rk_head value_head(const node *n) {
    return (rk_head){(int32_t)n->value_low_width, (int32_t)n->value_high_width, (int32_t)n->value_low_bits, (int32_t)n->value_high_bits};
}

static void require_cache(call *c, const tensor *t, int64_t batch, const rk_head *head, const char *what) {
    require(c, t->rank == 4 && t->dims[0] == batch && t->dims[1] == c->n->kv_heads && t->dims[3] == rk_head_bytes(head), what,
            "[batch, kv_heads, tokens, bytes of a packed row]");
}

tensor present_of(call *c, size_t output, const tensor *past, int64_t total) {
    tensor present = *past;
    int64_t *dims = present.dims;
    dims[2] = past->dims[2] < total ? total : past->dims[2];
    present.data = make_output(c, output, dims, 4);
    if (!present.data || present.data == past->data)
        return present;
    const size_t before = (size_t)(past->dims[2] * dims[3]), after = (size_t)(dims[2] * dims[3]);
    for (int64_t i = 0; i < dims[0] * dims[1]; i++)
        memcpy((uint8_t *)present.data + (size_t)i * after, (const uint8_t *)past->data + (size_t)i * before, before);
    return present;
}

/* qkv [B, S, heads side by side], cos, sin [B or 1, S, R], past_key, past_value, mask, basis?, q_norm?, k_norm?
 * -> made: q [B, S, H, D], present_key, present_value, the cache as outputs 1 and 2 */
static void rope_and_append(call *c, tensor made[3]) {
    const node *n = c->n;
    const tensor *qkv = &c->in[0], *cos = &c->in[1], *sin = &c->in[2], *mask = &c->in[5], *basis = &c->in[6];
    rk_rope_cache_args a = {.heads = n->heads, .kv_heads = n->kv_heads, .key = key_head(n), .value = value_head(n)};
    const int64_t d = a.key.low + a.key.high, e = a.value.low + a.value.high, columns = n->heads * d + n->kv_heads * (d + e);
    require(c, qkv->rank == 3 && qkv->dims[2] == columns, "qkv", "[batch, tokens, queries, keys and values of all heads]");
    require(c, mask->rank == 2 && qkv->rank == 3 && mask->dims[0] == qkv->dims[0] && mask->dims[1] >= qkv->dims[1], "mask",
            "[batch, all tokens]");
    require(c, cos->rank == 3 && sin->rank == 3 && !memcmp(cos->dims, sin->dims, sizeof(int64_t) * 3) && cos->dims[2] % 2 == 0 &&
                   cos->dims[2] <= d && cos->dims[1] == qkv->dims[1] && (cos->dims[0] == 1 || cos->dims[0] == qkv->dims[0]),
            "cos or sin", "[batch or 1, tokens, rotary columns]");
    require_cache(c, &c->in[3], qkv->dims[0], &a.key, "past_key");
    require_cache(c, &c->in[4], qkv->dims[0], &a.value, "past_value");
    require(c, !basis->data || size_of(basis) == d * d || size_of(basis) == n->kv_heads * d * d, "basis", "[1 or kv_heads, D, D]");
    require_size(c, &c->in[7], d, "q_norm");
    require_size(c, &c->in[8], d, "k_norm");
    if (c->status)
        return;
    const int64_t total = mask->dims[1], past = c->in[3].dims[2];
    a.batch = qkv->dims[0], a.tokens = qkv->dims[1];
    require(c, c->in[4].dims[2] == past && (past >= total || past + a.tokens == total), "past",
            "as many rows as the mask has tokens before the new ones, or room for all of them");
    if (c->status)
        return;
    int32_t start[a.batch + 1];
    for (int64_t b = 0; b < a.batch; b++)
        start[b] = (int32_t)(total - a.tokens);
    a.start = start;
    a.q = qkv->data, a.k = a.q + n->heads * d, a.v = a.k + n->kv_heads * d;
    a.q_stride = a.k_stride = a.v_stride = columns;
    a.cos = cos->data, a.sin = sin->data, a.rotary = cos->dims[2];
    a.rotary_batch_stride = cos->dims[0] == 1 ? 0 : a.tokens * a.rotary;
    a.basis = basis->data, a.bases = basis->data && size_of(basis) > d * d ? n->kv_heads : 1;
    a.q_norm = c->in[7].data, a.k_norm = c->in[8].data, a.epsilon = n->epsilon, a.clip = n->cache_clip;
    made[0] = (tensor){NULL, {a.batch, a.tokens, n->heads, d}, 4, ORT_FLOAT};
    made[0].data = n->fused ? make_room(c, 4 * size_of(&made[0])) : make_output(c, 0, made[0].dims, 4);
    made[1] = present_of(c, 1, &c->in[3], total);
    made[2] = present_of(c, 2, &c->in[4], total);
    a.q_out = made[0].data, a.key_cache = made[1].data, a.value_cache = made[2].data;
    a.capacity = made[1].dims[2];
    RUN(c, rope_cache, &a, 6);
}

void op_rope_cache(call *c) {
    tensor made[3];
    rope_and_append(c, made);
}

/* x [B, G, S, columns], past, mask -> the floats of all rows [B, G, T, columns], present */
void op_cache_image(call *c) {
    const node *n = c->n;
    const tensor *x = &c->in[0], *past = &c->in[1], *mask = &c->in[2];
    rk_cache_image_args a = {.head = key_head(n), .clip = n->cache_clip};
    const int64_t columns = a.head.low + a.head.high;
    require(c, x->rank == 4 && x->dims[3] == columns && columns <= RK_MAX_ENTRY, "x", "[batch, heads, tokens, columns], at most 1024 of them");
    require(c, past->rank == 4 && x->rank == 4 && past->dims[0] == x->dims[0] && past->dims[1] == x->dims[1] &&
                   past->dims[3] == rk_head_bytes(&a.head), "past", "[batch, heads, tokens, bytes of a packed row]");
    require(c, mask->rank == 2 && x->rank == 4 && mask->dims[0] == x->dims[0] && mask->dims[1] >= x->dims[2], "mask", "[batch, all tokens]");
    if (c->status)
        return;
    a.batch = x->dims[0], a.heads = x->dims[1], a.tokens = x->dims[2], a.total = mask->dims[1];
    require(c, past->dims[2] >= a.total || past->dims[2] + a.tokens == a.total, "past",
            "as many rows as the mask has tokens before the new ones, or room for all of them");
    if (c->status)
        return;
    int32_t start[a.batch + 1];
    for (int64_t b = 0; b < a.batch; b++)
        start[b] = (int32_t)(a.total - a.tokens);
    const int64_t dims[4] = {a.batch, a.heads, a.total, columns};
    a.out = make_output(c, 0, dims, 4);
    const tensor present = present_of(c, 1, past, a.total);
    a.x = x->data, a.start = start, a.cache = present.data, a.capacity = present.dims[2];
    RUN(c, cache_image, &a, 16);
}

/* Room for results of chunks of keys, or NULL: then a key head is one unit. */
static void *make_scratch(call *c, const rk_attention_args *a) {
    const int64_t bytes = c->status ? 0 : rk_attention_scratch(a);
    void *scratch = bytes ? make_room(c, bytes) : NULL;
    if (scratch)
        memset(scratch, 0, (size_t)(a->batch * a->kv_heads) * 4);
    return scratch;
}

/* prefix_key, prefix_value [1, G, P, columns]: tokens that every query sees. */
static void read_prefix(call *c, const tensor *keys, const tensor *values, rk_attention_args *a) {
    const int64_t d = a->key.low + a->key.high, e = a->value.low + a->value.high;
    if (!keys->data || !values->data) {
        require(c, !keys->data && !values->data, "prefix", "keys and values, or neither");
        return;
    }
    a->prefix = keys->rank == 4 ? keys->dims[2] : 0;
    a->prefix_keys = keys->data, a->prefix_values = values->data;
    require(c, a->prefix > 0 && size_of(keys) == a->kv_heads * a->prefix * d, "prefix_key", "[1, kv_heads, tokens, D]");
    require(c, size_of(values) == a->kv_heads * a->prefix * e, "prefix_value", "[1, kv_heads, tokens, columns of values]");
}

/* q, present_key, present_value, mask, sinks?, prefix_key?, prefix_value?, slopes? -> float [B, S, H * columns], or codes. low_bits,
 * high_bits and the clips are those of the result: reading a cache needs only the widths. */
static void attend(call *c, const tensor *in, rk_codes *codes) {
    const node *n = c->n;
    const tensor *q = &in[0], *keys = &in[1], *values = &in[2], *mask = &in[3];
    rk_attention_args a = {.heads = n->heads, .kv_heads = n->kv_heads, .key = key_head(n), .value = value_head(n)};
    require(c, q->rank == 4 && q->dims[2] == n->heads && q->dims[3] == a.key.low + a.key.high, "q", "[batch, tokens, heads, D]");
    require(c, mask->rank == 2 && q->rank == 4 && mask->dims[0] == q->dims[0] && mask->dims[1] >= q->dims[1], "mask",
            "[batch, all tokens]");
    require_cache(c, keys, q->dims[0], &a.key, "present_key");
    require_cache(c, values, q->dims[0], &a.value, "present_value");
    require(c, keys->dims[2] == values->dims[2] && keys->dims[2] >= mask->dims[1], "present", "a row for every token of the mask");
    require_size(c, &in[4], n->heads, "sinks");
    require_size(c, &in[7], n->heads, "slopes");
    read_prefix(c, &in[5], &in[6], &a);
    if (c->status)
        return;
    a.batch = q->dims[0], a.tokens = q->dims[1];
    int32_t start[a.batch + 1];
    for (int64_t b = 0; b < a.batch; b++)
        start[b] = (int32_t)(mask->dims[1] - a.tokens);
    a.start = start;
    a.q = q->data, a.key_cache = keys->data, a.value_cache = values->data, a.capacity = keys->dims[2];
    a.mask = mask->data, a.mask_stride = mask->dims[1];
    a.scale = n->scale, a.softcap = n->softcap, a.window = n->window, a.sinks = in[4].data, a.slopes = in[7].data;
    const int64_t dims[3] = {a.batch, a.tokens, n->heads * (a.value.low + a.value.high)};
    if (codes) {
        node as_parts = *n;
        as_parts.low_width = n->result_low_width, as_parts.high_width = n->result_high_width;
        as_parts.low_groups = as_parts.high_groups = n->heads;
        const node *kept = c->n;
        c->n = &as_parts;
        make_codes(c, dims, 2, &a.codes);
        c->n = kept;
    } else
        a.out = make_output(c, 0, dims, 3);
    a.scratch = make_scratch(c, &a);
    RUN(c, attention, &a, 1);
    if (codes)
        *codes = a.codes;
}

void op_attention(call *c) { attend(c, c->in, NULL); }

void op_attention_quantize(call *c) {
    rk_codes codes;
    attend(c, c->in, &codes);
}

/* Operands of rope_and_append, sinks?, prefix_key?, prefix_value?, slopes?, then those of `multiply` -> y, present_key, present_value */
void op_attention_linear(call *c) {
    rk_codes codes = {0};
    tensor made[8];
    rope_and_append(c, made);
    if (c->status)
        return;
    made[3] = c->in[5];
    memcpy(made + 4, c->in + 9, 4 * sizeof(tensor));
    attend(c, made, &codes);
    multiply(c, &codes, made[0].dims, 2, c->in + 13);
}
