/* Codes of floats, as numerics/quantized.py defines them. */
#ifndef RK_QUANTIZE_H
#define RK_QUANTIZE_H

#include <float.h>

#include "narrow.h"

typedef struct {
    float scale;
    float zero_point; /* an integer */
    int lowest, highest;
} quantizer;

/* The quantizer of `width` values, at least one. */
RK_INLINE quantizer quantizer_of(const float *y, int64_t width, int bits, float clip) {
    f32v low = {0}, high = {0};
    int64_t i = 0;
    for (; i + RK_WIDTH <= width; i += RK_WIDTH) {
        low = rk_lowest(low, rk_load(y + i));
        high = rk_highest(high, rk_load(y + i));
    }
    f32v rest = rk_load_some(y + i, width - i);
    const float bottom = rk_lowest_of(rk_lowest(low, rest)) * clip, top = rk_highest_of(rk_highest(high, rest)) * clip;
    quantizer q = {(top - bottom) / (float)((1 << bits) - 1), 0, -(1 << (bits - 1)), (1 << (bits - 1)) - 1};
    q.scale = q.scale < FLT_MIN ? FLT_MIN : q.scale;
    q.zero_point = rk_round(rk_splat(-bottom / q.scale))[0] + (float)q.lowest;
    return q;
}

/* Beyond a million steps every code is the lowest or highest, so that bounding the quotient changes nothing. */
RK_INLINE i32v codes_of(quantizer q, f32v y) {
    f32v steps = rk_round(rk_clamp(y / q.scale, -1e6f, 1e6f)) + q.zero_point;
    return __builtin_convertvector(rk_clamp(steps, (float)q.lowest, (float)q.highest), i32v);
}

/* Codes of `width` values less `taken_out`, zeros up to a multiple of 8; returns their sum. */
RK_INLINE int32_t store_codes(quantizer q, const float *y, int64_t width, int32_t taken_out, int8_t *codes) {
    i32v sums = {0};
    int8_t bytes[16] = {0};
    int64_t i = 0;
    for (; i + RK_WIDTH <= width; i += RK_WIDTH) {
        i32v c = codes_of(q, rk_load(y + i)) - taken_out;
        rk_store_bytes(codes + i, c);
        sums += c;
    }
    if (i < width) {
        i32v rest = (codes_of(q, rk_load_some(y + i, width - i)) - taken_out) & (rk_lane < (int32_t)(width - i));
        sums += rest;
        rk_store_bytes(bytes, rest);
    }
    /* runs are short: constant numbers of bytes, so that nothing is called */
    const int64_t room = rk_round_up(width, 8) - i;
    if (room > 0)
        memcpy(codes + i, bytes, 4);
    if (room > 4)
        memcpy(codes + i + 4, bytes + 4, 4);
    if (room > 8)
        memcpy(codes + i + 8, bytes + 8, 8);
    return rk_sum_across(sums);
}

/* One run of one row: codes, their sum behind the row's codes, scale and zero point. run: among those of all parts. */
RK_INLINE void quantize_run(const rk_codes *out, int part, int group, int64_t row, int64_t run, int64_t runs, const float *y) {
    const rk_part *p = &out->part[part];
    const quantizer q = quantizer_of(y, p->width, p->bits, p->clip);
    int8_t *codes = out->rows[part] + row * rk_row_size(p);
    const int32_t taken_out = RK_CENTRED(p->bits) ? (int32_t)q.zero_point : 0;
    const int32_t sum = store_codes(q, y, p->width, taken_out, codes + group * rk_stride(p));
    memcpy(codes + p->groups * rk_stride(p) + 4 * group, &sum, 4);
    out->scale[row * runs + run] = q.scale;
    out->zero_point[row * runs + run] = (int32_t)q.zero_point - taken_out;
}

RK_INLINE int64_t runs_of(const rk_codes *out) {
    int64_t runs = 0;
    for (int i = 0; i < out->parts; i++)
        runs += out->part[i].groups;
    return runs;
}

RK_INLINE int64_t columns_of(const rk_codes *out) {
    int64_t columns = 0;
    for (int i = 0; i < out->parts; i++)
        columns += out->part[i].groups * out->part[i].width;
    return columns;
}

/* A whole row. */
static inline void quantize_row(const rk_codes *out, int64_t row, const float *y) {
    const int64_t runs = runs_of(out);
    int64_t run = 0;
    for (int i = 0; i < out->parts; i++)
        for (int g = 0; g < out->part[i].groups; g++, run++, y += out->part[i].width)
            quantize_run(out, i, g, row, run, runs, y);
}

#endif
