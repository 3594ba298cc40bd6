/* A linear whose input has parts of different precision, all in one pass: formula and operands in resq_kernels.h.
 *
 * A unit is a tile of 64 channels and at most UNIT_ROWS rows. Within it, blocks of DOT_ROWS rows go over the tile: integer sums of
 * a run into acc, then a float epilogue adds them to y. Weights are unpacked in registers, for one row as for many.
 * With stored weights w + offset and codes q:  sum (q - z) w = sum q (w + offset) - offset sum q - z sum w. */
#include "dot.h"

#define UNIT_ROWS 96

typedef struct {
    const rk_mixed_linear_args *args;
    int64_t tile, first_channel, channels; /* channels: of this tile, 64 but for the last */
    int64_t runs;
} tile_view;

static int64_t chunks_of(const rk_mixed_linear_args *a) { return (a->rows + UNIT_ROWS - 1) / UNIT_ROWS; }

static int64_t mixed_linear_units(const rk_mixed_linear_args *a) {
    return chunks_of(a) * ((a->channels + RK_TILE - 1) / RK_TILE);
}

static int is_nibbles(const rk_linear_part *p) { return p->weight_bits <= 4; }

/* The 64 values of a tile from a row of `channels` values; padded with zeros in `space` when there are fewer. */
static const void *of_tile(const tile_view *t, const void *row, uint32_t space[RK_TILE]) {
    const uint32_t *values = (const uint32_t *)row + t->first_channel;
    if (t->channels == RK_TILE)
        return values;
    memset(space, 0, sizeof(uint32_t) * RK_TILE);
    memcpy(space, values, sizeof(uint32_t) * (size_t)t->channels);
    return space;
}

/* What a block of rows adds to y: one run of a part. */
typedef struct {
    const tile_view *tile;
    const rk_linear_part *part;
    int64_t row, run; /* run: among those of all parts */
    int rows, group;  /* group: among those of this part */
} run_view;

/* y[r] (+)= float(acc[r] - offset sum q - z sum w) * factor: scale * weight_scale, or in a part of several runs only the row's
 * scale. first: y is written, not added to. */
RK_INLINE void add_sums(const run_view *v, const int32_t *acc, const float *weight_scale, const int first, float *y) {
    const rk_mixed_linear_args *a = v->tile->args;
    const rk_part *p = &v->part->part;
    uint32_t space[RK_TILE];
    const uint32_t *weight_sum = of_tile(v->tile, a->weight_sum + v->run * a->channels, space);
    const uint32_t offset = is_nibbles(v->part) ? NIBBLE_OFFSET : BYTE_OFFSET;
    const int64_t stride = rk_row_bytes(p), runs = v->tile->runs;
    const int8_t *code_sums = v->part->x + v->row * stride + p->groups * rk_stride(p) + 4 * v->group;
    for (int r = 0; r < v->rows; r++, acc += RK_TILE, y += RK_TILE) {
        const uint32_t from_codes = offset * (uint32_t)rk_load32(code_sums + r * stride);
        const uint32_t zero_point = (uint32_t)a->zero_point[(v->row + r) * runs + v->run];
        const float scale = a->scale[(v->row + r) * runs + v->run];
#pragma GCC unroll 4
        for (int i = 0; i < RK_TILE; i += RK_WIDTH) {
            u32v sum = rk_load_u32(acc + i) - from_codes - zero_point * rk_load_u32(weight_sum + i);
            f32v value = rk_floats(sum) * (weight_scale ? scale * rk_load(weight_scale + i) : rk_splat(scale));
            rk_store(y + i, first ? value : rk_load(y + i) + value);
        }
    }
}

static void multiply(const run_view *v, int32_t *acc) {
    const rk_part *p = &v->part->part;
    const int64_t blocks = rk_stride(p) / 8, stride = rk_row_bytes(p);
    const int8_t *x = v->part->x + v->row * stride + v->group * rk_stride(p);
    const uint8_t *weight = v->part->weight + v->tile->tile * rk_tile_bytes(p, v->part->weight_bits);
    if (is_nibbles(v->part))
        dot_nibbles(weight + v->group * blocks * NIBBLE_BLOCK, blocks, x, stride, v->rows, acc);
    else
        dot_bytes(weight + v->group * blocks * BYTE_BLOCK, blocks, x, stride, v->rows, acc);
}

/* A part of one run. */
static void add_whole(const run_view *v, const float *weight_scale, int first, float *y) {
    int32_t acc[DOT_ROWS * RK_TILE];
    multiply(v, acc);
    if (first)
        add_sums(v, acc, weight_scale, 1, y);
    else
        add_sums(v, acc, weight_scale, 0, y);
}

/* A part of several runs: their sum, then times weight_scale. */
static void add_grouped(run_view v, const float *weight_scale, int first, float *y) {
    float sum[DOT_ROWS * RK_TILE];
    for (v.group = 0; v.group < v.part->part.groups; v.group++, v.run++) {
        int32_t acc[DOT_ROWS * RK_TILE];
        multiply(&v, acc);
        if (v.group == 0)
            add_sums(&v, acc, 0, 1, sum);
        else
            add_sums(&v, acc, 0, 0, sum);
    }
    for (int i = 0; i < v.rows * RK_TILE; i += RK_WIDTH) {
        f32v value = rk_load(sum + i) * rk_load(weight_scale + i % RK_TILE);
        rk_store(y + i, first ? value : rk_load(y + i) + value);
    }
}

/* y = sum + bias + residual of one row of a full tile; bias and residual may be NULL. */
RK_INLINE void finish_tile_row(const float *sum, const float *bias, const float *residual, float *y) {
    for (int i = 0; i < RK_TILE; i += RK_WIDTH) {
        f32v v = rk_load(sum + i);
        v = bias ? v + rk_load(bias + i) : v;
        rk_store(y + i, residual ? v + rk_load(residual + i) : v);
    }
}

static void finish_row(const tile_view *t, int64_t row, const float *sum) {
    const rk_mixed_linear_args *a = t->args;
    const float *bias = a->bias ? a->bias + t->first_channel : 0;
    const float *residual = a->residual ? a->residual + row * a->residual_stride + t->first_channel : 0;
    float *y = a->y + row * a->y_stride + t->first_channel;
    if (t->channels == RK_TILE) {
        finish_tile_row(sum, bias, residual, y);
        return;
    }
    for (int64_t c = 0; c < t->channels; c++) {
        float value = bias ? sum[c] + bias[c] : sum[c];
        y[c] = residual ? value + residual[c] : value;
    }
}

static void tile_rows(const tile_view *t, int64_t row, int rows) {
    const rk_mixed_linear_args *a = t->args;
    float y[DOT_ROWS * RK_TILE];
    run_view v = {t, a->part, row, 0, rows, 0};
    for (int i = 0; i < a->parts; i++, v.run += v.part->part.groups, v.part++) {
        uint32_t space[RK_TILE];
        const float *weight_scale = of_tile(t, a->weight_scale + i * a->channels, space);
        if (v.part->part.groups == 1)
            add_whole(&v, weight_scale, i == 0, y);
        else
            add_grouped(v, weight_scale, i == 0, y);
    }
    for (int r = 0; r < rows; r++)
        finish_row(t, row + r, y + RK_TILE * r);
}

static void mixed_linear(const rk_mixed_linear_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t chunks = chunks_of(a);
    int64_t runs = 0;
    for (int i = 0; i < a->parts; i++)
        runs += a->part[i].part.groups;
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t tile = unit / chunks, first = tile * RK_TILE;
        const tile_view view = {a, tile, first, rk_min(RK_TILE, a->channels - first), runs};
        const int64_t last_row = rk_min(a->rows, (unit % chunks + 1) * UNIT_ROWS);
        for (int64_t row = unit % chunks * UNIT_ROWS; row < last_row; row += DOT_ROWS)
            tile_rows(&view, row, (int)rk_min(DOT_ROWS, last_row - row));
    }
    rk_leave(mode);
}
