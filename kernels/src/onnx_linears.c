/* The operators of linears and what stands before them. Codes are four tensors: low int8 [..., row bytes], high int8, scale float
 * [..., runs], zero_point int32; a part that is not there has a width of 0 and a tensor without columns. Low parts meet weights of up
 * to 4 bits, high ones wider weights; low_bits and high_bits are those of activations. A fused operator is a quantizer
 * and the linear that alone reads its codes, which are no tensors then: every tensor and node costs a microsecond or two. */
#include "onnx_call.h"

/* x, weight?, bias? -> codes */
static void norm_quantize(call *c, rk_codes *codes) {
    const tensor *x = &c->in[0];
    const int64_t columns = columns_in(c->n);
    rk_norm_quantize_args a = {rows_of(x), x->data, columns, (int32_t)c->n->norm, c->n->epsilon, c->in[1].data, c->in[2].data, {0}};
    require(c, x->rank > 0 && last_of(x) == columns && columns <= RK_MAX_COLUMNS, "x", "as many columns as its parts, at most 65536");
    require_size(c, &c->in[1], columns, "weight");
    require_size(c, &c->in[2], columns, "bias");
    if (c->status)
        return;
    make_codes(c, x->dims, x->rank - 1, &a.out);
    RUN(c, norm_quantize, &a, 8);
    *codes = a.out;
}

void op_norm_quantize(call *c) {
    rk_codes codes;
    norm_quantize(c, &codes);
}

/* The three operands of a quantizer, then those of `multiply`. */
static void quantize_and_multiply(call *c, void (*quantize)(call *, rk_codes *)) {
    rk_codes codes = {0};
    quantize(c, &codes);
    multiply(c, &codes, c->in[0].dims, c->in[0].rank - 1, c->in + 3);
}

void op_norm_linear(call *c) { quantize_and_multiply(c, norm_quantize); }

void multiply(call *c, const rk_codes *codes, const int64_t *lead, size_t rank, const tensor *in) {
    if (c->status)
        return;
    int64_t rows = 1, dims[MAX_DIMENSIONS];
    for (size_t i = 0; i < rank; i++)
        rows *= dims[i] = lead[i];
    const int64_t channels = dims[rank] = last_of(&in[2]), tiles = (channels + RK_TILE - 1) / RK_TILE;
    rk_mixed_linear_args a = {.rows = rows, .channels = channels, .parts = codes->parts};
    for (int i = 0; i < a.parts; i++) {
        const rk_part *part = &codes->part[i];
        const int high = i == 1 || !size_of(&in[0]), weight_bits = high ? 8 : 4;
        require(c, size_of(&in[high]) == tiles * rk_tile_bytes(part, weight_bits), high ? "weight_high" : "weight_low",
                "tiles of packed codes for its width");
        a.part[i] = (rk_linear_part){*part, weight_bits, codes->rows[i], in[high].data};
    }
    require_size(c, &in[2], channels * a.parts, "weight_scale");
    require_size(c, &in[3], channels * runs_in(codes->part, codes->parts, 1), "weight_sum");
    require_size(c, &in[4], channels, "bias");
    require_size(c, &in[5], rows * channels, "residual");
    a.scale = codes->scale, a.zero_point = codes->zero_point, a.weight_scale = in[2].data, a.weight_sum = in[3].data;
    a.bias = in[4].data, a.residual = in[5].data;
    a.residual_stride = a.y_stride = channels;
    a.y = make_output(c, 0, dims, rank + 1);
    RUN(c, mixed_linear, &a, 1);
}

/* low, high, scale, zero_point, as an operator before made them */
void read_codes(call *c, const tensor *in, rk_codes *codes) {
    const int64_t rows = rows_of(&in[2]);
    *codes = (rk_codes){.scale = in[2].data, .zero_point = in[3].data};
    codes->parts = parts_of(c->n, codes->part);
    for (int i = 0; i < codes->parts; i++) {
        const int high = i == 1 || !c->n->low_width;
        require(c, size_of(&in[high]) == rows * rk_row_bytes(&codes->part[i]), high ? "high" : "low", "rows of packed codes");
        codes->rows[i] = in[high].data;
    }
    const int64_t runs = runs_in(codes->part, codes->parts, 0);
    require(c, in[2].rank > 0 && last_of(&in[2]) == runs, "scale", "a column for every run of every part");
    require_size(c, &in[3], rows * runs, "zero_point");
}

/* low, high, scale, zero_point, then those of `multiply` */
void op_mixed_linear(call *c) {
    const tensor *in = c->in;
    rk_codes codes;
    read_codes(c, in, &codes);
    multiply(c, &codes, in[2].dims, in[2].rank - 1, in + 4);
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

void place_transforms(call *c, const tensor *factors, const rk_part *part, int parts, int low_first, rk_transform *transform) {
    const float *at = factors->data;
    int64_t left = at ? size_of(factors) : 0;
    for (int i = 0; i < parts; i++) {
        transform[i] = i == 0 && low_first ? c->n->low_transform : c->n->high_transform;
        require(c, width_of(&transform[i]) == part[i].width * part[i].groups, "a transform", "blocks and orders whose product is the width of the part");
        at = place_factors(&transform[i], at, &left);
    }
    require(c, left == 0, "factors", "the matrices of all orders that are not powers of two, and no more");
}

/* gate (stacked: gate and up side by side), up?, factors? -> codes */
static void hadamard_quantize(call *c, rk_codes *codes) {
    const node *n = c->n;
    const tensor *gate = &c->in[0], *up = &c->in[1];
    const int64_t columns = columns_in(n), stride = n->stacked ? 2 * columns : columns;
    rk_hadamard_quantize_args a = {.rows = rows_of(gate), .gate = gate->data, .gate_stride = stride, .up_stride = stride};
    a.up = n->stacked ? (const float *)gate->data + columns : up->data;
    a.activation = (int32_t)n->activation;
    require(c, gate->rank > 0 && last_of(gate) == stride && columns <= RK_MAX_COLUMNS, "gate", "as many columns as its parts, at most 65536");
    require_size(c, up, rows_of(gate) * columns, "up");
    const int count = parts_of(n, a.out.part);
    place_transforms(c, &c->in[2], a.out.part, count, n->low_width > 0, a.transform);
    if (c->status)
        return;
    make_codes(c, gate->dims, gate->rank - 1, &a.out);
    RUN(c, hadamard_quantize, &a, 1);
    *codes = a.out;
}

void op_hadamard_quantize(call *c) {
    rk_codes codes;
    hadamard_quantize(c, &codes);
}

void op_hadamard_linear(call *c) { quantize_and_multiply(c, hadamard_quantize); }
