/* Linears of many rows by matrix tiles (AMX): 16 rows times 64 channels at a time; fewer rows go the way of all other instruction sets.
 *
 * Integer sums are the same, and what is done with them in float is done in the same order: the results have the same bytes.
 * Weights of a stretch of columns are unpacked once for all rows of a unit, as signed bytes, so that no offset is left to subtract. */
#ifndef RK_MIXED_AMX_H
#define RK_MIXED_AMX_H

#define TILE_ROWS 16
#define TILE_BYTES 64 /* of a row: columns of a product */
#define TILE_BLOCKS (UNIT_ROWS / TILE_ROWS)
#define STRETCH 512     /* columns whose weights are unpacked at a time */
#define GROUPED_ROWS 32 /* rows at a time of parts with several runs: so many sums stay near by */
#define PRODUCT_STRIDE (RK_TILE * sizeof(int32_t))

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_shapes;

typedef struct {
    int8_t weights[STRETCH * RK_TILE] __attribute__((aligned(64)));    /* [64 columns][16 channels][quad][channel][4] */
    int8_t codes[2][STRETCH * TILE_ROWS] __attribute__((aligned(64))); /* of a block and the next: [64 columns][row][64] */
    int32_t products[TILE_BLOCKS][TILE_ROWS * RK_TILE] __attribute__((aligned(64)));
    float run_sums[GROUPED_ROWS * RK_TILE], y[UNIT_ROWS * RK_TILE];
} amx_space;

/* What inline assembly reads and writes is not in its operands everywhere. */
#define TILES_SEE_MEMORY() __asm__ volatile("" ::: "memory")

static void configure_tiles(void) {
    tile_shapes shapes;
    memset(&shapes, 0, sizeof shapes);
    shapes.palette = 1;
    for (int i = 0; i < 8; i++)
        shapes.bytes[i] = TILE_BYTES, shapes.rows[i] = TILE_ROWS;
    TILES_SEE_MEMORY();
    _tile_loadconfig(&shapes);
}

/* The weights of `columns` columns of a run, from a multiple of 8 on; zeros up to whole 64. */
static void unpack_weights(const uint8_t *w, int64_t columns, const int nibbles, int8_t *to) {
    const __m512i fifteen = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), top = _mm512_set1_epi8(-128);
    const int64_t quads = rk_round_up(columns, TILE_BYTES) / 4;
    for (int64_t quad = 0; quad < quads; quad += 2) {
        int8_t *at = to + (quad / 16 * 64 + quad % 16) * 64;
        for (int i = 0; i < 4; i++, at += 16 * 64) {
            __m512i first = _mm512_setzero_si512(), second = first;
            if (4 * quad < columns && nibbles) {
                const __m512i both = _mm512_loadu_si512(w + 64 * i);
                first = _mm512_sub_epi8(_mm512_and_si512(both, fifteen), eight);
                second = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), fifteen), eight);
            } else if (4 * quad < columns) {
                first = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * i), top);
                second = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * i + 256), top);
            }
            _mm512_store_si512(at, first), _mm512_store_si512(at + 64, second);
        }
        w += nibbles ? NIBBLE_BLOCK : BYTE_BLOCK;
    }
}

/* Codes of 16 rows as tiles, which are read twice as fast where they are aligned; zeros up to whole 64 columns. */
static void align_codes(const int8_t *x, int64_t stride, int64_t columns, int8_t *to) {
    for (int64_t k = 0; k < columns; k += TILE_BYTES) {
        const __mmask64 there = columns - k < TILE_BYTES ? ((__mmask64)1 << (columns - k)) - 1 : ~(__mmask64)0;
        for (int r = 0; r < TILE_ROWS; r++, to += TILE_BYTES)
            _mm512_store_si512(to, _mm512_maskz_loadu_epi8(there, x + r * stride + k));
    }
}

/* Names of tiles are constants. 0 to 3: sums, 4: codes, 5 to 7: weights. */
#define FOUR_TILES(f) do { f(0); f(1); f(2); f(3); } while (0)
#define CLEAR_SUMS(i) _tile_zero(i)
#define LOAD_SUMS(i) _tile_loadd(i, products + 16 * i, PRODUCT_STRIDE)
#define STORE_SUMS(i) _tile_stored(i, products + 16 * i, PRODUCT_STRIDE)

/* products[16][64] = those of 16 rows of codes with a stretch of weights, added to what is there unless it is the first. */
static void multiply_tiles(const int8_t *codes, const int8_t *weights, int64_t columns, const int first, int32_t *products) {
    TILES_SEE_MEMORY();
    if (first)
        FOUR_TILES(CLEAR_SUMS);
    else
        FOUR_TILES(LOAD_SUMS);
    for (int64_t k = 0; k < columns; k += TILE_BYTES, codes += TILE_BYTES * TILE_ROWS, weights += TILE_BYTES * RK_TILE) {
        _tile_loadd(4, codes, TILE_BYTES);
        _tile_loadd(5, weights, TILE_BYTES);
        _tile_loadd(6, weights + 1024, TILE_BYTES);
        _tile_loadd(7, weights + 2048, TILE_BYTES);
        _tile_dpbssd(0, 4, 5);
        _tile_dpbssd(1, 4, 6);
        _tile_dpbssd(2, 4, 7);
        _tile_loadd(5, weights + 3072, TILE_BYTES);
        _tile_dpbssd(3, 4, 5);
    }
    FOUR_TILES(STORE_SUMS);
    TILES_SEE_MEMORY();
}

/* The sums of one row of a run as floats: products less what zero points make of them. */
RK_INLINE void floats_of_row(const run_view *v, const int32_t *products, int64_t row, const uint32_t *weight_sum, f32v found[DOT_VECTORS]) {
#pragma GCC unroll 4
    for (int i = 0; i < DOT_VECTORS; i++) {
        u32v sum = rk_load_u32(products + i * RK_WIDTH);
        if (weight_sum)
            sum -= (uint32_t)v->tile->args->zero_point[row * v->tile->runs + v->run] * rk_load_u32(weight_sum + i * RK_WIDTH);
        found[i] = rk_floats(sum);
    }
}

/* What a run adds to the sums of its part, and behind the last one where these go: as sum_one or sum_runs and put_sums. */
RK_INLINE void add_block(const run_view *v, amx_space *s, int64_t block, const float *weight_scale, destination d, const int first,
                         const int last) {
    const rk_mixed_linear_args *a = v->tile->args;
    const int64_t runs = v->tile->runs;
    const float *scale = run_scales(v);
    uint32_t space[RK_TILE];
    const uint32_t *weight_sum = is_centred(v->part) ? 0 : (const uint32_t *)of_tile(v->tile, a->weight_sum + v->summed * a->channels, space);
    for (int64_t r = block * TILE_ROWS; r < (block + 1) * TILE_ROWS; r++) {
        float *sums = s->run_sums + r * RK_TILE;
        f32v found[DOT_VECTORS];
        floats_of_row(v, s->products[block] + r % TILE_ROWS * RK_TILE, v->row + r, weight_sum, found);
#pragma GCC unroll 4
        for (int i = 0; i < DOT_VECTORS; i++) {
            const f32v of_channels = rk_load(weight_scale + i * RK_WIDTH);
            f32v sum = first && last ? found[i] * (scale[r * runs] * of_channels) : found[i] * scale[r * runs];
            sum = first ? sum : rk_load(sums + i * RK_WIDTH) + sum;
            sum = last && !first ? sum * of_channels : sum;
            if (last && d.before)
                sum = rk_load(d.before + r * RK_TILE + i * RK_WIDTH) + sum;
            if (last && d.residual)
                sum = sum + rk_load(d.residual + r * d.residual_stride + i * RK_WIDTH);
            rk_store(last ? d.to + r * d.stride + i * RK_WIDTH : sums + i * RK_WIDTH, sum);
        }
    }
}

/* One run of all blocks of rows: products, and what they add to sums. */
RK_INLINE void add_run(const run_view *v, amx_space *s, int64_t blocks, const float *weight_scale, destination d, const int first, const int last) {
    const rk_part *p = &v->part->part;
    const int nibbles = is_nibbles(v->part);
    const int64_t columns = rk_stride(p), stride = rk_row_size(p), bytes = nibbles ? RK_TILE / 2 : RK_TILE;
    const int8_t *x = v->part->x + v->row * stride + v->group * columns;
    const uint8_t *weight = v->part->weight + (v->tile->tile * p->groups + v->group) * columns * bytes;
    for (int64_t from = 0; from < columns; from += STRETCH) {
        const int64_t count = rk_min(STRETCH, columns - from);
        unpack_weights(weight + from * bytes, count, nibbles, s->weights);
        align_codes(x + from, stride, count, s->codes[0]);
        for (int64_t b = 0; b <= blocks; b++) { /* codes of the next block and sums of the last one, while tiles are multiplied */
            if (b + 1 < blocks)
                align_codes(x + (b + 1) * TILE_ROWS * stride + from, stride, count, s->codes[(b + 1) % 2]);
            if (b < blocks)
                multiply_tiles(s->codes[b % 2], s->weights, count, from == 0, s->products[b]);
            if (b > 0 && from + count == columns)
                add_block(v, s, b - 1, weight_scale, d, first, last);
        }
    }
}

/* All runs of a part for some blocks of rows. */
static void add_runs(run_view v, amx_space *s, int64_t blocks, const float *weight_scale, destination d) {
    const int64_t last = v.part->part.groups - 1;
    for (; v.group <= last; v.group++, v.run++, v.summed++) {
        if (last == 0)
            add_run(&v, s, blocks, weight_scale, d, 1, 1);
        else if (v.group == 0)
            add_run(&v, s, blocks, weight_scale, d, 1, 0);
        else if (v.group < last)
            add_run(&v, s, blocks, weight_scale, d, 0, 0);
        else
            add_run(&v, s, blocks, weight_scale, d, 0, 1);
    }
}

/* Whole blocks of rows of a unit, from a row on. */
static void rows_by_tiles(const tile_view *t, int64_t row, int64_t rows) {
    const rk_mixed_linear_args *a = t->args;
    const int at_once = t->channels == RK_TILE && !a->bias; /* the last part's sums are the result */
    amx_space s;
    run_view v = {t, a->part, row, 0, 0, 0};
    configure_tiles();
    for (int i = 0; i < a->parts; i++, v.run += v.part->part.groups, v.summed += sums_of(v.part), v.part++) {
        uint32_t space[RK_TILE];
        const float *weight_scale = of_tile(t, a->weight_scale + i * a->channels, space);
        const int direct = at_once && i == a->parts - 1;
        const int64_t some = v.part->part.groups == 1 ? UNIT_ROWS : GROUPED_ROWS;
        for (int64_t r = 0; r < rows; r += some) {
            float *y = s.y + r * RK_TILE;
            destination d = {i ? y : 0, 0, y, RK_TILE, a->residual_stride};
            if (direct) {
                d.to = t->y + (row + r) * t->y_stride, d.stride = t->y_stride;
                d.residual = a->residual ? a->residual + (row + r) * a->residual_stride + t->first_channel : 0;
            }
            v.row = row + r;
            add_runs(v, &s, rk_min(some, rows - r) / TILE_ROWS, weight_scale, d);
        }
    }
    _tile_release();
    for (int64_t r = 0; r < rows && !at_once; r++)
        finish_row(t, row + r, s.y + r * RK_TILE);
}

#endif
