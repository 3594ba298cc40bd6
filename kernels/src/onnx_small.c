/* What stands before the first block of a model and behind the last: a microsecond each as a step of a chain, several as standard nodes. */
#include "onnx_call.h"

/* Room for an output of the leading dimensions of `like`, and so many columns where there are any. */
static void *output_like(call *c, const tensor *like, int64_t columns) {
    int64_t dims[MAX_DIMENSIONS];
    require(c, like->rank < MAX_DIMENSIONS, "an input", "at most 5 dimensions");
    if (c->status)
        return NULL;
    memcpy(dims, like->dims, sizeof dims);
    dims[like->rank] = columns;
    return make_output(c, 0, dims, like->rank + (columns > 0));
}

/* ids [...], codes [tokens, columns], scale [tokens, 1] -> codes times scale [..., columns] */
void op_embed(call *c) {
    const tensor *ids = &c->in[0], *codes = &c->in[1];
    const int64_t tokens = codes->dims[0], columns = codes->dims[1], count = size_of(ids), *id = ids->data;
    const float *scale = c->in[2].data;
    require(c, codes->rank == 2 && columns > 0, "codes", "[tokens, columns]");
    require_size(c, &c->in[2], tokens, "scale");
    for (int64_t i = 0; !c->status && i < count; i++)
        require(c, id[i] >= 0 && id[i] < tokens, "ids", "token numbers from 0 to below the size of the vocabulary");
    float *y = output_like(c, ids, columns);
    for (int64_t i = 0; !c->status && i < count; i++) {
        const int8_t *row = (const int8_t *)codes->data + id[i] * columns;
        for (int64_t k = 0; k < columns; k++)
            y[i * columns + k] = (float)row[k] * scale[id[i]];
    }
}

/* positions [...], frequencies [R / 2] -> their products twice, side by side, [..., R] */
void op_angles(call *c) {
    const int64_t half = size_of(&c->in[1]), count = size_of(&c->in[0]), *position = c->in[0].data;
    const float *frequency = c->in[1].data;
    require(c, half > 0, "frequencies", "one at least");
    float *y = output_like(c, &c->in[0], 2 * half);
    for (int64_t i = 0; !c->status && i < count; i++)
        for (int64_t k = 0; k < half; k++)
            y[i * 2 * half + k] = y[i * 2 * half + half + k] = (float)position[i] * frequency[k];
}

/* mask -> whether it is not 0 */
void op_seen(call *c) {
    const int64_t count = size_of(&c->in[0]), *mask = c->in[0].data;
    uint8_t *y = output_like(c, &c->in[0], 0);
    for (int64_t i = 0; !c->status && i < count; i++)
        y[i] = mask[i] != 0;
}

/* The place of the last token among `count` that is not masked: of the largest value of the mask, of equal ones the last. */
static int64_t last_of_row(const int64_t *mask, int64_t count) {
    int64_t last = 0;
    for (int64_t i = 1; i < count; i++)
        if (mask[i] >= mask[last])
            last = i;
    return last;
}

/* hidden [B, S, H], mask [B, T], keep [1] -> the rows [B, min(keep, S), H] that end with the last token of each sequence; keep 0: all */
void op_keep(call *c) {
    const tensor *hidden = &c->in[0], *mask = &c->in[1];
    require(c, hidden->rank == 3 && hidden->dims[1] > 0, "hidden", "[batch, tokens, columns]");
    require(c, mask->rank == 2 && mask->dims[0] == hidden->dims[0] && mask->dims[1] >= hidden->dims[1], "mask", "[batch, all tokens]");
    require(c, size_of(&c->in[2]) == 1 && *(const int64_t *)c->in[2].data >= 0, "logits_to_keep", "one number, 0 or more");
    if (c->status)
        return;
    const int64_t keep = *(const int64_t *)c->in[2].data, tokens = hidden->dims[1], columns = hidden->dims[2], all = mask->dims[1];
    const int64_t count = keep && keep < tokens ? keep : tokens, dims[3] = {hidden->dims[0], count, columns};
    float *y = make_output(c, 0, dims, 3);
    for (int64_t b = 0; !c->status && b < dims[0]; b++) {
        const int64_t last = last_of_row((const int64_t *)mask->data + (b + 1) * all - tokens, tokens);
        const int64_t first = (keep ? last + 1 : tokens) - count;
        for (int64_t i = 0; i < count; i++, y += columns) {
            const int64_t row = first + i > 0 ? first + i : 0;
            memcpy(y, (const float *)hidden->data + (b * tokens + row) * columns, sizeof(float) * (size_t)columns);
        }
    }
}
