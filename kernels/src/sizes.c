/* Bytes of operands. */
#include "common.h"

int64_t rk_row_bytes(const rk_part *part) { return part->groups * (rk_stride(part) + 4); }

int64_t rk_tile_bytes(const rk_part *part, int32_t weight_bits) {
    return part->groups * rk_stride(part) * (weight_bits <= 4 ? 32 : 64);
}

int64_t rk_head_bytes(const rk_head *head) {
    return (head->low + 1) / 2 + head->high + 5 * ((head->low > 0) + (head->high > 0));
}
