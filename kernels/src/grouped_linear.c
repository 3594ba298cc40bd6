/* Linears of several experts on rows that are sorted by expert, and their sums by token: operands in resq_kernels.h. Only the weights of
 * experts that have rows are read. */
#include "common.h"

/* Rows of a unit: few, so that experts with many rows are shared among threads. COMBINED_ROWS: rows that are computed before they are added. */
#if defined(RK_AMX)
#define GROUP_ROWS 32
#define COMBINED_ROWS TILE_ROWS
#else
#define GROUP_ROWS 12
#define COMBINED_ROWS DOT_ROWS
#endif

static int64_t tiles_of(const rk_grouped_linear_args *g) { return (g->linear.channels + RK_TILE - 1) / RK_TILE; }
static int64_t rows_of_group(const rk_grouped_linear_args *g, int64_t group) { return g->first_row[group + 1] - g->first_row[group]; }
static int64_t row_blocks(int64_t rows) { return (rows + GROUP_ROWS - 1) / GROUP_ROWS; }

/* A linear from one of its rows on; its result is not moved. */
static rk_mixed_linear_args from_row(const rk_mixed_linear_args *linear, int64_t row, int64_t runs) {
    rk_mixed_linear_args a = *linear;
    for (int i = 0; i < a.parts; i++)
        a.part[i].x += row * rk_row_size(&a.part[i].part);
    a.scale += row * runs, a.zero_point += row * runs;
    return a;
}

/* The linear of a group, on its rows. */
static rk_mixed_linear_args linear_of(const rk_grouped_linear_args *g, int64_t group, int64_t runs) {
    rk_mixed_linear_args a = from_row(&g->linear, g->first_row[group], runs);
    const int64_t expert = g->expert[group];
    const uint8_t *weight = a.part[0].weight + g->weight_at[expert];
    for (int i = 0; i < a.parts; i++) {
        rk_linear_part *p = &a.part[i];
        p->weight_bits = g->weight_bits[expert * a.parts + i];
        p->weight = weight;
        weight += tiles_of(g) * rk_tile_size(&p->part, p->weight_bits);
    }
    a.rows = rows_of_group(g, group);
    a.weight_scale += expert * a.parts * a.channels, a.weight_sum += expert * summed_runs(&a) * a.channels;
    a.bias = a.bias ? a.bias + expert * a.channels : 0;
    a.residual = 0;
    return a;
}

static int64_t grouped_linear_units(const rk_grouped_linear_args *g) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < g->groups; i++)
        blocks += row_blocks(rows_of_group(g, i));
    return blocks * tiles_of(g);
}

static void grouped_linear(const rk_grouped_linear_args *g, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const int64_t runs = runs_of_linear(&g->linear);
    for (int64_t i = 0; i < g->groups && end > 0; i++) {
        const int64_t blocks = row_blocks(rows_of_group(g, i)), units = blocks * tiles_of(g);
        if (begin < units) {
            const rk_mixed_linear_args a = linear_of(g, i, runs);
            float *y = a.y + g->first_row[i] * a.y_stride;
            for (int64_t unit = begin > 0 ? begin : 0; unit < rk_min(end, units); unit++) {
                const int64_t tile = unit / blocks, row = unit % blocks * GROUP_ROWS;
                const tile_view view = linear_tile(&a, tile, runs, y + tile * RK_TILE, a.y_stride);
                rows_of_tile(&view, row, rk_min(a.rows, row + GROUP_ROWS));
            }
        }
        begin -= units, end -= units;
    }
    rk_leave(mode);
}

static int64_t combined_linear_units(const rk_combined_linear_args *c) { return tiles_of(&c->grouped); }

/* Where a tile of the sums begins: residual, or zeros. */
static void begin_tile(const rk_combined_linear_args *c, int64_t first, int64_t channels) {
    const rk_mixed_linear_args *a = &c->grouped.linear;
    for (int64_t t = 0; t < c->tokens; t++) {
        float *y = a->y + t * a->y_stride + first;
        if (a->residual)
            memmove(y, a->residual + t * a->residual_stride + first, sizeof(float) * (size_t)channels);
        else
            memset(y, 0, sizeof(float) * (size_t)channels);
    }
}

/* y += share * sum */
RK_INLINE void add_share(const float *sum, float share, int64_t channels, float *y) {
    for (int64_t i = 0; i < channels; i += RK_WIDTH) {
        const int64_t count = rk_min(RK_WIDTH, channels - i);
        rk_store_some(y + i, rk_load_some(y + i, count) + share * rk_load_some(sum + i, count), count);
    }
}

/* Adds a few rows of a group, the first of which is number `row` of all, to what their tokens have of a tile. */
static void combine_rows(const rk_combined_linear_args *c, const tile_view *t, int64_t row, int64_t rows) {
    const rk_mixed_linear_args *a = &c->grouped.linear;
    float *y = a->y + t->first_channel;
    for (int64_t r = 0; r < rows; r++) /* there is much to compute before they are read */
        for (int i = 0; i < RK_TILE; i += 16)
            __builtin_prefetch(y + c->token[row + r] * a->y_stride + i, 1);
    rows_of_tile(t, 0, rows);
    for (int64_t r = 0; r < rows; r++)
        add_share(t->y + r * RK_TILE, c->share[row + r], t->channels, y + c->token[row + r] * a->y_stride);
}

static void combined_linear(const rk_combined_linear_args *c, int64_t begin, int64_t end) {
    const uint64_t mode = rk_enter();
    const rk_grouped_linear_args *g = &c->grouped;
    const int64_t runs = runs_of_linear(&g->linear);
    float sum[COMBINED_ROWS * RK_TILE];
    for (int64_t tile = begin; tile < end; tile++) {
        begin_tile(c, tile * RK_TILE, rk_min(RK_TILE, g->linear.channels - tile * RK_TILE));
        for (int64_t i = 0; i < g->groups; i++) {
            const rk_mixed_linear_args group = linear_of(g, i, runs);
            for (int64_t row = 0; row < group.rows; row += COMBINED_ROWS) {
                const rk_mixed_linear_args a = from_row(&group, row, runs);
                const tile_view view = linear_tile(&a, tile, runs, sum, RK_TILE);
                combine_rows(c, &view, g->first_row[i] + row, rk_min(COMBINED_ROWS, group.rows - row));
            }
        }
    }
    rk_leave(mode);
}
