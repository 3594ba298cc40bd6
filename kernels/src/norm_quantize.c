/* RMSNorm, LayerNorm or nothing, then per-token codes of every part: formula and operands in resq_kernels.h. */
#include <math.h>

#include "quantize.h"

static int64_t norm_quantize_units(const rk_norm_quantize_args *a) { return a->rows; }

/* Sum of (x - shift), or of its squares. */
RK_INLINE float sum_of(const float *x, int64_t columns, float shift, const int squares) {
    rk_lanes sums = {{{0}}};
    float last[16] = {0};
    const int64_t whole = columns / 16 * 16;
    for (int64_t j = 0; j < columns - whole; j++)
        last[j] = x[whole + j] - shift;
    for (int64_t i = 0; i <= whole; i += 16)
        for (int j = 0; j < 16 / RK_WIDTH; j++) {
            f32v v = i < whole ? rk_load(x + i + RK_WIDTH * j) - shift : rk_load(last + RK_WIDTH * j);
            sums.part[j] += squares ? v * v : v;
        }
    return rk_total(sums);
}

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
    const float mean = a->norm == RK_NORM_LAYER ? sum_of(x, columns, 0, 0) / count : 0;
    const float factor = 1.0f / sqrtf(sum_of(x, columns, mean, 1) / count + a->epsilon);
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
