/* What all kernels share: vectors as wide as the registers, and small helpers.
 *
 * Arithmetic on vectors is elementwise and never contracted to fused multiply-add, so that every instruction set gives the same
 * bits; sums over columns run in 16 lanes, whatever the width, that are added in a fixed order. */
#ifndef RK_COMMON_H
#define RK_COMMON_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "resq_kernels.h"

#define RK_NAME_(name, isa) name##_##isa
#define RK_NAME2(name, isa) RK_NAME_(name, isa)
#define RK_NAME(name) RK_NAME2(name, RK_ISA) /* the name of this instruction set's version of a kernel */
#define RK_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define RK_WIDTH 16 /* floats of a register */
#elif defined(__AVX2__)
#define RK_WIDTH 8
#else
#define RK_WIDTH 4
#endif

typedef float f32v __attribute__((vector_size(4 * RK_WIDTH)));
typedef int32_t i32v __attribute__((vector_size(4 * RK_WIDTH)));
typedef uint32_t u32v __attribute__((vector_size(4 * RK_WIDTH)));
typedef int8_t i8v __attribute__((vector_size(RK_WIDTH)));
typedef uint8_t u8v __attribute__((vector_size(RK_WIDTH)));

RK_INLINE int64_t rk_min(int64_t a, int64_t b) { return a < b ? a : b; }
RK_INLINE int64_t rk_round_up(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }
RK_INLINE int64_t rk_stride(const rk_part *p) { return rk_round_up(p->width, 8); }
RK_INLINE int64_t rk_row_size(const rk_part *p) { return p->groups * (rk_stride(p) + 4); } /* rk_row_bytes */
RK_INLINE int64_t rk_tile_size(const rk_part *p, int bits) { return p->groups * rk_stride(p) * (bits <= 4 ? 32 : 64); } /* rk_tile_bytes */

RK_INLINE f32v rk_load(const float *p) { f32v v; memcpy(&v, p, sizeof v); return v; }
RK_INLINE void rk_store(float *p, f32v v) { memcpy(p, &v, sizeof v); }
/* At most RK_WIDTH values; those that are not there are zero. */
RK_INLINE f32v rk_load_some(const float *p, int64_t count) {
    f32v v = {0};
    if (count >= RK_WIDTH)
        return rk_load(p);
#if defined(__AVX512F__)
    return (f32v)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#endif
    for (int64_t i = 0; i < count; i++)
        v[i] = p[i];
    return v;
}

RK_INLINE void rk_store_some(float *p, f32v v, int64_t count) {
    if (count >= RK_WIDTH)
        rk_store(p, v);
    else
#if defined(__AVX512F__)
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
        for (int64_t i = 0; i < count; i++)
            p[i] = v[i];
#endif
}

RK_INLINE u32v rk_load_u32(const void *p) { u32v v; memcpy(&v, p, sizeof v); return v; }
RK_INLINE f32v rk_splat(float x) { return x - (f32v){0}; }
RK_INLINE f32v rk_floats(u32v v) { return __builtin_convertvector((i32v)v, f32v); }

/* a where the mask is all ones, b where it is zero. */
RK_INLINE f32v rk_choose(i32v mask, f32v a, f32v b) { return (f32v)((mask & (i32v)a) | (~mask & (i32v)b)); }

#if defined(__AVX512F__)
RK_INLINE f32v rk_lowest(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }
RK_INLINE f32v rk_highest(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
RK_INLINE f32v rk_fma(f32v a, f32v b, f32v c) { return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__)
RK_INLINE f32v rk_lowest(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
RK_INLINE f32v rk_highest(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
RK_INLINE f32v rk_fma(f32v a, f32v b, f32v c) { return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__)
RK_INLINE f32v rk_lowest(f32v a, f32v b) { return (f32v)vminq_f32((float32x4_t)a, (float32x4_t)b); }
RK_INLINE f32v rk_highest(f32v a, f32v b) { return (f32v)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
RK_INLINE f32v rk_fma(f32v a, f32v b, f32v c) { return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
RK_INLINE f32v rk_lowest(f32v a, f32v b) { return rk_choose(a < b, a, b); }
RK_INLINE f32v rk_highest(f32v a, f32v b) { return rk_choose(a > b, a, b); }
RK_INLINE f32v rk_fma(f32v a, f32v b, f32v c) { return a * b + c; }
#endif

/* To the nearest integer, halves to even; |x| below 2^22. Adding 1.5 * 2^23 leaves no bits behind the point. */
RK_INLINE f32v rk_round(f32v x) { return (x + 12582912.0f) - 12582912.0f; }
RK_INLINE f32v rk_clamp(f32v x, float low, float high) { return rk_lowest(rk_highest(x, rk_splat(low)), rk_splat(high)); }

/* The number of every lane. */
#if RK_WIDTH == 16
static const i32v rk_lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif RK_WIDTH == 8
static const i32v rk_lane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const i32v rk_lane = {0, 1, 2, 3};
#endif

/* RK_EXCHANGE(v, h): lane i gets lane i ^ h. */
#if defined(__clang__)
#if RK_WIDTH == 16
#define RK_EXCHANGE(v, h) __builtin_shufflevector(v, v, 0 ^ h, 1 ^ h, 2 ^ h, 3 ^ h, 4 ^ h, 5 ^ h, 6 ^ h, 7 ^ h, 8 ^ h, 9 ^ h, 10 ^ h, \
                                               11 ^ h, 12 ^ h, 13 ^ h, 14 ^ h, 15 ^ h)
#elif RK_WIDTH == 8
#define RK_EXCHANGE(v, h) __builtin_shufflevector(v, v, 0 ^ h, 1 ^ h, 2 ^ h, 3 ^ h, 4 ^ h, 5 ^ h, 6 ^ h, 7 ^ h)
#else
#define RK_EXCHANGE(v, h) __builtin_shufflevector(v, v, 0 ^ h, 1 ^ h, 2 ^ h, 3 ^ h)
#endif
#else
#define RK_EXCHANGE(v, h) __builtin_shuffle(v, rk_lane ^ (h)) 
#endif

/* 16 partial sums, whatever the width of a vector. */
typedef struct { f32v part[16 / RK_WIDTH]; } rk_lanes;

/* The sum of the lanes, always added in the same order. */
RK_INLINE float rk_total(rk_lanes lanes) {
#if RK_WIDTH == 16
    f32v v = lanes.part[0];
    v += RK_EXCHANGE(v, 8);
#elif RK_WIDTH == 8
    f32v v = lanes.part[0] + lanes.part[1];
#else
    f32v v = (lanes.part[0] + lanes.part[2]) + (lanes.part[1] + lanes.part[3]);
#endif
#if RK_WIDTH >= 8
    v += RK_EXCHANGE(v, 4);
#endif
    v += RK_EXCHANGE(v, 2);
    v += RK_EXCHANGE(v, 1);
    return v[0];
}

/* Sum of (x - shift), or of its squares. */
RK_INLINE float rk_sum_of(const float *x, int64_t columns, float shift, const int squares) {
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

/* The sum, and the lowest or highest element; any order gives the same. */
RK_INLINE i32v rk_add(i32v a, i32v b) { return a + b; }
#if RK_WIDTH == 16
#define RK_ACROSS(v, f) v = f(v, RK_EXCHANGE(v, 8)); v = f(v, RK_EXCHANGE(v, 4)); v = f(v, RK_EXCHANGE(v, 2)); v = f(v, RK_EXCHANGE(v, 1))
#elif RK_WIDTH == 8
#define RK_ACROSS(v, f) v = f(v, RK_EXCHANGE(v, 4)); v = f(v, RK_EXCHANGE(v, 2)); v = f(v, RK_EXCHANGE(v, 1))
#else
#define RK_ACROSS(v, f) v = f(v, RK_EXCHANGE(v, 2)); v = f(v, RK_EXCHANGE(v, 1))
#endif
RK_INLINE int32_t rk_sum_across(i32v v) { RK_ACROSS(v, rk_add); return v[0]; }
RK_INLINE float rk_lowest_of(f32v v) { RK_ACROSS(v, rk_lowest); return v[0]; }
RK_INLINE float rk_highest_of(f32v v) { RK_ACROSS(v, rk_highest); return v[0]; }

/* Flush subnormal numbers to zero while a kernel runs; returns what rk_leave puts back. */
#if defined(__x86_64__)
#include <xmmintrin.h>
RK_INLINE uint64_t rk_enter(void) { uint32_t old = _mm_getcsr(); _mm_setcsr(old | 0x8040); return old; }
RK_INLINE void rk_leave(uint64_t old) { _mm_setcsr((uint32_t)old); }
#elif defined(__aarch64__)
RK_INLINE uint64_t rk_enter(void) {
    uint64_t old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"(old | (1u << 24)));
    return old;
}
RK_INLINE void rk_leave(uint64_t old) { __asm__ volatile("msr fpcr, %0" : : "r"(old)); }
#else
RK_INLINE uint64_t rk_enter(void) { return 0; }
RK_INLINE void rk_leave(uint64_t old) { (void)old; }
#endif

#endif
