/* Exponential and activation functions on vectors; arithmetic only, so that every instruction set gives the same bits. */
#ifndef RK_ACTIVATIONS_H
#define RK_ACTIVATIONS_H

#include "common.h"

/* e^x within 2 units in the last place for -87 <= x <= 88, and the value at the bound beyond them. x = n ln 2 + r with |r| <= ln 2 / 2,
 * e^r by its Taylor series to r^7, 2^n by its exponent. */
RK_INLINE f32v rk_exp(f32v x) {
    x = rk_clamp(x, -87.0f, 88.0f);
    f32v n = rk_round(x * 1.44269504f);
    f32v r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two pieces, the first exact in products */
    f32v e = r * (1.0f / 5040) + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return e * (f32v)((__builtin_convertvector(n, i32v) + 127) << 23);
}

RK_INLINE f32v rk_sigmoid(f32v x) { return 1.0f / (1.0f + rk_exp(-x)); }

/* The error function within 1.5e-7 (Abramowitz and Stegun, 7.1.26). */
RK_INLINE f32v rk_erf(f32v x) {
    f32v a = rk_highest(x, -x), t = 1.0f / (1.0f + 0.3275911f * a);
    f32v p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    f32v positive = 1.0f - p * rk_exp(-a * a);
    return rk_choose(x < 0, -positive, positive);
}

RK_INLINE f32v rk_activate(f32v x, const int activation) {
    switch (activation) {
    case RK_ACTIVATION_SILU:
        return x * rk_sigmoid(x);
    case RK_ACTIVATION_GELU:
        return 0.5f * x * (1.0f + rk_erf(x * 0.70710678f));
    case RK_ACTIVATION_GELU_TANH: /* (1 + tanh z) / 2 = sigmoid(2 z) */
        return x * rk_sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    case RK_ACTIVATION_RELU:
        return rk_highest(x, rk_splat(0));
    default:
        return x;
    }
}

#endif
