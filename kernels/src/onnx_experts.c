/* The operator of a mixture of experts: rows sorted by expert, gate and up, activation, transform and codes, down, and the weighted sum of
 * every token's experts. What lies between gate and down is computed some rows at a time, so that it stays in the cache. */
#include "onnx_call.h"

#define SLAB_BYTES (4 << 20) /* of what gate and up give at a time */

/* The weights of all experts: codes, scale [experts, parts, channels], sum of codes [experts, parts whose
 * codes have zero points, channels], bits [experts, parts], bias?. */
typedef struct {
    const tensor *codes, *scale, *sum, *bits, *bias;
    int64_t experts, channels;
    int64_t *at; /* where each expert's codes begin */
} expert_weights;

/* Which rows (a token and one of its choices) each expert computes; rk_grouped_linear_args says more. */
typedef struct {
    int64_t rows, groups;
    int32_t *expert, *first_row, *token;
    float *share;
} routed_rows;

static expert_weights read_weights(call *c, const tensor *in, const rk_part *part, int parts, const char *which) {
    expert_weights w = {in, in + 1, in + 2, in + 3, in + 4, .at = NULL};
    const int64_t size = size_of(w.scale);
    require(c, w.scale->rank == 3 && w.scale->dims[1] == parts && size > 0, which, "scales [experts, parts, channels]");
    if (c->status)
        return w;
    w.experts = w.scale->dims[0], w.channels = w.scale->dims[2];
    const int64_t sums = runs_in(part, parts, 1);
    require(c, size_of(w.sum) == size / parts * sums && size_of(w.bits) == w.experts * parts, which,
            "sums for every part with zero points, and bits for every expert and part");
    require_size(c, w.bias, w.experts * w.channels, which);
    w.at = make_room(c, (w.experts + 1) * 8);
    const int32_t *bits = w.bits->data;
    int64_t at = 0;
    for (int64_t e = 0; e < w.experts && !c->status; e++) {
        w.at[e] = at;
        for (int i = 0; i < parts; i++, bits++) {
            require(c, *bits >= 2 && *bits <= 8, which, "bits 2 to 8");
            at += (w.channels + RK_TILE - 1) / RK_TILE * rk_tile_bytes(&part[i], *bits);
        }
    }
    require(c, size_of(w.codes) == at, which, "tiles of packed codes for every expert");
    return w;
}

/* Rows in rising order of their experts, those of an expert in order. */
static routed_rows sort_rows(call *c, const int64_t *indices, const float *weights, int64_t tokens, int64_t choices, int64_t experts) {
    routed_rows r = {.rows = tokens * choices};
    int32_t *room = make_room(c, 4 * (3 * experts + 2 + 2 * r.rows));
    if (!room)
        return r;
    int32_t *next = room;
    r.expert = next + experts, r.first_row = r.expert + experts, r.token = r.first_row + experts + 1;
    r.share = (float *)(r.token + r.rows);
    memset(next, 0, (size_t)experts * 4);
    for (int64_t i = 0; i < r.rows; i++) {
        const int known = indices[i] >= 0 && indices[i] < experts;
        require(c, known, "indices", "numbers of experts");
        next[known ? indices[i] : 0]++;
    }
    r.first_row[0] = 0;
    for (int64_t e = 0; e < experts; e++) {
        const int32_t count = next[e], first = r.first_row[r.groups];
        next[e] = first;
        if (count)
            r.expert[r.groups++] = (int32_t)e, r.first_row[r.groups] = first + count;
    }
    for (int64_t i = 0; i < r.rows && !c->status; i++) {
        const int32_t row = next[indices[i]]++;
        r.token[row] = (int32_t)(i / choices), r.share[row] = weights[i];
    }
    return r;
}

static rk_grouped_linear_args linear_of(const expert_weights *w, const rk_codes *x, const routed_rows *r, float *y) {
    rk_grouped_linear_args g = {.groups = r->groups, .expert = r->expert, .first_row = r->first_row, .weight_at = w->at};
    g.weight_bits = w->bits->data;
    g.linear.channels = g.linear.y_stride = w->channels, g.linear.parts = x->parts;
    for (int i = 0; i < x->parts; i++)
        g.linear.part[i] = (rk_linear_part){x->part[i], 0, x->rows[i], w->codes->data};
    g.linear.scale = x->scale, g.linear.zero_point = x->zero_point;
    g.linear.weight_scale = w->scale->data, g.linear.weight_sum = w->sum->data, g.linear.bias = w->bias->data, g.linear.y = y;
    return g;
}

/* Codes of some rows, each of a token. */
typedef struct {
    const rk_codes *from, *to;
    const int32_t *token;
} gathering;

static void gather(const void *args, int64_t begin, int64_t end) {
    const gathering *g = args;
    const int64_t runs = g->to->parts; /* one for each part */
    for (int i = 0; i < g->to->parts; i++) {
        const int64_t bytes = rk_row_bytes(&g->to->part[i]);
        for (int64_t row = begin; row < end; row++)
            memcpy(g->to->rows[i] + row * bytes, g->from->rows[i] + g->token[row] * bytes, (size_t)bytes);
    }
    for (int64_t row = begin; row < end; row++) {
        memcpy(g->to->scale + row * runs, g->from->scale + g->token[row] * runs, (size_t)runs * 4);
        memcpy(g->to->zero_point + row * runs, g->from->zero_point + g->token[row] * runs, (size_t)runs * 4);
    }
}

/* The same codes from a row on. */
static rk_codes codes_from(const rk_codes *codes, int64_t row) {
    rk_codes rest = *codes;
    for (int i = 0; i < rest.parts; i++)
        rest.rows[i] += row * rk_row_bytes(&rest.part[i]);
    rest.scale += row * rest.parts, rest.zero_point += row * rest.parts;
    return rest;
}

/* The groups of rows [first, last), counted from `first`; expert and first_row have room for all. */
static routed_rows slab_of(const routed_rows *r, int64_t first, int64_t last, int32_t *expert, int32_t *first_row) {
    routed_rows slab = {.rows = last - first, .expert = expert, .first_row = first_row, .token = r->token + first};
    first_row[0] = 0;
    for (int64_t g = 0; g < r->groups; g++)
        if (r->first_row[g + 1] > first && r->first_row[g] < last) {
            const int64_t end = r->first_row[g + 1] < last ? r->first_row[g + 1] : last;
            expert[slab.groups++] = r->expert[g], first_row[slab.groups] = (int32_t)(end - first);
        }
    return slab;
}

/* Gate, up and what follows them on all rows: codes of what down reads. */
static void compute_hidden(call *c, const rk_codes *x, const expert_weights *w, const routed_rows *r, rk_hadamard_quantize_args a) {
    const int64_t in_slab = SLAB_BYTES / 4 / w->channels + 1, most = r->rows < in_slab ? r->rows : in_slab;
    const rk_codes hidden = a.out;
    rk_codes mine = *x;
    keep_codes(c, most, &mine);
    float *y = make_room(c, most * w->channels * 4);
    int32_t *groups = make_room(c, (2 * r->groups + 1) * 4);
    for (int64_t row = 0; row < r->rows && !c->status; row += most) {
        const routed_rows slab = slab_of(r, row, row + most < r->rows ? row + most : r->rows, groups, groups + r->groups);
        const gathering g = {x, &mine, slab.token};
        run_units(c, gather, &g, slab.rows, 64);
        const rk_grouped_linear_args linear = linear_of(w, &mine, &slab, y);
        RUN(c, grouped_linear, &linear, 1);
        a.rows = slab.rows, a.gate = y, a.out = codes_from(&hidden, row);
        a.up = c->n->gated ? y + a.up_stride / 2 : NULL;
        RUN(c, hadamard_quantize, &a, 1);
    }
}

/* low, high, scale, zero_point; indices, weights [..., choices]; of gate and up, one behind the other: weight, scale, sum, bits, bias?; the
 * same of down; factors? -> y */
void op_experts(call *c) {
    const node *n = c->n;
    const tensor *in = c->in;
    rk_codes x, hidden = {.parts = 0};
    read_codes(c, in, &x);
    const int64_t tokens = rows_of(&in[2]), choices = last_of(&in[4]), columns = n->hidden_low_width + n->hidden_high_width;
    if (n->hidden_low_width)
        hidden.part[hidden.parts++] = (rk_part){n->hidden_low_width, 1, (int32_t)n->hidden_low_bits, n->hidden_low_clip};
    if (n->hidden_high_width)
        hidden.part[hidden.parts++] = (rk_part){n->hidden_high_width, 1, (int32_t)n->hidden_high_bits, n->hidden_high_clip};
    const expert_weights up = read_weights(c, in + 6, x.part, x.parts, "weights of gate and up");
    const expert_weights down = read_weights(c, in + 11, hidden.part, hidden.parts, "weights of down");
    require(c, up.channels == (n->gated ? 2 : 1) * columns && columns <= RK_MAX_COLUMNS && up.experts == down.experts, "weights of gate and up",
            "a channel for every column that down reads, at most 65536, and as many experts");
    require(c, in[4].rank > 0 && size_of(&in[4]) == tokens * choices && size_of(&in[5]) == size_of(&in[4]), "indices",
            "as many choices and weights for every token");
    rk_hadamard_quantize_args a = {.gate_stride = up.channels, .up_stride = up.channels, .activation = (int32_t)n->activation};
    a.limit = n->limit, a.slope = n->slope;
    place_transforms(c, &in[16], hidden.part, hidden.parts, n->hidden_low_width > 0, a.transform);
    if (c->status)
        return;
    const routed_rows r = sort_rows(c, in[4].data, in[5].data, tokens, choices, up.experts);
    keep_codes(c, r.rows, &hidden);
    a.out = hidden;
    compute_hidden(c, &x, &up, &r, a);
    int64_t dims[MAX_DIMENSIONS];
    memcpy(dims, in[2].dims, sizeof dims);
    dims[in[2].rank - 1] = down.channels;
    float *y = make_output(c, 0, dims, in[2].rank);
    const rk_combined_linear_args sums = {linear_of(&down, &hidden, &r, y), tokens, r.token, r.share};
    RUN(c, combined_linear, &sums, 1);
}
