/* Bytes of operands. */
#include "common.h"

int64_t rk_row_bytes(const rk_part *part) { return part->groups * (rk_stride(part) + 4); }

int64_t rk_tile_bytes(const rk_part *part, int32_t weight_bits) {
    return part->groups * rk_stride(part) * (weight_bits <= 4 ? 32 : 64);
}
