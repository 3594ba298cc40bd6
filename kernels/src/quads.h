/* Sums of products of the cache's unsigned bytes, four to a lane, with signed or unsigned ones: what attention computes with. All are exact,
 * on every instruction set, but for a multiple of the sum of the others where BYTE_SHIFT or rk_dot_unsigned says so. */
#ifndef RK_QUADS_H
#define RK_QUADS_H

#include "narrow.h"

RK_INLINE i32v rk_load_i32(const void *p) { i32v v; memcpy(&v, p, sizeof v); return v; }
RK_INLINE void rk_store_i32(int32_t *p, i32v v) { memcpy(p, &v, sizeof v); }
RK_INLINE i32v rk_splat_i32(int32_t x) { return x - (i32v){0}; }

/* What rk_dot_quads subtracts from bytes that are not nibbles, since Arm multiplies signed ones only. */
#if defined(RK_NEON_DOTPROD) || defined(RK_NEON_I8MM)
#define BYTE_SHIFT 128
#else
#define BYTE_SHIFT 0
#endif

/* sum + a0 b0 + a1 b1 + a2 b2 + a3 b3 of every lane, a unsigned, b signed; nibbles: a are at most 15. */
RK_INLINE i32v rk_dot_quads(i32v sum, i32v a, i32v b, const int nibbles) {
#if defined(RK_AVX512VNNI)
    (void)nibbles;
    return (i32v)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(RK_AVXVNNI)
    (void)nibbles;
    return (i32v)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(RK_AVX2)
    const __m256i low = nibbles ? (__m256i)a : (__m256i)(a & 0x0f0f0f0f), high = (__m256i)((u32v)a >> 4 & 0x0f0f0f0f);
    sum += (i32v)_mm256_madd_epi16(_mm256_maddubs_epi16(low, (__m256i)b), _mm256_set1_epi16(1));
    return nibbles ? sum : sum + (i32v)_mm256_madd_epi16(_mm256_maddubs_epi16(high, (__m256i)b), _mm256_set1_epi16(16));
#elif defined(RK_NEON_DOTPROD) || defined(RK_NEON_I8MM)
    const int8x16_t bytes = nibbles ? (int8x16_t)a : veorq_s8((int8x16_t)a, vdupq_n_s8(-128));
    return (i32v)vdotq_s32((int32x4_t)sum, bytes, (int8x16_t)b);
#else
    (void)nibbles;
    for (int i = 0; i < 32; i += 8)
        sum += (i32v)((u32v)a >> i & 255) * ((i32v)((u32v)b << (24 - i)) >> 24);
    return sum;
#endif
}

/* The same with unsigned b. Bytes that are not nibbles may all have the same number subtracted from them, a power of two or none. */
RK_INLINE i32v rk_dot_unsigned(i32v sum, i32v a, i32v b, const int nibbles) {
#if defined(RK_AVX512VNNI) || defined(RK_AVXVNNI)
    return rk_dot_quads(sum, b, nibbles ? a : a ^ (int32_t)0x80808080, 0);
#elif defined(RK_AVX2)
    const __m256i low = nibbles ? (__m256i)a : (__m256i)(a & 0x0f0f0f0f), high = (__m256i)((u32v)a >> 4 & 0x0f0f0f0f);
    sum += (i32v)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)b, low), _mm256_set1_epi16(1));
    return nibbles ? sum : sum + (i32v)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)b, high), _mm256_set1_epi16(16));
#elif defined(RK_NEON_DOTPROD) || defined(RK_NEON_I8MM)
    (void)nibbles;
    return (i32v)vdotq_u32((uint32x4_t)sum, (uint8x16_t)a, (uint8x16_t)b);
#else
    (void)nibbles;
    for (int i = 0; i < 32; i += 8)
        sum += (i32v)(((u32v)a >> i & 255) * ((u32v)b >> i & 255));
    return sum;
#endif
}

/* One load, not one for each product with it. */
#if defined(__x86_64__)
#define KEEP_IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define KEEP_IN_REGISTER(v) (void)0
#endif

#if defined(__AVX512F__)
#define ACROSS(name, a, b, ...) (i32v)_mm512_##name((__m512i)(a), (__m512i)(b), ##__VA_ARGS__)
#elif defined(__AVX2__)
#define ACROSS(name, a, b, ...) (i32v)_mm256_##name((__m256i)(a), (__m256i)(b), ##__VA_ARGS__)
#endif

/* Four vectors of rows of four lanes, v[i] with rows i, i + 4, ...: lane k of row j becomes lane j of quads[k]. */
RK_INLINE void rk_transpose_fours(const i32v v[4], i32v quads[4]) {
#if defined(__AVX2__)
    const i32v a = ACROSS(unpacklo_epi32, v[0], v[1]), b = ACROSS(unpackhi_epi32, v[0], v[1]);
    const i32v c = ACROSS(unpacklo_epi32, v[2], v[3]), d = ACROSS(unpackhi_epi32, v[2], v[3]);
    quads[0] = ACROSS(unpacklo_epi64, a, c), quads[1] = ACROSS(unpackhi_epi64, a, c);
    quads[2] = ACROSS(unpacklo_epi64, b, d), quads[3] = ACROSS(unpackhi_epi64, b, d);
#else
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        quads[i] = (i32v){v[0][i], v[1][i], v[2][i], v[3][i]};
#endif
}

#endif
