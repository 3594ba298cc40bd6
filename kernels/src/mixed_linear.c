/* A linear whose input has parts of different precision, all in one pass: formula and operands in resq_kernels.h.
 *
 * A unit is a tile of 64 channels and at most UNIT_ROWS rows. Within it, blocks of DOT_ROWS rows go over the tile: integer sums of
 * a run into acc, then a float epilogue adds them to y. Weights are unpacked in registers, for one row as for many.
 * With stored weights w + offset and codes q:  sum (q - z) w = sum q (w + offset) - offset sum q - z sum w, where z is 0 for codes of less
 * than 8 bits, so that their sums of w are needed nowhere. */
#include "dot.h"

#if defined(RK_AMX) /* whole tiles of 16 rows, and weights that are unpacked for each unit */
#define UNIT_ROWS 128
#else
#define UNIT_ROWS 96
#endif

typedef struct {
    const rk_mixed_linear_args *args;
    int64_t tile, first_channel, channels; /* channels: of this tile, 64 but for the last */
    int64_t runs;
    float *y; /* where the first row goes, and floats from row to row */
    int64_t y_stride;
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
    int64_t summed;   /* among those whose sums of weights are there */
    int group;        /* among those of this part */
} run_view;

static int is_centred(const rk_linear_part *p) { return RK_CENTRED(p->part.bits); }
static int sums_of(const rk_linear_part *p) { return is_centred(p) ? 0 : p->part.groups; }

/* - offset sum q - z sum w: what is left of a sum without products */
RK_INLINE void begin_sums(const run_view *v, const int rows, const int nibbles, const int centred, dot_sums acc) {
    const rk_mixed_linear_args *a = v->tile->args;
    const rk_part *p = &v->part->part;
    const uint32_t offset = nibbles ? NIBBLE_OFFSET : BYTE_OFFSET;
    const int64_t stride = rk_row_size(p);
    const int8_t *code_sums = v->part->x + v->row * stride + p->groups * rk_stride(p) + 4 * v->group;
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int i = 0; i < DOT_VECTORS; i++)
            acc[r][i] = (i32v)(((uint32_t)rk_load32(code_sums + r * stride) - (u32v){0}) * -offset);
    if (centred)
        return;
    uint32_t space[RK_TILE];
    const uint32_t *weight_sum = of_tile(v->tile, a->weight_sum + v->summed * a->channels, space);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int i = 0; i < DOT_VECTORS; i++) {
            const uint32_t zero_point = (uint32_t)a->zero_point[(v->row + r) * v->tile->runs + v->run];
            acc[r][i] = (i32v)((u32v)acc[r][i] - zero_point * rk_load_u32(weight_sum + i * RK_WIDTH));
        }
}

/* Sums of products of a run. */
RK_INLINE void sum_run(const run_view *v, const int rows, const int nibbles, const int centred, dot_sums acc) {
    const rk_part *p = &v->part->part;
    const int64_t blocks = rk_stride(p) / 8, stride = rk_row_size(p);
    const int8_t *x = v->part->x + v->row * stride + v->group * rk_stride(p);
    const uint8_t *weight = v->part->weight + (v->tile->tile * p->groups + v->group) * blocks * (nibbles ? NIBBLE_BLOCK : BYTE_BLOCK);
    begin_sums(v, rows, nibbles, centred, acc);
    if (nibbles)
        dot_nibbles(weight, blocks, x, stride, rows, acc);
    else
        dot_bytes(weight, blocks, x, stride, rows, acc);
}

/* Where sums of a part go: to = before + sums + residual, rows of to and residual `stride` and `residual_stride` floats apart. before:
 * [rows][64], or NULL for the first ones; residual: NULL but for the last ones. */
typedef struct {
    const float *before, *residual;
    float *to;
    int64_t stride, residual_stride;
} destination;

RK_INLINE const float *run_scales(const run_view *v) { return v->tile->args->scale + v->row * v->tile->runs + v->run; }

/* A part of one run. */
RK_INLINE void sum_one(run_view v, const int rows, const int nibbles, const int centred, const float *weight_scale, f32v sum[][DOT_VECTORS]) {
    i32v acc[DOT_ROWS][DOT_VECTORS];
    sum_run(&v, rows, nibbles, centred, acc);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        const float of_row = run_scales(&v)[r * v.tile->runs];
#pragma GCC unroll 16
        for (int i = 0; i < DOT_VECTORS; i++)
            sum[r][i] = __builtin_convertvector(acc[r][i], f32v) * (of_row * rk_load(weight_scale + i * RK_WIDTH));
    }
}

/* A part of several runs: their sum, then times weight_scale. */
RK_INLINE void sum_runs(run_view v, const int rows, const int nibbles, const int centred, const float *weight_scale, f32v sum[][DOT_VECTORS]) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int i = 0; i < DOT_VECTORS; i++)
            sum[r][i] = rk_splat(-0.0f); /* adding to it changes nothing, not even the sign of zero */
    for (; v.group < v.part->part.groups; v.group++, v.run++, v.summed++) {
        i32v acc[DOT_ROWS][DOT_VECTORS];
        sum_run(&v, rows, nibbles, centred, acc);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
            for (int i = 0; i < DOT_VECTORS; i++)
                sum[r][i] += __builtin_convertvector(acc[r][i], f32v) * run_scales(&v)[r * v.tile->runs];
        if (rows > 3) /* they do not fit into registers: compilers would keep some there and move them around every run */
            __asm__("" : "+m"(*(f32v (*)[DOT_ROWS][DOT_VECTORS])sum));
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int i = 0; i < DOT_VECTORS; i++)
            sum[r][i] *= rk_load(weight_scale + i * RK_WIDTH);
}

/* to = before + sum + residual; before, residual: whether there are any. */
RK_INLINE void put_sums(const int rows, const int before, const int residual, f32v sum[][DOT_VECTORS], destination d) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int i = 0; i < DOT_VECTORS; i++) {
            f32v value = before ? rk_load(d.before + r * RK_TILE + i * RK_WIDTH) + sum[r][i] : sum[r][i];
            value = residual ? value + rk_load(d.residual + r * d.residual_stride + i * RK_WIDTH) : value;
            rk_store(d.to + r * d.stride + i * RK_WIDTH, value);
        }
}

RK_INLINE void add_part(const run_view *v, const int rows, const float *weight_scale, destination d) {
    f32v sum[DOT_ROWS][DOT_VECTORS];
    const int one = v->part->part.groups == 1;
    if (is_nibbles(v->part) && is_centred(v->part) && one)
        sum_one(*v, rows, 1, 1, weight_scale, sum);
    else if (is_nibbles(v->part) && is_centred(v->part))
        sum_runs(*v, rows, 1, 1, weight_scale, sum);
    else if (one)
        sum_one(*v, rows, is_nibbles(v->part), is_centred(v->part), weight_scale, sum);
    else
        sum_runs(*v, rows, is_nibbles(v->part), is_centred(v->part), weight_scale, sum);
    if (d.before && d.residual)
        put_sums(rows, 1, 1, sum, d);
    else if (d.before)
        put_sums(rows, 1, 0, sum, d);
    else if (d.residual)
        put_sums(rows, 0, 1, sum, d);
    else
        put_sums(rows, 0, 0, sum, d);
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
    float *y = t->y + row * t->y_stride;
    if (t->channels == RK_TILE) {
        finish_tile_row(sum, bias, residual, y);
        return;
    }
    for (int64_t c = 0; c < t->channels; c++) {
        float value = bias ? sum[c] + bias[c] : sum[c];
        y[c] = residual ? value + residual[c] : value;
    }
}

/* Ask for what finish_row writes and reads: there is much to compute before. */
RK_INLINE void prefetch_rows(const tile_view *t, int64_t row, const int rows) {
    const rk_mixed_linear_args *a = t->args;
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < RK_TILE; i += 16) {
            __builtin_prefetch(t->y + (row + r) * t->y_stride + i, 1);
            if (a->residual)
                __builtin_prefetch(a->residual + (row + r) * a->residual_stride + t->first_channel + i);
        }
}

RK_INLINE void block_of_rows(const tile_view *t, int64_t row, const int rows) {
    const rk_mixed_linear_args *a = t->args;
    const int at_once = t->channels == RK_TILE && !a->bias; /* the last part's sums are the result */
    float y[DOT_ROWS * RK_TILE];
    run_view v = {t, a->part, row, 0, 0, 0};
    prefetch_rows(t, row, rows);
    for (int i = 0; i < a->parts; i++, v.run += v.part->part.groups, v.summed += sums_of(v.part), v.part++) {
        uint32_t space[RK_TILE];
        const float *weight_scale = of_tile(t, a->weight_scale + i * a->channels, space);
        destination d = {i ? y : 0, 0, y, RK_TILE, a->residual_stride};
        if (at_once && i == a->parts - 1) {
            d.to = t->y + row * t->y_stride, d.stride = t->y_stride;
            d.residual = a->residual ? a->residual + row * a->residual_stride + t->first_channel : 0;
        }
        add_part(&v, rows, weight_scale, d);
    }
    for (int r = 0; r < rows && !at_once; r++)
        finish_row(t, row + r, y + RK_TILE * r);
}

/* A constant number of rows, so that sums are registers. */
#define ROWS_OF_TILE(rows) static void tile_rows_##rows(const tile_view *t, int64_t row) { block_of_rows(t, row, rows); }
ROWS_OF_TILE(1) ROWS_OF_TILE(2) ROWS_OF_TILE(3) ROWS_OF_TILE(4)
#if DOT_ROWS == 6
ROWS_OF_TILE(5) ROWS_OF_TILE(6)
#endif
static void (*const tile_rows[])(const tile_view *, int64_t) = {
    tile_rows_1, tile_rows_2, tile_rows_3, tile_rows_4,
#if DOT_ROWS == 6
    tile_rows_5, tile_rows_6,
#endif
};

#if defined(RK_AMX)
#include "mixed_amx.h"
#endif

static void rows_of_tile(const tile_view *t, int64_t row, int64_t last_row) {
#if defined(RK_AMX)
    const int64_t tiled = (last_row - row) / TILE_ROWS * TILE_ROWS;
    if (tiled)
        rows_by_tiles(t, row, tiled);
    row += tiled;
#endif
    for (; row < last_row; row += DOT_ROWS)
        tile_rows[rk_min(DOT_ROWS, last_row - row) - 1](t, row);
}

/* Runs whose sums of weights are there. */
static int64_t summed_runs(const rk_mixed_linear_args *a) {
    int64_t runs = 0;
    for (int i = 0; i < a->parts; i++)
        runs += sums_of(&a->part[i]);
    return runs;
}

static int64_t runs_of_linear(const rk_mixed_linear_args *a) {
    int64_t runs = 0;
    for (int i = 0; i < a->parts; i++)
        runs += a->part[i].part.groups;
    return runs;
}

/* One tile of a linear, whose results go to y. */
static tile_view linear_tile(const rk_mixed_linear_args *a, int64_t tile, int64_t runs, float *y, int64_t y_stride) {
    const int64_t first = tile * RK_TILE;
    return (tile_view){a, tile, first, rk_min(RK_TILE, a->channels - first), runs, y, y_stride};
}

static void mixed_linear(const rk_mixed_linear_args *a, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t chunks = chunks_of(a), runs = runs_of_linear(a);
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t tile = unit / chunks, first_row = unit % chunks * UNIT_ROWS;
        const tile_view view = linear_tile(a, tile, runs, a->y + tile * RK_TILE, a->y_stride);
        rows_of_tile(&view, first_row, rk_min(a->rows, first_row + UNIT_ROWS));
    }
    rk_leave(mode);
}
