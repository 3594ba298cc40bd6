/* Gate x up, a fast Hadamard transform and codes of the down projection's input, one pass over the row: operands in resq_kernels.h.
 *
 * A factor of order n whose later factors have the product r sees the row as [left, n, r] and multiplies along the middle axis:
 * butterflies for Sylvester matrices, small dense products for others. */
#include <math.h>

#include "activations.h"
#include "hadamard_dense.h"
#include "quantize.h"

static int64_t hadamard_quantize_units(const rk_hadamard_quantize_args *a) { return a->rows; }

/* (a, b) -> (a + b, a - b) for neighbours at distance h in a vector. */
#define BUTTERFLY_STEP(v, h) (RK_EXCHANGE(v, h) + rk_choose((rk_lane & (h)) != 0, -(v), v))

/* All butterflies within the vectors of x. */
RK_INLINE void butterflies_inside(float *x, int64_t count) {
    for (int64_t i = 0; i < count; i += RK_WIDTH) {
        f32v v = rk_load(x + i);
        v = BUTTERFLY_STEP(v, 1);
        v = BUTTERFLY_STEP(v, 2);
#if RK_WIDTH >= 8
        v = BUTTERFLY_STEP(v, 4);
#endif
#if RK_WIDTH >= 16
        v = BUTTERFLY_STEP(v, 8);
#endif
        rk_store(x + i, v);
    }
}

/* (a, b) -> (a + b, a - b) for two stretches. */
RK_INLINE void butterfly(float *a, float *b, int64_t count) {
    int64_t i = 0;
    for (; i + RK_WIDTH <= count; i += RK_WIDTH) {
        f32v u = rk_load(a + i), v = rk_load(b + i);
        rk_store(a + i, u + v);
        rk_store(b + i, u - v);
    }
    for (; i < count; i++) {
        float u = a[i], v = b[i];
        a[i] = u + v;
        b[i] = u - v;
    }
}

/* Sylvester matrix along the first axis of x [order, right]; stages in ascending distance. */
static void butterflies(float *x, int64_t order, int64_t right) {
    int64_t distance = right;
    if (right == 1 && order >= RK_WIDTH) {
        butterflies_inside(x, order);
        distance = RK_WIDTH;
    }
    for (; distance < order * right; distance *= 2)
        for (int64_t i = 0; i < order * right; i += 2 * distance)
            butterfly(x + i, x + i + distance, distance);
}

static void transform_row(const rk_transform *t, float *x, int64_t width, float *space) {
    int64_t right = width / t->blocks;
    for (int f = 0; f < t->factors; f++) {
        const int64_t order = t->order[f], size = right;
        right /= order;
        if (t->factor[f])
            dense(t->factor[f], x, width / size, order, right, space);
        for (int64_t at = 0; !t->factor[f] && at < width; at += size)
            butterflies(x + at, order, right);
    }
}

/* y = activation(gate) * up * factor */
RK_INLINE void gate_row(const float *gate, const float *up, int64_t width, const int activation, float factor, float *y) {
    for (int64_t i = 0; i < width; i += RK_WIDTH) {
        const int64_t count = rk_min(RK_WIDTH, width - i);
        f32v v = rk_activate(rk_load_some(gate + i, count), activation);
        v = up ? v * rk_load_some(up + i, count) : v;
        rk_store_some(y + i, v * factor, count);
    }
}

/* The same of RK_ACTIVATION_CLAMPED. */
static void clamped_row(const rk_hadamard_quantize_args *a, const float *gate, const float *up, int64_t width, float factor, float *y) {
    for (int64_t i = 0; i < width; i += RK_WIDTH) {
        const int64_t count = rk_min(RK_WIDTH, width - i);
        f32v v = rk_lowest(rk_load_some(gate + i, count), rk_splat(a->limit));
        v *= rk_sigmoid(a->slope * v);
        v = up ? v * (rk_clamp(rk_load_some(up + i, count), -a->limit, a->limit) + 1.0f) : v;
        rk_store_some(y + i, v * factor, count);
    }
}

static void gate_part(const rk_hadamard_quantize_args *a, int64_t row, int64_t start, int64_t width, float factor, float *y) {
    const float *gate = a->gate + row * a->gate_stride + start, *up = a->up ? a->up + row * a->up_stride + start : 0;
    switch (a->activation) {
    case RK_ACTIVATION_SILU: gate_row(gate, up, width, RK_ACTIVATION_SILU, factor, y); break;
    case RK_ACTIVATION_GELU: gate_row(gate, up, width, RK_ACTIVATION_GELU, factor, y); break;
    case RK_ACTIVATION_GELU_TANH: gate_row(gate, up, width, RK_ACTIVATION_GELU_TANH, factor, y); break;
    case RK_ACTIVATION_RELU: gate_row(gate, up, width, RK_ACTIVATION_RELU, factor, y); break;
    case RK_ACTIVATION_CLAMPED: clamped_row(a, gate, up, width, factor, y); break;
    default: gate_row(gate, up, width, RK_ACTIVATION_NONE, factor, y);
    }
}

static void hadamard_quantize(const rk_hadamard_quantize_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t columns = columns_of(&a->out);
    float y[columns], space[columns];
    for (int64_t row = begin; row < end; row++) {
        int64_t start = 0;
        for (int i = 0; i < a->out.parts; i++) {
            const int64_t width = a->out.part[i].width * a->out.part[i].groups;
            const rk_transform *t = &a->transform[i];
            gate_part(a, row, start, width, 1.0f / sqrtf((float)(width / t->blocks)), y + start);
            transform_row(t, y + start, width, space);
            start += width;
        }
        quantize_row(&a->out, row, y);
    }
    rk_leave(mode);
}
