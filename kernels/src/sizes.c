/* Bytes of operands. */
#include "attention_chunks.h"
#include "common.h"

int64_t rk_row_bytes(const rk_part *part) { return rk_row_size(part); }

int64_t rk_tile_bytes(const rk_part *part, int32_t weight_bits) { return rk_tile_size(part, weight_bits); }

int64_t rk_head_bytes(const rk_head *head) {
    return (head->low + 1) / 2 + head->high + 5 * ((head->low > 0) + (head->high > 0));
}

int64_t rk_attention_scratch(const rk_attention_args *a) {
    const int64_t heads = a->batch * a->kv_heads, chunks = chunks_of_keys(a);
    return chunks > 1 ? heads * (4 + chunks * rows_of(a) * (a->value.low + a->value.high + 2) * 4) : 0;
}

#define EXACT_PRODUCTS 8 /* as many products of codes take the time of one of floats */

int32_t rk_latent_expands(const rk_latent_attention_args *a) {
    const double latent = a->latent.low + a->latent.high, rotary = a->rotary.low + a->rotary.high, pairs = (double)a->tokens * (double)a->total;
    const double weights = latent * (double)(a->own + a->values);
    const double turned = (double)a->tokens * weights + pairs * (2 * latent + rotary);
    return (double)a->total * weights / EXACT_PRODUCTS + pairs * ((double)(a->own + a->values) + rotary) < turned;
}
