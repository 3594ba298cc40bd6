/* RMSNorm, LayerNorm or nothing, then per-token codes of every part: formula and operands in resq_kernels.h. */
#include <math.h>

#include "quantize.h"

static int64_t norm_quantize_units(const rk_norm_quantize_args *a) { return a->rows; }

/* y = (x - shift) * factor * weight + bias */
RK_INLINE void scaled_row(const rk_norm_quantize_args *a, const float *x, int64_t columns, float shift, float factor, float *y) {
    for (int64_t i = 0; i < columns; i += RK_WIDTH) {
        const int64_t count = rk_min(RK_WIDTH, columns - i);
        f32v v = (rk_load_some(x + i, count) - shift) * factor;
        v = a->weight ? v * rk_load_some(a->weight + i, count) : v;
        v = a->bias ? v + rk_load_some(a->bias + i, count) : v;
        rk_store_some(y + i, v, count);
    }
}

static void normalize(const rk_norm_quantize_args *a, const float *x, int64_t columns, float *y) {
    const float count = (float)columns;
    const float mean = a->norm == RK_NORM_LAYER ? rk_sum_of(x, columns, 0, 0) / count : 0;
    const float factor = 1.0f / sqrtf(rk_sum_of(x, columns, mean, 1) / count + a->epsilon);
    scaled_row(a, x, columns, mean, factor, y);
}

static void norm_quantize(const rk_norm_quantize_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t columns = columns_of(&a->out);
    float y[columns];
    for (int64_t row = begin; row < end; row++) {
        const float *x = a->x + row * a->x_stride;
        if (a->norm != RK_NORM_NONE)
            normalize(a, x, columns, y);
        quantize_row(&a->out, row, a->norm == RK_NORM_NONE ? x : y);
    }
    rk_leave(mode);
}
