/* Latent attention and the codes of cached rows: part of check.c. */

RUNNER(latent_attention)
RUNNER(cache_codes)

/* Cache rows of random vectors, `total` of them, written by cache_codes; then the codes of all rows, in parts of so many columns. */
static int check_cache_codes(rk_cache_codes_args *a, int parts, const int64_t *widths) {
    const int64_t rows = a->batch * a->total, cache = a->batch * a->capacity * rk_head_bytes(&a->head);
    int64_t bytes = cache + 8 * rows * parts;
    for (int i = 0; i < parts; i++)
        a->out.part[i] = (rk_part){widths[i], 1, 8, 1}, bytes += rows * rk_row_bytes(&a->out.part[i]);
    a->out.parts = parts;
    a->out.scale = array(bytes, 1), a->out.zero_point = (int32_t *)(a->out.scale + rows * parts);
    a->cache = (uint8_t *)(a->out.zero_point + rows * parts);
    int8_t *codes = (int8_t *)(a->cache + cache);
    for (int i = 0; i < parts; codes += rows * rk_row_bytes(&a->out.part[i++]))
        a->out.rows[i] = codes;
    int wrong = compare("cache_codes", run_cache_codes, a, a->out.scale, bytes, NULL);
    float *image = array(rows * columns_of(a->head), 4), *value = image;
    const rk_cache_image_args read = {.batch = a->batch, .heads = 1, .total = a->total, .head = a->head, .cache = a->cache, .capacity = a->capacity};
    expected_image(&read, image);
    for (int64_t r = 0; r < rows; r++)
        for (int i = 0; i < parts; i++)
            for (int64_t c = 0; c < widths[i]; c++, value++) {
                const int code = a->out.rows[i][r * rk_row_bytes(&a->out.part[i]) + c] - a->out.zero_point[r * parts + i];
                wrong |= (float)code * a->out.scale[r * parts + i] != *value ? printf("cache_codes: not what is cached\n") : 0;
            }
    free(image);
    return wrong != 0;
}

static int check_latent_attention(void) {
    rk_latent_attention_args a = {.batch = between(1, 2), .tokens = between(1, 40), .heads = between(1, 4), .own = between(1, 40),
                                  .values = between(1, 40), .latent = random_head(), .rotary = random_head(), .scale = 0.2f};
    a.total = a.tokens + between(0, 50), a.capacity = a.total + between(0, 3);
    const int64_t channels = a.heads * (a.own + a.values), widths[2] = {a.latent.low ? a.latent.low : a.latent.high, a.latent.high};
    a.parts = (a.latent.low > 0) + (a.latent.high > 0);
    int32_t start[2] = {(int32_t)(a.total - a.tokens), (int32_t)between(0, a.total - a.tokens)}, none[2] = {0, 0};
    rk_cache_codes_args vectors = {a.batch, 1, a.total, a.total, NULL, a.latent, 0.9f, NULL, a.capacity, none, {0}}, rotary = vectors;
    const int64_t rotary_widths[2] = {a.rotary.low ? a.rotary.low : a.rotary.high, a.rotary.high};
    rotary.head = a.rotary;
    vectors.x = floats(a.batch * a.total * columns_of(a.latent), -2, 2), rotary.x = floats(a.batch * a.total * columns_of(a.rotary), -2, 2);
    int wrong = check_cache_codes(&vectors, a.parts, widths) | check_cache_codes(&rotary, (a.rotary.low > 0) + (a.rotary.high > 0), rotary_widths);
    a.start = start, a.latent_cache = vectors.cache, a.rotary_cache = rotary.cache;
    a.q = floats(a.batch * a.heads * a.tokens * (a.own + columns_of(a.rotary)), -1, 1);
    a.weight_scale = floats(a.parts * channels, 0.01f, 0.1f);
    for (int i = 0; i < a.parts; i++) {
        const rk_part part = {widths[i], 1, 8, 1};
        const int bits = random_bits() & 1 ? 4 : 8;
        const int64_t bytes = (channels + RK_TILE - 1) / RK_TILE * rk_tile_bytes(&part, bits);
        uint8_t *weight = array(bytes, 1);
        for (int64_t j = 0; j < bytes; j++)
            weight[j] = (uint8_t)random_bits();
        a.part[i] = (rk_linear_part){part, bits, NULL, weight};
    }
    const int64_t bytes = a.batch * a.tokens * a.heads * a.values * 4;
    a.out = array(bytes, 1);
    wrong |= compare("latent_attention", run_latent_attention, &a, a.out, bytes, NULL);
    a.expanded = floats(a.batch * a.total * channels, -1, 1);
    wrong |= compare("latent_attention of made keys", run_latent_attention, &a, a.out, bytes, NULL);
    for (int i = 0; i < a.parts; i++)
        free((void *)a.part[i].weight);
    free((void *)vectors.x), free((void *)rotary.x), free(vectors.out.scale), free(rotary.out.scale), free((void *)a.q), free((void *)a.weight_scale);
    free((void *)a.expanded), free(a.out);
    return wrong;
}
