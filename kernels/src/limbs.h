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

/* The bytes of codes, each as it is stored: it carries the sign of those below it. */
RK_INLINE i32v limbs_of(i32v code) { return (code + 0x808080) ^ 0x808080; }

/* Codes to their bytes, top first, `stride` bytes apart. */
RK_INLINE void store_limbs(i32v code, int8_t *limbs, int64_t stride) {
    const i32v bytes = limbs_of(code);
    rk_store_bytes(limbs, bytes >> 16);
    rk_store_bytes(limbs + stride, bytes >> 8);
    rk_store_bytes(limbs + 2 * stride, bytes);
}

#if defined(__AVX512F__)
#define FOUR_AT_ONCE 1

/* The same of four vectors, one behind the other: bytes of one limb come together in every four codes, then in all. */
RK_INLINE void store_four_limbs(const i32v code[4], int8_t *limbs, int64_t stride) {
    const __m512i by_limb = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    i32v bytes[4], limb[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        bytes[i] = (i32v)_mm512_shuffle_epi8((__m512i)limbs_of(code[i]), by_limb);
    rk_transpose_fours(bytes, limb);
#pragma GCC unroll 4
    for (int i = 0; i < LIMBS; i++)
        _mm512_storeu_si512(limbs + i * stride, _mm512_permutexvar_epi32(in_order, (__m512i)limb[LIMBS - 1 - i]));
}

#else
#define FOUR_AT_ONCE 0

RK_INLINE void store_four_limbs(const i32v code[4], int8_t *limbs, int64_t stride) {
    for (int i = 0; i < 4; i++)
        store_limbs(code[i], limbs + i * RK_WIDTH, stride);
}

#endif

/* The bottom byte of codes, and the other two together. */
RK_INLINE i32v bottom_of(i32v code) { return (i32v)((u32v)code << 24) >> 24; }
RK_INLINE i32v rest_of(i32v code) { return (code - bottom_of(code)) >> 8; }

/* 256 rest + bottom, rounded once */
RK_INLINE f32v limbs_to_float(i32v rest, i32v bottom) {
    return __builtin_convertvector(rest, f32v) * 256.0f + __builtin_convertvector(bottom, f32v);
}

#endif
