/* What all kernels share: vectors as wide as the registers, and small helpers.
 *
 * Arithmetic on vectors is elementwise and never contracted to fused multiply-add, so that every instruction set gives the same
 * bits; sums over columns run in 16 lanes, whatever the width, that are added in a fixed order. */
#ifndef RK_COMMON_H
#define RK_COMMON_H

#include <stdint.h>
#include <string.h>

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

RK_INLINE int64_t rk_min(int64_t a, int64_t b) { return a < b ? a : b; }
RK_INLINE int64_t rk_round_up(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }
RK_INLINE int64_t rk_stride(const rk_part *p) { return rk_round_up(p->width, 8); }

RK_INLINE f32v rk_load(const float *p) { f32v v; memcpy(&v, p, sizeof v); return v; }
RK_INLINE void rk_store(float *p, f32v v) { memcpy(p, &v, sizeof v); }
RK_INLINE u32v rk_load_u32(const void *p) { u32v v; memcpy(&v, p, sizeof v); return v; }
RK_INLINE f32v rk_splat(float x) { return x - (f32v){0}; }
RK_INLINE f32v rk_floats(u32v v) { return __builtin_convertvector((i32v)v, f32v); }

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
