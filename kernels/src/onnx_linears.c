/* The operators of linears and what stands before them. Codes are four tensors: low int8 [..., row bytes], high int8, scale float
 * [..., runs], zero_point int32; a part that is not there has a width of 0 and a tensor without columns. */
#include "onnx_call.h"

/* x, weight?, bias? -> codes */
void op_norm_quantize(call *c) {
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
void op_mixed_linear(call *c) {
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
void op_hadamard_quantize(call *c) {
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
