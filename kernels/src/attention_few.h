/* Keys and values of a tile multiplied as they lie in the cache: for tiles of few queries, as in decoding, where unpacking them first
 * would take longer than multiplying. */
#ifndef RK_ATTENTION_FEW_H
#define RK_ATTENTION_FEW_H

#include "attention_rows.h"

#if defined(__AVX512F__) /* elsewhere bringing four rows side by side takes too long, and registers are too few */
#include "cached_keys.h"
#include "cached_values.h"
#define TAKES_CACHED 1
#else
#define TAKES_CACHED 0
RK_INLINE void cached_score_rows(attention_space *w, int64_t keys, const int rows) { (void)w, (void)keys, (void)rows; }
RK_INLINE void weigh_few(attention_space *w, int64_t keys, const int rows) { (void)w, (void)keys, (void)rows; }
RK_INLINE void cached_value_rows(attention_space *w, int64_t keys, const int rows) { (void)w, (void)keys, (void)rows; }
#endif

/* Whether keys are multiplied so. */
RK_INLINE int takes_cached_keys(const query_tile *t, const head_layout *l) {
    return TAKES_CACHED && t->rows <= BLOCK_ROWS && in_whole_quads(l);
}

/* Whether a tile of so many values is multiplied so. */
RK_INLINE int takes_cached_values(const query_tile *t, const head_layout *l, const cache_reader *r, int64_t keys) {
    return TAKES_CACHED && t->rows <= BLOCK_ROWS && l->width[0] % 2 == 0 && r->left >= rk_round_up(keys, 16) * r->bytes + SLACK;
}

#endif
