/* The kernels as ONNX Runtime custom operators of the domain "resq": RegisterCustomOps is what register_custom_ops_library and
 * onnxruntime-genai call. Operands of every operator: the table at the end. Codes are four tensors: low int8 [..., row bytes], high
 * int8, scale float [..., runs], zero_point int32; a part that is not there has a width of 0 and a tensor without columns.
 *
 * The cache: mask is bool [B, T], T all tokens, the S new ones included. Where past has fewer than T rows, present is a copy with S
 * more; where it has room for T, as a buffer that past and present share, rows are written in place. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "onnxruntime_abi.h"
#include "resq_kernels.h"

#define MAX_DIMENSIONS 6
#define MAX_INPUTS 10
#define RK_PUBLIC __attribute__((visibility("default")))

typedef struct {
    void *data; /* NULL: an optional input that is absent */
    int64_t dims[MAX_DIMENSIONS];
    size_t rank;
} tensor;

/* A node's attributes; what an operator does not have is 0. */
typedef struct {
    OrtApi api;
    int64_t threads;
    int64_t norm, activation, groups, heads, kv_heads, window, stacked;
    int64_t low_width, high_width, low_bits, high_bits, value_low_width, value_high_width, value_low_bits, value_high_bits;
    float epsilon, low_clip, high_clip, scale, softcap;
    rk_transform low_transform, high_transform;
} node;

typedef struct {
    const node *n;
    OrtKernelContext *context;
    OrtStatus *status;
    tensor in[MAX_INPUTS];
} call;

/* Errors: the first one of a call is kept; ONNX Runtime adds the node's name. ----------------------------------------------- */

static void fail(call *c, const char *what, const char *expected) {
    char text[256];
    if (c->status)
        return;
    snprintf(text, sizeof text, "resq: %s does not fit: expected %s", what, expected);
    c->status = ORT_CREATE_STATUS(c->n->api)(ORT_INVALID_ARGUMENT, text);
}

static void require(call *c, int fits, const char *what, const char *expected) {
    if (!fits)
        fail(c, what, expected);
}

static int keep(call *c, OrtStatus *status) {
    if (status && c->status)
        ORT_RELEASE_STATUS(c->n->api)(status);
    else if (status)
        c->status = status;
    return c->status == NULL;
}

/* Tensors ------------------------------------------------------------------------------------------------------------------ */

static void read_input(call *c, size_t index, tensor *t) {
    const OrtApi api = c->n->api;
    const OrtValue *value = NULL;
    OrtTensorInfo *info = NULL;
    memset(t, 0, sizeof *t);
    if (!keep(c, ORT_INPUT(api)(c->context, index, &value)) || !value || !keep(c, ORT_TENSOR_INFO(api)(value, &info)))
        return;
    if (keep(c, ORT_DIMENSIONS_COUNT(api)(info, &t->rank))) {
        require(c, t->rank <= MAX_DIMENSIONS, "an input", "at most 6 dimensions");
        if (!c->status)
            keep(c, ORT_DIMENSIONS(api)(info, t->dims, t->rank));
    }
    ORT_RELEASE_TENSOR_INFO(api)(info);
    keep(c, ORT_DATA(api)((OrtValue *)value, &t->data));
}

static void *make_output(call *c, size_t index, const int64_t *dims, size_t rank) {
    OrtValue *value = NULL;
    void *data = NULL;
    if (!c->status && keep(c, ORT_OUTPUT(c->n->api)(c->context, index, dims, rank, &value)))
        keep(c, ORT_DATA(c->n->api)(value, &data));
    return data;
}

static int64_t size_of(const tensor *t) {
    int64_t size = 1;
    for (size_t i = 0; i < t->rank; i++)
        size *= t->dims[i];
    return size;
}

static int64_t last_of(const tensor *t) { return t->rank ? t->dims[t->rank - 1] : 1; }
static int64_t rows_of(const tensor *t) { return last_of(t) ? size_of(t) / last_of(t) : 0; }

/* An optional operand of so many elements. */
static void require_size(call *c, const tensor *t, int64_t size, const char *what) {
    require(c, !t->data || size_of(t) == size, what, "as many elements as the other operands ask for");
}

/* Work --------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    void (*kernel)(const void *, int64_t, int64_t);
    const void *args;
    int64_t units, pieces;
} work;

static void run_piece(void *data, size_t piece) {
    const work *w = data;
    w->kernel(w->args, w->units * (int64_t)piece / w->pieces, w->units * ((int64_t)piece + 1) / w->pieces);
}

/* As many equal pieces as threads; grain: units that are worth a thread. */
static void run_units(call *c, void (*kernel)(const void *, int64_t, int64_t), const void *args, int64_t units, int64_t grain) {
    work w = {kernel, args, units, units / grain < c->n->threads ? units / grain : c->n->threads};
    if (c->status)
        return;
    if (w.pieces <= 1)
        kernel(args, 0, units);
    else
        keep(c, ORT_PARALLEL_FOR(c->n->api)(c->context, run_piece, (size_t)w.pieces, 0, &w));
}

#define RUN(c, name, args, grain) \
    run_units(c, (void (*)(const void *, int64_t, int64_t))rk_##name, args, (c)->status ? 0 : rk_##name##_units(args), grain)

/* Parts -------------------------------------------------------------------------------------------------------------------- */

static int parts_of(const node *n, int64_t groups, rk_part parts[RK_MAX_PARTS]) {
    int count = 0;
    if (n->low_width)
        parts[count++] = (rk_part){n->low_width, (int32_t)groups, (int32_t)n->low_bits, n->low_clip};
    if (n->high_width)
        parts[count++] = (rk_part){n->high_width, (int32_t)groups, (int32_t)n->high_bits, n->high_clip};
    return count;
}

/* The four outputs of a quantizing operator: leading dimensions of `like` up to `rank`. */
static void make_codes(call *c, const int64_t *lead, size_t rank, int64_t groups, rk_codes *out) {
    const node *n = c->n;
    int64_t dims[MAX_DIMENSIONS];
    memcpy(dims, lead, sizeof(int64_t) * rank);
    out->parts = parts_of(n, groups, out->part);
    for (size_t i = 0, part = 0; i < 2; i++) {
        const int there = i == 0 ? n->low_width > 0 : n->high_width > 0;
        dims[rank] = there ? rk_row_bytes(&out->part[part]) : 0;
        void *data = make_output(c, i, dims, rank + 1);
        if (there)
            out->rows[part++] = data;
    }
    dims[rank] = out->parts * groups;
    out->scale = make_output(c, 2, dims, rank + 1);
    out->zero_point = make_output(c, 3, dims, rank + 1);
}

/* Operators ---------------------------------------------------------------------------------------------------------------- */

/* x, weight?, bias? -> codes */
static void norm_quantize(call *c) {
    const tensor *x = &c->in[0];
    const int64_t columns = (c->n->low_width + c->n->high_width) * c->n->groups;
    rk_norm_quantize_args a = {rows_of(x), x->data, columns, (int32_t)c->n->norm, c->n->epsilon, c->in[1].data, c->in[2].data, {0}};
    require(c, x->rank > 0 && last_of(x) == columns && columns <= RK_MAX_COLUMNS, "x", "as many columns as its parts, at most 65536");
    require_size(c, &c->in[1], columns, "weight");
    require_size(c, &c->in[2], columns, "bias");
    if (c->status)
        return;
    make_codes(c, x->dims, x->rank - 1, c->n->groups, &a.out);
    RUN(c, norm_quantize, &a, 8);
}

/* low, high, scale, zero_point, weight_low, weight_high, weight_scale, weight_sum, bias?, residual? -> y */
static void mixed_linear(call *c) {
    const node *n = c->n;
    const tensor *in = c->in;
    const int64_t groups = n->groups, rows = rows_of(&in[2]), channels = last_of(&in[6]);
    rk_part parts[RK_MAX_PARTS];
    rk_mixed_linear_args a = {.rows = rows, .channels = channels, .parts = parts_of(n, groups, parts)};
    for (int i = 0, part = 0; i < 2; i++) {
        if (!(i == 0 ? n->low_width : n->high_width))
            continue;
        const int bits = (int)(i == 0 ? n->low_bits : n->high_bits);
        const int64_t tiles = (channels + RK_TILE - 1) / RK_TILE;
        require(c, size_of(&in[i]) == rows * rk_row_bytes(&parts[part]), i ? "high" : "low", "rows of packed codes");
        require(c, size_of(&in[4 + i]) == tiles * rk_tile_bytes(&parts[part], bits), i ? "weight_high" : "weight_low",
                "tiles of packed codes for its width and bits");
        a.part[part] = (rk_linear_part){parts[part], bits, in[i].data, in[4 + i].data};
        part++;
    }
    require(c, in[2].rank > 0 && last_of(&in[2]) == groups * a.parts, "scale", "a column for every run of every part");
    require_size(c, &in[3], rows * groups * a.parts, "zero_point");
    require_size(c, &in[6], channels * a.parts, "weight_scale");
    require_size(c, &in[7], channels * groups * a.parts, "weight_sum");
    require_size(c, &in[8], channels, "bias");
    require_size(c, &in[9], rows * channels, "residual");
    if (c->status)
        return;
    int64_t dims[MAX_DIMENSIONS];
    memcpy(dims, in[2].dims, sizeof dims);
    dims[in[2].rank - 1] = channels;
    a.scale = in[2].data, a.zero_point = in[3].data, a.weight_scale = in[6].data, a.weight_sum = in[7].data;
    a.bias = in[8].data, a.residual = in[9].data;
    a.residual_stride = a.y_stride = channels;
    a.y = make_output(c, 0, dims, in[2].rank);
    RUN(c, mixed_linear, &a, 1);
}

/* Points the dense factors of a transform into the tensor that holds them one behind the other; returns where the next begin. */
static const float *place_factors(rk_transform *t, const float *at, int64_t *left) {
    for (int f = 0; f < t->factors; f++) {
        const int64_t order = t->order[f];
        if ((order & (order - 1)) == 0)
            continue;
        *left -= order * order;
        t->factor[f] = at;
        at += order * order;
    }
    return at;
}

static int64_t width_of(const rk_transform *t) {
    int64_t width = t->blocks;
    for (int f = 0; f < t->factors; f++)
        width *= t->order[f];
    return width;
}

/* gate (stacked: gate and up side by side), up?, factors? -> codes */
static void hadamard_quantize(call *c) {
    const node *n = c->n;
    const tensor *gate = &c->in[0], *up = &c->in[1];
    const int64_t columns = n->low_width + n->high_width, stride = n->stacked ? 2 * columns : columns;
    rk_hadamard_quantize_args a = {.rows = rows_of(gate), .gate = gate->data, .gate_stride = stride, .up_stride = stride};
    a.up = n->stacked ? (const float *)gate->data + columns : up->data;
    a.activation = (int32_t)n->activation;
    require(c, gate->rank > 0 && last_of(gate) == stride && columns <= RK_MAX_COLUMNS, "gate", "as many columns as its parts, at most 65536");
    require_size(c, up, rows_of(gate) * columns, "up");
    int count = 0;
    if (n->low_width)
        a.transform[count++] = n->low_transform;
    if (n->high_width)
        a.transform[count++] = n->high_transform;
    int64_t left = c->in[2].data ? size_of(&c->in[2]) : 0;
    const float *at = c->in[2].data;
    for (int i = 0; i < count; i++) {
        const int64_t width = i == 0 && n->low_width ? n->low_width : n->high_width;
        require(c, width_of(&a.transform[i]) == width, "a transform", "blocks and orders whose product is the width of the part");
        at = place_factors(&a.transform[i], at, &left);
    }
    require(c, left == 0, "factors", "the matrices of all orders that are not powers of two, and no more");
    if (c->status)
        return;
    make_codes(c, gate->dims, gate->rank - 1, 1, &a.out);
    RUN(c, hadamard_quantize, &a, 1);
}

static rk_head key_head(const node *n) {
    return (rk_head){(int32_t)n->low_width, (int32_t)n->high_width, (int32_t)n->low_bits, (int32_t)n->high_bits};
}

static rk_head value_head(const node *n) {
    return (rk_head){(int32_t)n->value_low_width, (int32_t)n->value_high_width, (int32_t)n->value_low_bits, (int32_t)n->value_high_bits};
}

static void require_cache(call *c, const tensor *t, int64_t batch, const rk_head *head, const char *what) {
    require(c, t->rank == 4 && t->dims[0] == batch && t->dims[1] == c->n->kv_heads && t->dims[3] == rk_head_bytes(head), what,
            "[batch, kv_heads, tokens, bytes of a packed row]");
}

/* The rows of past in a tensor with room for all tokens; past itself where it is the same buffer. */
static uint8_t *present_of(call *c, size_t output, const tensor *past, int64_t total) {
    int64_t dims[4];
    memcpy(dims, past->dims, sizeof dims);
    dims[2] = past->dims[2] < total ? total : past->dims[2];
    uint8_t *present = make_output(c, output, dims, 4);
    if (!present || present == past->data)
        return present;
    const size_t before = (size_t)(past->dims[2] * dims[3]), after = (size_t)(dims[2] * dims[3]);
    for (int64_t i = 0; i < dims[0] * dims[1]; i++)
        memcpy(present + (size_t)i * after, (const uint8_t *)past->data + (size_t)i * before, before);
    return present;
}

/* qkv [B, S, heads side by side], cos, sin [B or 1, S, R], past_key, past_value, mask, basis?, q_norm?, k_norm?
 * -> q [B, S, H, D], present_key, present_value */
static void rope_cache(call *c) {
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
    a.q_norm = c->in[7].data, a.k_norm = c->in[8].data, a.epsilon = n->epsilon, a.clip = n->low_clip;
    const int64_t dims[4] = {a.batch, a.tokens, n->heads, d};
    a.q_out = make_output(c, 0, dims, 4);
    a.key_cache = present_of(c, 1, &c->in[3], total);
    a.value_cache = present_of(c, 2, &c->in[4], total);
    a.capacity = past < total ? total : past;
    RUN(c, rope_cache, &a, 32);
}

/* q, present_key, present_value, mask, sinks? -> float [B, S, H * columns], or codes. low_bits, high_bits and the clips are those of
 * the result: reading a cache needs only the widths. */
static void attend(call *c, int quantize) {
    const node *n = c->n;
    const tensor *q = &c->in[0], *keys = &c->in[1], *values = &c->in[2], *mask = &c->in[3];
    rk_attention_args a = {.heads = n->heads, .kv_heads = n->kv_heads, .key = key_head(n), .value = value_head(n)};
    require(c, q->rank == 4 && q->dims[2] == n->heads && q->dims[3] == a.key.low + a.key.high, "q", "[batch, tokens, heads, D]");
    require(c, mask->rank == 2 && q->rank == 4 && mask->dims[0] == q->dims[0] && mask->dims[1] >= q->dims[1], "mask",
            "[batch, all tokens]");
    require_cache(c, keys, q->dims[0], &a.key, "present_key");
    require_cache(c, values, q->dims[0], &a.value, "present_value");
    require(c, keys->dims[2] == values->dims[2] && keys->dims[2] >= mask->dims[1], "present", "a row for every token of the mask");
    require_size(c, &c->in[4], n->heads, "sinks");
    if (c->status)
        return;
    a.batch = q->dims[0], a.tokens = q->dims[1];
    int32_t start[a.batch + 1];
    for (int64_t b = 0; b < a.batch; b++)
        start[b] = (int32_t)(mask->dims[1] - a.tokens);
    a.start = start;
    a.q = q->data, a.key_cache = keys->data, a.value_cache = values->data, a.capacity = keys->dims[2];
    a.mask = mask->data, a.mask_stride = mask->dims[1];
    a.scale = n->scale, a.softcap = n->softcap, a.window = n->window, a.sinks = c->in[4].data;
    const int64_t dims[3] = {a.batch, a.tokens, n->heads * (a.value.low + a.value.high)};
    if (quantize) {
        node as_parts = *n; /* the output's parts are split as the values are */
        as_parts.low_width = n->value_low_width, as_parts.high_width = n->value_high_width;
        const node *kept = c->n;
        c->n = &as_parts;
        make_codes(c, dims, 2, n->heads, &a.codes);
        c->n = kept;
    } else
        a.out = make_output(c, 0, dims, 3);
    RUN(c, attention, &a, 1);
}

static void attention(call *c) { attend(c, 0); }
static void attention_quantize(call *c) { attend(c, 1); }

/* The table of operators ---------------------------------------------------------------------------------------------------- */

typedef struct {
    OrtCustomOp op; /* first, so that a pointer to it is one to the description */
    const char *name;
    void (*run)(call *);
    const char *inputs;  /* a letter each: f float, b int8, u uint8, i int32, m bool; capital: optional */
    const char *outputs;
} description;

typedef struct {
    node n;
    const description *d;
} kernel;

static const description *of(const OrtCustomOp *op) { return (const description *)op; }

static int type_of(char letter) {
    switch (letter | 32) {
    case 'f': return ORT_FLOAT;
    case 'b': return ORT_INT8;
    case 'u': return ORT_UINT8;
    case 'i': return ORT_INT32;
    default: return ORT_BOOL;
    }
}

static const char *op_name(const OrtCustomOp *op) { return of(op)->name; }
static const char *on_cpu(const OrtCustomOp *op) { (void)op; return NULL; }
static int input_type(const OrtCustomOp *op, size_t i) { return type_of(of(op)->inputs[i]); }
static int output_type(const OrtCustomOp *op, size_t i) { return type_of(of(op)->outputs[i]); }
static size_t input_count(const OrtCustomOp *op) { return strlen(of(op)->inputs); }
static size_t output_count(const OrtCustomOp *op) { return strlen(of(op)->outputs); }
static int input_kind(const OrtCustomOp *op, size_t i) { return of(op)->inputs[i] < 'a' ? ORT_OPTIONAL : ORT_REQUIRED; }
static int output_kind(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_REQUIRED; }
static int memory_type(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return 0; }
static int one(const OrtCustomOp *op) { (void)op; return 1; }
static int newest(const OrtCustomOp *op) { (void)op; return INT32_MAX; }
static void destroy(void *data) { free(data); }

static void read_int(const OrtKernelInfo *info, OrtApi api, const char *name, int64_t *value) {
    OrtStatus *status = ORT_ATTRIBUTE_INT(api)(info, name, value);
    if (status) /* absent: the default stays */
        ORT_RELEASE_STATUS(api)(status);
}

static void read_float(const OrtKernelInfo *info, OrtApi api, const char *name, float *value) {
    OrtStatus *status = ORT_ATTRIBUTE_FLOAT(api)(info, name, value);
    if (status)
        ORT_RELEASE_STATUS(api)(status);
}

/* prefix_blocks, prefix_order0, prefix_order1, ... */
static void read_transform(const OrtKernelInfo *info, OrtApi api, const char *prefix, rk_transform *t) {
    char name[32];
    t->blocks = 1;
    snprintf(name, sizeof name, "%s_blocks", prefix);
    read_int(info, api, name, &t->blocks);
    for (t->factors = 0; t->factors < RK_MAX_FACTORS; t->factors++) {
        int64_t order = 0;
        snprintf(name, sizeof name, "%s_order%d", prefix, t->factors);
        read_int(info, api, name, &order);
        if (order < 1)
            return;
        t->order[t->factors] = (int32_t)order;
    }
}

static void read_attributes(const OrtKernelInfo *info, node *n) {
    struct { const char *name; int64_t *value; } ints[] = {
        {"norm", &n->norm}, {"activation", &n->activation}, {"groups", &n->groups}, {"heads", &n->heads}, {"kv_heads", &n->kv_heads},
        {"window", &n->window}, {"stacked", &n->stacked}, {"low_width", &n->low_width}, {"high_width", &n->high_width},
        {"low_bits", &n->low_bits}, {"high_bits", &n->high_bits}, {"value_low_width", &n->value_low_width},
        {"value_high_width", &n->value_high_width}, {"value_low_bits", &n->value_low_bits}, {"value_high_bits", &n->value_high_bits},
    };
    struct { const char *name; float *value; } floats[] = {
        {"epsilon", &n->epsilon}, {"low_clip", &n->low_clip}, {"high_clip", &n->high_clip}, {"scale", &n->scale}, {"softcap", &n->softcap},
    };
    for (size_t i = 0; i < sizeof ints / sizeof ints[0]; i++)
        read_int(info, n->api, ints[i].name, ints[i].value);
    for (size_t i = 0; i < sizeof floats / sizeof floats[0]; i++)
        read_float(info, n->api, floats[i].name, floats[i].value);
    read_transform(info, n->api, "low", &n->low_transform);
    read_transform(info, n->api, "high", &n->high_transform);
}

static int sane_bits(int64_t low, int64_t high) { return low >= 2 && low <= 4 && high >= 5 && high <= 8; }

/* Whether widths, bits and numbers of heads can be worked with at all. */
static int sane(const node *n) {
    const int64_t widths[] = {n->low_width, n->high_width, n->value_low_width, n->value_high_width};
    for (int i = 0; i < 4; i++)
        if (widths[i] < 0 || widths[i] > RK_MAX_COLUMNS || (n->heads && widths[i] > RK_MAX_HEAD))
            return 0;
    if (n->low_width + n->high_width < 1 || n->groups < 1 || n->groups > RK_MAX_COLUMNS || n->window < 0)
        return 0;
    const int heads_fit = !n->heads || (n->heads > 0 && n->kv_heads > 0 && n->heads % n->kv_heads == 0 &&
                                        n->low_width + n->high_width <= RK_MAX_HEAD && n->value_low_width + n->value_high_width > 0 &&
                                        n->value_low_width + n->value_high_width <= RK_MAX_HEAD);
    return heads_fit && sane_bits(n->low_bits, n->high_bits) && sane_bits(n->value_low_bits, n->value_high_bits) &&
           n->low_clip > 0 && n->low_clip <= 1 && n->high_clip > 0 && n->high_clip <= 1;
}

static OrtStatus *create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **made) {
    const int needs_heads = strchr(of(op)->inputs, 'u') != NULL && strchr(of(op)->inputs, 'm') != NULL;
    kernel *k = calloc(1, sizeof *k);
    if (!k)
        return ORT_CREATE_STATUS(api)(ORT_INVALID_ARGUMENT, "resq: out of memory");
    k->d = of(op);
    k->n = (node){.api = api, .threads = sysconf(_SC_NPROCESSORS_ONLN), .groups = 1, .low_bits = 4, .high_bits = 8,
                  .value_low_bits = 4, .value_high_bits = 8, .low_clip = 1, .high_clip = 1, .scale = 1};
    read_attributes(info, &k->n);
    *made = k;
    if (sane(&k->n) && (!needs_heads || k->n.heads))
        return NULL;
    free(k);
    *made = NULL;
    char text[256];
    snprintf(text, sizeof text, "resq: attributes of a %s node do not fit: expected low bits 2 to 4, high bits 5 to 8, widths of at "
             "least one column, clips in (0, 1], and heads a multiple of kv_heads with at most 256 columns", of(op)->name);
    return ORT_CREATE_STATUS(api)(ORT_INVALID_ARGUMENT, text);
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
    const kernel *k = data;
    call c = {.n = &k->n, .context = context};
    const size_t count = strlen(k->d->inputs);
    for (size_t i = 0; i < count && !c.status; i++)
        read_input(&c, i, &c.in[i]);
    if (!c.status)
        k->d->run(&c);
    return c.status;
}

#define OPERATOR(title, function, in, out) \
    {{ORT_VERSION, NULL, op_name, on_cpu, input_type, input_count, output_type, output_count, NULL, destroy, input_kind, output_kind, \
      memory_type, one, one, one, one, create, compute, NULL, one, newest}, title, function, in, out}

static const description operators[] = {
    OPERATOR("NormQuantize", norm_quantize, "fFF", "bbfi"),
    OPERATOR("MixedLinear", mixed_linear, "bbfiuufiFF", "f"),
    OPERATOR("HadamardQuantize", hadamard_quantize, "fFF", "bbfi"),
    OPERATOR("RopeCache", rope_cache, "fffuumFFF", "fuu"),
    OPERATOR("Attention", attention, "fuumF", "f"),
    OPERATOR("AttentionQuantize", attention_quantize, "fuumF", "bbfi"),
};

RK_PUBLIC OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi api = base->get_api(ORT_VERSION);
    OrtDomain *domain = NULL;
    if (!api)
        return ((OrtStatus * (*)(int, const char *)) base->get_api(1)[0])(ORT_INVALID_ARGUMENT, "resq: needs ONNX Runtime 1.17 or newer");
    OrtStatus *status = ORT_CREATE_DOMAIN(api)("resq", &domain);
    for (size_t i = 0; !status && i < sizeof operators / sizeof operators[0]; i++)
        status = ORT_DOMAIN_ADD(api)(domain, &operators[i].op);
    return status ? status : ORT_ADD_DOMAIN(api)(options, domain);
}
