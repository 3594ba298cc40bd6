/* A cache whose rows are read back as floats, all of them, with the new ones written behind what is there: operands in resq_kernels.h. */
#include "cache_rows.h"

static int64_t cache_image_units(const rk_cache_image_args *a) { return a->batch * a->heads * a->total; }

RK_INLINE f32v code_image(i32v codes, float zero_point, float scale) {
    return (__builtin_convertvector(codes, f32v) - zero_point) * scale;
}

/* y = (codes - zero point) * scale of codes that lie two a byte, their first half in the low nibbles. */
static void read_nibbles(const uint8_t *bytes, int64_t width, float zero_point, float scale, float *y) {
    const int64_t half = width / 2;
    int64_t i = 0;
    for (; i + RK_WIDTH <= half; i += RK_WIDTH) {
        const i32v both = rk_load_bytes(bytes + i);
        rk_store(y + i, code_image(both & 15, zero_point, scale));
        rk_store(y + half + i, code_image(both >> 4, zero_point, scale));
    }
    for (; i < half; i++) {
        y[i] = ((float)(bytes[i] & 15) - zero_point) * scale;
        y[half + i] = ((float)(bytes[i] >> 4) - zero_point) * scale;
    }
    if (width % 2)
        y[width - 1] = ((float)bytes[half] - zero_point) * scale;
}

static void read_bytes(const uint8_t *bytes, int64_t width, float zero_point, float scale, float *y) {
    int64_t i = 0;
    for (; i + RK_WIDTH <= width; i += RK_WIDTH)
        rk_store(y + i, code_image(rk_load_bytes(bytes + i), zero_point, scale));
    for (; i < width; i++)
        y[i] = ((float)bytes[i] - zero_point) * scale;
}

/* The inverse of write_row. */
static void read_row(const rk_head *h, const uint8_t *row, float *y) {
    const int64_t low_bytes = (h->low + 1) / 2;
    const int parts = (h->low > 0) + (h->high > 0);
    const uint8_t *zero_points = row + low_bytes + h->high;
    float scales[2];
    memcpy(scales, zero_points + parts, sizeof(float) * (size_t)parts);
    if (h->low)
        read_nibbles(row, h->low, (float)zero_points[0], scales[0], y);
    if (h->high)
        read_bytes(row + low_bytes, h->high, (float)zero_points[parts - 1], scales[parts - 1], y + h->low);
}

static void cache_image(const rk_cache_image_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t columns = a->head.low + a->head.high, bytes = rk_head_bytes(&a->head);
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t head = unit / a->total, slot = unit % a->total, token = slot - a->start[head / a->heads];
        uint8_t *row = a->cache + (head * a->capacity + slot) * bytes;
        if (token >= 0 && token < a->tokens)
            write_row(&a->head, a->x + (head * a->tokens + token) * columns, a->clip, row);
        read_row(&a->head, row, a->out + unit * columns);
    }
    rk_leave(mode);
}
