/* Integer products of a few rows of activation codes with one run of a tile of weights, by instruction set.
 *
 *   dot_nibbles(w, blocks, x, stride, rows, acc)    weights of up to 4 bits; acc[r][c] += sum_k x[r][k] * stored weight[c][k]
 *   dot_bytes(w, blocks, x, stride, rows, acc)      wider weights
 *
 * w: `blocks` blocks of 8 columns, laid out as resq_kernels.h says.  x: rows of codes, `stride` bytes apart.
 * acc: int32 [rows][64], as vectors; rows is a constant, 1..DOT_ROWS. Stored weights are code + NIBBLE_OFFSET or code + BYTE_OFFSET:
 * what these functions multiply with, so a version that takes the offset out itself says 0. Sums wrap modulo 2^32. */
#ifndef RK_DOT_H
#define RK_DOT_H

#include "common.h"

#define NIBBLE_BLOCK 256 /* bytes of a block */
#define BYTE_BLOCK 512
#define NIBBLE_OFFSET 8

RK_INLINE int32_t rk_load32(const int8_t *p) { int32_t v; memcpy(&v, p, 4); return v; }

#define DOT_PARAMETERS const uint8_t *w, int64_t blocks, const int8_t *x, int64_t stride
#define DOT_VECTORS (RK_TILE / RK_WIDTH)

typedef i32v dot_sums[][DOT_VECTORS];

#if defined(RK_AVX512VNNI)
#include "dot_avx512vnni.h"
#elif defined(RK_AVXVNNI) || defined(RK_AVX2)
#include "dot_avx2.h"
#elif defined(RK_NEON_DOTPROD) || defined(RK_NEON_I8MM)
#include "dot_neon.h"
#else
#include "dot_portable.h"
#endif

#endif
