/* New rows of a cache, and the codes of all rows as linears read them: operands in resq_kernels.h. */
#include "cache_rows.h"

static int64_t cache_codes_units(const rk_cache_codes_args *a) { return a->batch * a->heads * (a->out.parts ? a->total : a->tokens); }

/* Some columns of a row less `zero`, zeros up to a multiple of 8; their sum. */
static int32_t signed_codes(const rk_head *h, const uint8_t *row, int64_t first, int64_t width, int zero, int8_t *codes) {
    const int64_t half = h->low / 2, high = (h->low + 1) / 2 - h->low;
    int32_t sum = 0;
    for (int64_t i = first; i < first + width; i++) {
        const int is_low = i < h->low;
        int stored = is_low ? (i < half || i == 2 * half ? row[i == 2 * half ? half : i] : row[i - half] >> 4) : row[i + high];
        if (is_low && i < half)
            stored &= 15;
        sum += codes[i - first] = (int8_t)(stored - zero);
    }
    memset(codes + width, 0, (size_t)(rk_round_up(width, 8) - width));
    return sum;
}

static void codes_of_row(const rk_cache_codes_args *a, const uint8_t *row, int64_t index) {
    const rk_head *h = &a->head;
    const int parts = (h->low > 0) + (h->high > 0);
    const uint8_t *zero_points = row + (h->low + 1) / 2 + h->high;
    int64_t first = 0;
    for (int i = 0; i < a->out.parts; first += a->out.part[i++].width) {
        const rk_part *p = &a->out.part[i];
        const int from = first < h->low ? 0 : parts - 1, bits = first < h->low ? h->low_bits : h->high_bits;
        const int zero = RK_CENTRED(bits) ? zero_points[from] : 1 << (bits - 1);
        int8_t *codes = a->out.rows[i] + index * rk_row_size(p);
        const int32_t sum = signed_codes(h, row, first, p->width, zero, codes);
        memcpy(codes + rk_stride(p), &sum, sizeof sum);
        memcpy(a->out.scale + index * a->out.parts + i, zero_points + parts + 4 * from, sizeof(float));
        a->out.zero_point[index * a->out.parts + i] = zero_points[from] - zero;
    }
}

static void cache_codes(const rk_cache_codes_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t columns = a->head.low + a->head.high, bytes = rk_head_bytes(&a->head), rows = a->out.parts ? a->total : a->tokens;
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t head = unit / rows, start = a->start[head / a->heads];
        const int64_t slot = unit % rows + (a->out.parts ? 0 : start), token = slot - start;
        uint8_t *row = a->cache + (head * a->capacity + slot) * bytes;
        if (token >= 0 && token < a->tokens)
            write_row(&a->head, a->x + (head * a->tokens + token) * columns, a->clip, row);
        if (a->out.parts)
            codes_of_row(a, row, unit);
    }
    rk_leave(mode);
}
