/* How attention is cut into units, and what room that takes. */
#ifndef RK_ATTENTION_CHUNKS_H
#define RK_ATTENTION_CHUNKS_H

#include "resq_kernels.h"

#define LANES 96 /* rows of a unit */
#define CHUNK_KEYS 256
#define FEW_KEYS 64

static inline int64_t rows_of(const rk_attention_args *a) { return a->tokens * (a->heads / a->kv_heads); }
static inline int64_t row_tiles(const rk_attention_args *a) { return (rows_of(a) + LANES - 1) / LANES; }

/* The first key that a query in this slot sees. */
static inline int64_t first_key_of(const rk_attention_args *a, int64_t slot) {
    return a->window && slot >= a->window ? slot - a->window + 1 : 0;
}

/* Chunks of keys: as many for every sequence as the longest needs, and two from a few keys on, since heads are few and threads may be
 * none of their divisors; 1 unless all rows of a key head are one unit. */
static inline int64_t chunks_of_keys(const rk_attention_args *a) {
    int64_t longest = 1;
    for (int64_t b = 0; b < a->batch && row_tiles(a) == 1; b++) {
        const int64_t keys = a->start[b] + a->tokens - first_key_of(a, a->start[b]);
        longest = keys > longest ? keys : longest;
    }
    const int64_t chunks = (longest + CHUNK_KEYS - 1) / CHUNK_KEYS;
    return chunks == 1 && longest > FEW_KEYS ? 2 : chunks;
}

#endif
