/* Writing and reading one token of a cached head: the layout is in resq_kernels.h. */
#ifndef RK_CACHE_ROWS_H
#define RK_CACHE_ROWS_H

#include "quantize.h"

#define CODES_SPACE (RK_MAX_HEAD + 2 * 16) /* room for whole vectors behind the codes and behind their first half */

RK_INLINE u8v load_vector(const uint8_t *p) { u8v v; memcpy(&v, p, sizeof v); return v; }
RK_INLINE void store_vector(uint8_t *p, u8v v) { memcpy(p, &v, sizeof v); }

/* Codes of `width` values, unsigned, a byte each; returns the quantizer. */
RK_INLINE quantizer unsigned_codes(const float *x, int64_t width, int bits, float clip, uint8_t codes[CODES_SPACE]) {
    const quantizer q = quantizer_of(x, width, bits, clip);
    store_codes(q, x, width, (int8_t *)codes);
    for (int64_t i = 0; i < width; i += RK_WIDTH)
        store_vector(codes + i, load_vector(codes + i) - (uint8_t)q.lowest);
    return q;
}

/* Two codes a byte: the first half of the columns in the low nibbles, the second half in the high ones; an odd column alone. */
RK_INLINE void pack_nibbles(const uint8_t codes[CODES_SPACE], int64_t width, uint8_t *bytes) {
    const int64_t half = width / 2;
    uint8_t packed[RK_MAX_HEAD];
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

RK_INLINE f32v byte_floats(u8v bytes) { return __builtin_convertvector(__builtin_convertvector(bytes, i32v), f32v); }

/* At most RK_WIDTH bytes; those that are not there are zero. */
RK_INLINE u8v load_bytes(const uint8_t *p, int64_t count) {
    u8v v = {0};
    if (count >= RK_WIDTH)
        memcpy(&v, p, sizeof v);
#if RK_WIDTH > 8
    else if (count == 8)
        memcpy(&v, p, 8);
#endif
    else
        for (int64_t i = 0; i < count; i++)
            v[i] = p[i];
    return v;
}

/* x[i] = ((bytes[i] >> shift & mask) - zero_point) * scale; whole vectors of x are written. */
RK_INLINE void read_codes(const uint8_t *bytes, int64_t count, const int shift, const int mask, float zero_point, float scale,
                          float *x) {
    for (int64_t i = 0; i < count; i += RK_WIDTH) {
        i = count > RK_WIDTH ? rk_min(i, count - RK_WIDTH) : i; /* the last vector overlaps the one before */
        const u8v v = load_bytes(bytes + i, count - i);
        rk_store(x + i, (byte_floats(v >> shift & (uint8_t)mask) - zero_point) * scale);
    }
}

/* The float image of a row of the cache; up to RK_WIDTH values behind it are written too. */
RK_INLINE void read_row(const rk_head *h, const uint8_t *row, float *x) {
    const int64_t half = h->low / 2, low_bytes = (h->low + 1) / 2;
    const uint8_t *zero_points = row + low_bytes + h->high, *scales = zero_points + (h->low > 0) + (h->high > 0);
    float scale;
    memcpy(&scale, scales, 4);
    if (h->low) {
        const float zero_point = zero_points[0];
        read_codes(row, half, 0, 15, zero_point, scale, x);
        read_codes(row, half, 4, 15, zero_point, scale, x + half);
        if (h->low % 2)
            x[h->low - 1] = ((float)row[half] - zero_point) * scale;
        memcpy(&scale, scales + 4 * (h->high > 0), 4);
    }
    if (h->high)
        read_codes(row + low_bytes, h->high, 0, 255, zero_points[h->low > 0], scale, x + h->low);
}

#endif
