/* Vectors of bytes and of 16-bit integers to and from lanes of 32 bits; compilers take generic conversions of these apart. */
#ifndef RK_NARROW_H
#define RK_NARROW_H

#include "common.h"

/* RK_WIDTH unsigned bytes. */
RK_INLINE i32v rk_load_bytes(const uint8_t *p) {
#if defined(__AVX512F__)
    return (i32v)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (i32v)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#elif defined(__aarch64__)
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return (i32v)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
#else
    u8v v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, i32v);
#endif
}

/* The lowest byte of every lane, RK_WIDTH bytes. */
RK_INLINE void rk_store_bytes(void *p, i32v v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
    const __m256i in_order = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
    const __m128i low = _mm256_castsi256_si128(in_order), high = _mm256_extracti128_si256(in_order, 1);
    _mm_storel_epi64(p, _mm_unpacklo_epi32(low, high));
#elif defined(__aarch64__)
    const int16x4_t half = vmovn_s32((int32x4_t)v);
    vst1_lane_s32(p, vreinterpret_s32_s8(vmovn_s16(vcombine_s16(half, half))), 0);
#else
    const i8v bytes = __builtin_convertvector(v, i8v);
    memcpy(p, &bytes, sizeof bytes);
#endif
}

/* The same with 16 bits; lanes hold what fits into them. */
RK_INLINE void rk_store_halves(int16_t *p, i32v v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1)));
#elif defined(__aarch64__)
    vst1_s16(p, vmovn_s32((int32x4_t)v));
#else
    typedef int16_t i16half __attribute__((vector_size(2 * RK_WIDTH)));
    const i16half halves = __builtin_convertvector(v, i16half);
    memcpy(p, &halves, sizeof halves);
#endif
}

#endif
