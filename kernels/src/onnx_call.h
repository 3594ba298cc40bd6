/* A call of an ONNX Runtime custom operator: attributes, tensors, errors, and the threads that share its units. */
#ifndef RK_ONNX_CALL_H
#define RK_ONNX_CALL_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_abi.h"
#include "resq_kernels.h"

#define MAX_DIMENSIONS 6
#define MAX_INPUTS 19
#define MAX_ROOMS 8

typedef struct {
    void *data; /* NULL: an optional input that is absent */
    int64_t dims[MAX_DIMENSIONS];
    uint32_t rank;
    int32_t type; /* ONNX's number */
} tensor;

/* A node's attributes; what an operator does not have is 0. */
typedef struct {
    OrtApi api;
    int fused; /* what the operator's linear reads is no output */
    int64_t threads;
    int64_t norm, activation, low_groups, high_groups, heads, kv_heads, window, stacked, gated;
    int64_t low_width, high_width, low_bits, high_bits, value_low_width, value_high_width, value_low_bits, value_high_bits;
    int64_t key_low_bits, key_high_bits; /* of the cache, where low_bits and high_bits are those of a result */
    int64_t result_low_width, result_high_width; /* of what attention quantizes, where low_width and high_width are those of keys */
    int64_t latent_heads, own, values;   /* of latent attention: its heads, and columns of a key's own part and of a value */
    int64_t hidden_low_width, hidden_high_width, hidden_low_bits, hidden_high_bits; /* of what the down projections of experts read */
    float epsilon, low_clip, high_clip, hidden_low_clip, hidden_high_clip, cache_clip, scale, softcap, limit, slope;
    rk_transform low_transform, high_transform;
} node;

typedef struct call call;
struct call {
    const node *n;
    OrtKernelContext *context;
    OrtStatus *status;
    tensor in[MAX_INPUTS];
    void *room[MAX_ROOMS]; /* freed behind the call */
    int rooms;
    const char *step; /* of a chain: its name, and what gives its outputs their places; NULL: ONNX Runtime does */
    void *(*place)(call *, size_t, const int64_t *, size_t);
    const char *ahead, *ahead_end; /* what the next step reads first, asked for at every kernel of this one */
};

/* Errors: the first one of a call is kept; ONNX Runtime adds the node's name. ----------------------------------------------- */

static inline void fail(call *c, const char *what, const char *expected) {
    char text[256];
    if (c->status)
        return;
    snprintf(text, sizeof text, "resq: %s%s%s does not fit: expected %s", c->step ? c->step : "", c->step ? ": " : "", what, expected);
    c->status = ORT_CREATE_STATUS(c->n->api)(ORT_INVALID_ARGUMENT, text);
}

static inline void require(call *c, int fits, const char *what, const char *expected) {
    if (!fits)
        fail(c, what, expected);
}

static inline int keep(call *c, OrtStatus *status) {
    if (status && c->status)
        ORT_RELEASE_STATUS(c->n->api)(status);
    else if (status)
        c->status = status;
    return c->status == NULL;
}

/* Tensors ------------------------------------------------------------------------------------------------------------------ */

static inline void read_tensor(call *c, const OrtValue *value, tensor *t) {
    const OrtApi api = c->n->api;
    OrtTensorInfo *info = NULL;
    size_t rank = 0;
    if (!keep(c, ORT_TENSOR_INFO(api)(value, &info)))
        return;
    if (keep(c, ORT_DIMENSIONS_COUNT(api)(info, &rank)) && keep(c, ORT_ELEMENT_TYPE(api)(info, &t->type))) {
        require(c, rank <= MAX_DIMENSIONS, "an input", "at most 6 dimensions");
        if (!c->status)
            keep(c, ORT_DIMENSIONS(api)(info, t->dims, rank));
        t->rank = (uint32_t)rank;
    }
    ORT_RELEASE_TENSOR_INFO(api)(info);
    keep(c, ORT_DATA(api)((OrtValue *)value, &t->data));
}

static inline void read_input(call *c, size_t index, tensor *t) {
    const OrtValue *value = NULL;
    if (keep(c, ORT_INPUT(c->n->api)(c->context, index, &value)) && value)
        read_tensor(c, value, t);
}

/* Memory for this call; NULL only if the call fails. */
static inline void *make_room(call *c, int64_t bytes) {
    void *room = c->status ? NULL : malloc((size_t)bytes + 1);
    require(c, room != NULL, "a result between kernels", "enough memory");
    if (room)
        c->room[c->rooms++] = room;
    return room;
}

static inline void *make_output(call *c, size_t index, const int64_t *dims, size_t rank) {
    OrtValue *value = NULL;
    void *data = NULL;
    if (c->place)
        return c->status ? NULL : c->place(c, index, dims, rank);
    if (!c->status && keep(c, ORT_OUTPUT(c->n->api)(c->context, index, dims, rank, &value)))
        keep(c, ORT_DATA(c->n->api)(value, &data));
    return data;
}

static inline int64_t size_of(const tensor *t) {
    int64_t size = 1;
    for (size_t i = 0; i < t->rank; i++)
        size *= t->dims[i];
    return size;
}

static inline int64_t last_of(const tensor *t) { return t->rank ? t->dims[t->rank - 1] : 1; }
static inline int64_t rows_of(const tensor *t) { return last_of(t) ? size_of(t) / last_of(t) : 0; }

/* An optional operand of so many elements. */
static inline void require_size(call *c, const tensor *t, int64_t size, const char *what) {
    require(c, !t->data || size_of(t) == size, what, "as many elements as the other operands ask for");
}

/* Work --------------------------------------------------------------------------------------------------------------------- */

typedef struct {
    void (*kernel)(const void *, int64_t, int64_t);
    const void *args;
    int64_t units, pieces;
} work;

static inline void run_piece(void *data, size_t piece) {
    const work *w = data;
    w->kernel(w->args, w->units * (int64_t)piece / w->pieces, w->units * ((int64_t)piece + 1) / w->pieces);
}

/* As many equal pieces as threads; grain: units that are worth a thread. */
static inline void run_units(call *c, void (*kernel)(const void *, int64_t, int64_t), const void *args, int64_t units, int64_t grain) {
    work w = {kernel, args, units, units / grain < c->n->threads ? units / grain : c->n->threads};
    if (c->status)
        return;
    for (const char *at = c->ahead; at < c->ahead_end; at += 64)
        __builtin_prefetch(at);
    if (w.pieces <= 1)
        kernel(args, 0, units);
    else
        keep(c, ORT_PARALLEL_FOR(c->n->api)(c->context, run_piece, (size_t)w.pieces, 0, &w));
}

#define RUN(c, name, args, grain) \
    run_units(c, (void (*)(const void *, int64_t, int64_t))rk_##name, args, (c)->status ? 0 : rk_##name##_units(args), grain)

/* Parts -------------------------------------------------------------------------------------------------------------------- */

static inline int parts_of(const node *n, rk_part parts[RK_MAX_PARTS]) {
    int count = 0;
    if (n->low_width)
        parts[count++] = (rk_part){n->low_width, (int32_t)n->low_groups, (int32_t)n->low_bits, n->low_clip};
    if (n->high_width)
        parts[count++] = (rk_part){n->high_width, (int32_t)n->high_groups, (int32_t)n->high_bits, n->high_clip};
    return count;
}

static inline int64_t columns_in(const node *n) { return n->low_width * n->low_groups + n->high_width * n->high_groups; }

/* Runs of all parts; summed: only those whose weights have sums, since their codes keep their zero points. */
static inline int64_t runs_in(const rk_part *part, int parts, int summed) {
    int64_t runs = 0;
    for (int i = 0; i < parts; i++)
        runs += summed && RK_CENTRED(part[i].bits) ? 0 : part[i].groups;
    return runs;
}

/* Room for the codes of so many rows. */
static inline void keep_codes(call *c, int64_t rows, rk_codes *out) {
    const int64_t runs = rows * runs_in(out->part, out->parts, 0);
    int64_t bytes = 8 * runs;
    for (int i = 0; i < out->parts; i++)
        bytes += rows * rk_row_bytes(&out->part[i]);
    out->scale = make_room(c, bytes);
    if (c->status)
        return;
    out->zero_point = (int32_t *)(out->scale + runs);
    int8_t *at = (int8_t *)(out->zero_point + runs);
    for (int i = 0; i < out->parts; at += rows * rk_row_bytes(&out->part[i++]))
        out->rows[i] = at;
}

/* Room for the codes that an operator makes: its four outputs, with leading dimensions `lead`, or a fused operator's own. */
static inline void make_codes(call *c, const int64_t *lead, size_t rank, rk_codes *out) {
    const node *n = c->n;
    int64_t dims[MAX_DIMENSIONS], rows = 1;
    for (size_t i = 0; i < rank; i++)
        rows *= dims[i] = lead[i];
    out->parts = parts_of(n, out->part);
    if (n->fused) {
        keep_codes(c, rows, out);
        return;
    }
    for (size_t i = 0, part = 0; i < 2; i++) {
        const int there = i == 0 ? n->low_width > 0 : n->high_width > 0;
        dims[rank] = there ? rk_row_bytes(&out->part[part]) : 0;
        void *data = make_output(c, i, dims, rank + 1);
        if (there)
            out->rows[part++] = data;
    }
    dims[rank] = runs_in(out->part, out->parts, 0);
    out->scale = make_output(c, 2, dims, rank + 1);
    out->zero_point = make_output(c, 3, dims, rank + 1);
}

/* low, high, scale, zero_point, as an operator before made them. */
void read_codes(call *c, const tensor *in, rk_codes *codes);

/* The transform of every part; the dense factors of all lie in one tensor. low_first: whether the first part is a low one. */
void place_transforms(call *c, const tensor *factors, const rk_part *part, int parts, int low_first, rk_transform *transform);

/* codes, weight_low, weight_high, weight_scale, weight_sum, bias?, residual? -> y of the leading dimensions `lead`. in: those behind the
 * codes. */
void multiply(call *c, const rk_codes *codes, const int64_t *lead, size_t rank, const tensor *in);

/* The parts of the first and the second cache of a node. */
rk_head key_head(const node *n);
rk_head value_head(const node *n);

/* The rows of past in a tensor with room for all tokens; past itself where it is the same buffer. */
tensor present_of(call *c, size_t output, const tensor *past, int64_t total);

/* Computes an operator; what it takes and gives is written there. */
void op_norm_quantize(call *c);
void op_mixed_linear(call *c);
void op_hadamard_quantize(call *c);
void op_rope_cache(call *c);
void op_cache_image(call *c);
void op_latent_attention(call *c);
void op_attention(call *c);
void op_attention_quantize(call *c);
void op_norm_linear(call *c);
void op_hadamard_linear(call *c);
void op_attention_linear(call *c);
void op_experts(call *c);
void op_rows(call *c);
void op_embed(call *c);
void op_angles(call *c);
void op_seen(call *c);
void op_keep(call *c);

#endif
