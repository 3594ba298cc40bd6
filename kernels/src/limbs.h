/* Floats as codes of 23 bits in three signed bytes, so that products with cached codes are exact integers:
 * x ~ scale (65536 top + 256 middle + bottom). The rounding, 2^-23 of the largest, is that of a float. */
#ifndef RK_LIMBS_H
#define RK_LIMBS_H

#include "quads.h"

#define LIMBS 3
#define LARGEST_CODE 4194303.0f
#define SMALLEST_RANGE 1e-30f /* values whose largest is smaller count as zero */

/* What values are multiplied with to become codes. */
RK_INLINE float to_codes(float largest) { return largest > SMALLEST_RANGE ? LARGEST_CODE / largest : 0; }

/* What codes are multiplied with to become values. */
RK_INLINE float from_codes(float largest) { return largest > SMALLEST_RANGE ? largest * (1.0f / LARGEST_CODE) : 0; }

RK_INLINE i32v code_of(f32v x, float factor) { return __builtin_convertvector(rk_round(x * factor), i32v); }

/* Codes to their bytes, top first, `stride` bytes apart. */
RK_INLINE void store_limbs(i32v code, int8_t *limbs, int64_t stride) {
    const i32v raised = code + 0x808080, bytes = raised ^ 0x808080; /* each byte carries the sign of those below it */
    rk_store_bytes(limbs, bytes >> 16);
    rk_store_bytes(limbs + stride, bytes >> 8);
    rk_store_bytes(limbs + 2 * stride, bytes);
}

/* The bottom byte of codes, and the other two together. */
RK_INLINE i32v bottom_of(i32v code) { return (i32v)((u32v)code << 24) >> 24; }
RK_INLINE i32v rest_of(i32v code) { return (code - bottom_of(code)) >> 8; }

/* 256 rest + bottom, rounded once */
RK_INLINE f32v limbs_to_float(i32v rest, i32v bottom) {
    return __builtin_convertvector(rest, f32v) * 256.0f + __builtin_convertvector(bottom, f32v);
}

#endif
