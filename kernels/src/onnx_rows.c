/* Rows of a linear's weight: an embedding that is read out of lm_head's codes needs no table of its own. */
#include "onnx_call.h"

enum { COLUMNS = 8, LANES = 16 }; /* columns of a block; channels whose bytes lie together */

typedef struct {
    const int64_t *ids;
    const uint8_t *weight;
    const float *scale;
    int64_t width, tile_bytes;
    float *y;
} rows_args;

/* Rows [begin, end) of y. The codes have 5 to 8 bits, a byte each; where they lie: resq_kernels.h. */
static void read_rows(const void *data, int64_t begin, int64_t end) {
    const rows_args *a = data;
    for (int64_t row = begin; row < end; row++) {
        const int64_t id = a->ids[row], lane = id % RK_TILE;
        const uint8_t *codes = a->weight + id / RK_TILE * a->tile_bytes + lane / LANES * (4 * LANES) + lane % LANES * 4;
        float *y = a->y + row * a->width;
        for (int64_t k = 0; k < a->width; k++) {
            const int64_t block = k / COLUMNS * COLUMNS * RK_TILE, half = k % COLUMNS / 4 * 4 * RK_TILE;
            y[k] = (float)(codes[block + half + k % 4] - 128) * a->scale[id];
        }
    }
}

/* ids [...], weight codes in tiles, weight_scale [channels] -> rows [..., high_width] */
void op_rows(call *c) {
    const tensor *ids = &c->in[0];
    const rk_part part = {c->n->high_width, 1, 8, 1};
    const int64_t channels = size_of(&c->in[2]), count = size_of(ids);
    rows_args a = {ids->data, c->in[1].data, c->in[2].data, part.width, rk_tile_bytes(&part, 8), NULL};
    require(c, ids->rank < MAX_DIMENSIONS, "ids", "at most 5 dimensions");
    require(c, part.width > 0 && size_of(&c->in[1]) == (channels + RK_TILE - 1) / RK_TILE * a.tile_bytes, "weight",
            "tiles of as many channels as there are scales, of high_width columns");
    for (int64_t i = 0; !c->status && i < count; i++)
        require(c, a.ids[i] >= 0 && a.ids[i] < channels, "ids", "token numbers from 0 to below the size of the vocabulary");
    if (c->status)
        return;
    int64_t dims[MAX_DIMENSIONS];
    memcpy(dims, ids->dims, sizeof dims);
    dims[ids->rank] = part.width;
    a.y = make_output(c, 0, dims, ids->rank + 1);
    run_units(c, read_rows, &a, c->status ? 0 : count, 64);
}
