/* Latent attention as an operator. Caches are as in onnx_attention.c: [B, 1, T, bytes of a packed row]. */
#include "onnx_call.h"

static void require_entry(call *c, const tensor *x, const tensor *past, const tensor *mask, const rk_head *head, const char *what) {
    const int64_t total = mask->dims[1], new = x->dims[2];
    require(c, x->rank == 4 && x->dims[0] == mask->dims[0] && x->dims[1] == 1 && x->dims[3] == head->low + head->high && new <= total, what,
            "[batch, 1, tokens, columns of its parts]");
    require(c, past->rank == 4 && past->dims[0] == mask->dims[0] && past->dims[1] == 1 && past->dims[3] == rk_head_bytes(head) &&
                   (past->dims[2] >= total || past->dims[2] + new == total), what,
            "a cache [batch, 1, tokens, bytes of a packed row], with as many rows as the mask has tokens before the new ones, or room for all");
}

/* The parts of the linear, as far as rows of codes and weights are concerned. */
static void place_weights(call *c, const tensor *in, rk_latent_attention_args *a) {
    const int64_t channels = a->heads * (a->own + a->values), tiles = (channels + RK_TILE - 1) / RK_TILE;
    const int64_t widths[] = {c->n->result_low_width, c->n->result_high_width};
    for (int high = 0; high < 2; high++) {
        if (!widths[high])
            continue;
        const int is_low = (high ? widths[0] : 0) < a->latent.low; /* in the cache */
        const rk_part part = {widths[high], 1, is_low ? a->latent.low_bits : a->latent.high_bits, 1};
        const int bits = high ? 8 : 4;
        require(c, size_of(&in[high]) == tiles * rk_tile_bytes(&part, bits), high ? "weight_high" : "weight_low", "tiles of packed codes for its width");
        a->part[a->parts++] = (rk_linear_part){part, bits, NULL, in[high].data};
    }
    require(c, widths[0] + widths[1] == a->latent.low + a->latent.high, "widths of weights", "the columns of a cached vector");
    require_size(c, &in[2], channels * a->parts, "weight_scale");
    int64_t sums = 0;
    for (int i = 0; i < a->parts; i++)
        sums += !RK_CENTRED(a->part[i].part.bits);
    require_size(c, &in[3], channels * sums, "weight_sum");
    a->weight_scale = in[2].data;
}

/* Keys and values of all tokens, from the codes that `cached` reads out of the cache. */
static const float *expand(call *c, rk_cache_codes_args *cached, const rk_latent_attention_args *a, const int32_t *weight_sum) {
    const int64_t rows = a->batch * a->total, channels = a->heads * (a->own + a->values);
    rk_mixed_linear_args m = {.rows = rows, .channels = channels, .parts = a->parts, .weight_scale = a->weight_scale, .weight_sum = weight_sum};
    rk_codes *codes = &cached->out;
    codes->parts = a->parts;
    for (int i = 0; i < a->parts; i++)
        codes->part[i] = a->part[i].part;
    keep_codes(c, rows, codes);
    RUN(c, cache_codes, cached, 16);
    for (int i = 0; i < a->parts; i++) {
        m.part[i] = a->part[i];
        m.part[i].x = codes->rows[i];
    }
    m.scale = codes->scale, m.zero_point = codes->zero_point;
    m.y = make_room(c, 4 * rows * channels), m.y_stride = channels;
    RUN(c, mixed_linear, &m, 1);
    return m.y;
}

/* q [B, H, S, own + rotary columns], new vectors [B, 1, S, columns], new rotary columns, mask, past_vectors, past_rotary, weight_low, weight_high,
 * weight_scale, weight_sum -> y [B, S, H * values], the cache as outputs 1 and 2 */
void op_latent_attention(call *c) {
    const node *n = c->n;
    const tensor *q = &c->in[0], *x = &c->in[1], *mask = &c->in[3], *past = &c->in[4];
    rk_latent_attention_args a = {.heads = n->latent_heads, .own = n->own, .values = n->values, .latent = key_head(n), .rotary = value_head(n)};
    const int64_t rotary = a.rotary.low + a.rotary.high, latent = a.latent.low + a.latent.high;
    require(c, a.heads > 0 && a.own > 0 && a.own <= RK_MAX_HEAD && a.values > 0 && a.values <= RK_MAX_HEAD && rotary > 0 &&
                   rotary <= RK_MAX_HEAD && latent <= RK_MAX_ENTRY, "an attribute of LatentAttention",
            "heads of at most 256 columns, made from vectors of at most 1024");
    require(c, mask->rank == 2 && q->rank == 4 && q->dims[0] == mask->dims[0] && q->dims[1] == a.heads && q->dims[3] == a.own + rotary, "q",
            "[batch, heads, tokens, columns]");
    require_entry(c, x, past, mask, &a.latent, "a cached vector");
    require_entry(c, x + 1, past + 1, mask, &a.rotary, "rotary columns");
    require(c, x[0].dims[2] == q->dims[2] && x[1].dims[2] == q->dims[2] && past[0].dims[2] == past[1].dims[2], "q", "as many tokens as are new");
    place_weights(c, c->in + 6, &a);
    if (c->status)
        return;
    a.batch = q->dims[0], a.tokens = q->dims[2], a.total = mask->dims[1];
    int32_t start[a.batch + 1];
    for (int64_t b = 0; b < a.batch; b++)
        start[b] = (int32_t)(a.total - a.tokens);
    const tensor vectors = present_of(c, 1, past, a.total), turned = present_of(c, 2, past + 1, a.total);
    a.capacity = vectors.dims[2], a.start = start, a.q = q->data;
    a.latent_cache = vectors.data, a.rotary_cache = turned.data;
    a.mask = mask->data, a.mask_stride = a.total, a.scale = n->scale;
    rk_cache_codes_args rows = {a.batch, 1, a.tokens, a.total, x[1].data, a.rotary, n->cache_clip, turned.data, turned.dims[2], start, {0}};
    RUN(c, cache_codes, &rows, 16);
    rows.x = x[0].data, rows.head = a.latent, rows.cache = vectors.data, rows.capacity = vectors.dims[2];
    if (!c->status && rk_latent_expands(&a))
        a.expanded = expand(c, &rows, &a, c->in[9].data);
    else
        RUN(c, cache_codes, &rows, 16);
    const int64_t dims[3] = {a.batch, a.tokens, a.heads * a.values};
    a.out = make_output(c, 0, dims, 3);
    RUN(c, latent_attention, &a, 1);
}
