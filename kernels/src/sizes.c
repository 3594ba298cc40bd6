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
