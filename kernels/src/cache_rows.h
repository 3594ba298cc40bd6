/* Writing one token of a cached head: the layout is in resq_kernels.h. */
#ifndef RK_CACHE_ROWS_H
#define RK_CACHE_ROWS_H

#include "quantize.h"

#define CODES_SPACE (RK_MAX_ENTRY + 2 * 16) /* room for whole vectors behind the codes and behind their first half */

RK_INLINE u8v load_vector(const uint8_t *p) { u8v v; memcpy(&v, p, sizeof v); return v; }
RK_INLINE void store_vector(uint8_t *p, u8v v) { memcpy(p, &v, sizeof v); }

/* Codes of `width` values, unsigned, a byte each; returns the quantizer. */
RK_INLINE quantizer unsigned_codes(const float *x, int64_t width, int bits, float clip, uint8_t codes[CODES_SPACE]) {
    const quantizer q = quantizer_of(x, width, bits, clip);
    store_codes(q, x, width, 0, (int8_t *)codes);
    for (int64_t i = 0; i < width; i += RK_WIDTH)
        store_vector(codes + i, load_vector(codes + i) - (uint8_t)q.lowest);
    return q;
}

/* Two codes a byte: the first half of the columns in the low nibbles, the second half in the high ones; an odd column alone. */
RK_INLINE void pack_nibbles(const uint8_t codes[CODES_SPACE], int64_t width, uint8_t *bytes) {
    const int64_t half = width / 2;
    uint8_t packed[CODES_SPACE];
    for (int64_t i = 0; i < half; i += RK_WIDTH)
        store_vector(packed + i, load_vector(codes + i) | load_vector(codes + half + i) << 4);
    memcpy(bytes, packed, (size_t)half);
    if (width % 2)
        bytes[half] = codes[width - 1];
}

/* Quantize a head of x into a row of the cache. */
static inline void write_row(const rk_head *h, const float *x, float clip, uint8_t *row) {
    const int64_t low_bytes = (h->low + 1) / 2;
    uint8_t codes[CODES_SPACE] = {0}, *zero_points = row + low_bytes + h->high;
    float scales[2];
    int parts = 0;
    if (h->low) {
        const quantizer q = unsigned_codes(x, h->low, h->low_bits, clip, codes);
        pack_nibbles(codes, h->low, row);
        zero_points[parts] = (uint8_t)((int)q.zero_point - q.lowest);
        scales[parts++] = q.scale;
    }
    if (h->high) {
        const quantizer q = unsigned_codes(x + h->low, h->high, h->high_bits, clip, codes);
        memcpy(row + low_bytes, codes, (size_t)h->high);
        zero_points[parts] = (uint8_t)((int)q.zero_point - q.lowest);
        scales[parts++] = q.scale;
    }
    memcpy(zero_points + parts, scales, sizeof(float) * (size_t)parts);
}

#endif
