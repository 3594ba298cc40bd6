/* Products of float vectors with the packed weights that make keys and values from a cached vector, for a few rows at a time: weights are
 * unpacked in registers and every sum is in float, in the same order with every instruction set. */
#ifndef RK_LATENT_WEIGHTS_H
#define RK_LATENT_WEIGHTS_H

#include "narrow.h"

#define PARTIAL 16 /* channels that are added up side by side */

/* Column j of a block of eight for RK_WIDTH channels of its tile, the first a multiple of RK_WIDTH. */
RK_INLINE f32v weight_column(const uint8_t *block, int64_t channel, const int nibbles, const int j) {
    u32v word;
    memcpy(&word, block + 4 * channel + (nibbles || j < 4 ? 0 : 256), sizeof word);
    const u32v code = nibbles ? word >> (8 * (j % 4) + 4 * (j / 4)) & 15 : word >> (8 * (j % 4)) & 255;
    return __builtin_convertvector((i32v)code - (nibbles ? 8 : 128), f32v);
}

/* y[8 b + j] = sum_c x[c] w[c][8 b + j] over channels [first, last), which are multiples of PARTIAL; x begins with the first. */
RK_INLINE void columns_of_channels(const rk_linear_part *p, int64_t first, int64_t last, const float *x, float *y, const int nibbles) {
    const int64_t blocks = rk_stride(&p->part) / 8, block = nibbles ? 256 : 512;
    for (int64_t b = 0; b < blocks; b++) {
        rk_lanes sums[8] = {{{{0}}}};
        for (int64_t c = first; c < last; c += PARTIAL) {
            const uint8_t *at = p->weight + (c / RK_TILE * blocks + b) * block;
#pragma GCC unroll 4
            for (int i = 0; i < PARTIAL / RK_WIDTH; i++) {
                const f32v factor = rk_load(x + c - first + i * RK_WIDTH);
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++)
                    sums[j].part[i] += factor * weight_column(at, c % RK_TILE + i * RK_WIDTH, nibbles, j);
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            y[8 * b + j] = rk_total(sums[j]);
    }
}

/* sums[c] = sum_k x[k] w[c][k] for RK_WIDTH channels from c, a multiple of RK_WIDTH; x is finite up to the part's stride. */
RK_INLINE f32v channels_of_columns(const rk_linear_part *p, int64_t c, const float *x, const int nibbles) {
    const int64_t blocks = rk_stride(&p->part) / 8, block = nibbles ? 256 : 512;
    const uint8_t *at = p->weight + c / RK_TILE * blocks * block;
    f32v sums[8] = {{0}};
    for (int64_t b = 0; b < blocks; b++, at += block)
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            sums[j] += x[8 * b + j] * weight_column(at, c % RK_TILE, nibbles, j);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

/* y[k] = sum_c x[c] scale[c] w[c][k] over `count` channels from `first`, for all columns of all parts; up to 7 more of y are written. */
static void turn_into_columns(const rk_latent_attention_args *a, int64_t first, int64_t count, const float *x, float *y) {
    const int64_t channels = a->heads * (a->own + a->values), begin = first / PARTIAL * PARTIAL, end = rk_round_up(first + count, PARTIAL);
    float scaled[RK_MAX_HEAD + 2 * PARTIAL];
    for (int i = 0; i < a->parts; y += a->part[i++].part.width) {
        const float *scale = a->weight_scale + i * channels + first;
        memset(scaled, 0, sizeof(float) * (size_t)(end - begin));
        for (int64_t c = 0; c < count; c++)
            scaled[first - begin + c] = x[c] * scale[c];
        if (a->part[i].weight_bits <= 4)
            columns_of_channels(&a->part[i], begin, end, scaled, y, 1);
        else
            columns_of_channels(&a->part[i], begin, end, scaled, y, 0);
    }
}

/* y[c] = sum over parts of scale[c] sum_k x[k] w[c][k], for `count` channels from `first`. */
static void turn_into_channels(const rk_latent_attention_args *a, int64_t first, int64_t count, const float *x, float *y) {
    const int64_t channels = a->heads * (a->own + a->values), begin = first / RK_WIDTH * RK_WIDTH;
    memset(y, 0, sizeof(float) * (size_t)count);
    for (int i = 0; i < a->parts; x += a->part[i++].part.width) {
        const float *scale = a->weight_scale + i * channels;
        for (int64_t c = begin; c < first + count; c += RK_WIDTH) {
            float sums[RK_WIDTH];
            rk_store(sums, a->part[i].weight_bits <= 4 ? channels_of_columns(&a->part[i], c, x, 1) : channels_of_columns(&a->part[i], c, x, 0));
            for (int64_t j = c < first ? first - c : 0; j < rk_min(RK_WIDTH, first + count - c); j++)
                y[c + j - first] += scale[c + j] * sums[j];
        }
    }
}

#endif
