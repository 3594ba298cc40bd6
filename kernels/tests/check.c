/* Runs every kernel on random operands of odd sizes, with every instruction set that the processor has, and compares: integer
 * results with plain loops written from resq_kernels.h, all results among instruction sets, bit for bit. Buffers are exactly as large
 * as they must be, so that a sanitizer sees any access beyond them. Prints what differs; exits with 1 then. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "resq_kernels.h"

static uint64_t state = 1;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static int64_t between(int64_t low, int64_t high) { return low + random_bits() % (uint64_t)(high - low + 1); }
static float uniform(float low, float high) { return low + (high - low) * (float)(random_bits() & 0xffffff) / 16777216.0f; }

static void *array(int64_t count, size_t size) {
    void *p = malloc((size_t)count * size);
    memset(p, 0xa5, (size_t)count * size);
    return p;
}

static float *floats(int64_t count, float low, float high) {
    float *p = array(count, sizeof *p);
    for (int64_t i = 0; i < count; i++)
        p[i] = uniform(low, high);
    return p;
}

/* Runs a kernel in two pieces under each instruction set; the first result is what `fill` left in `expected`, if it is not NULL. */
typedef void (*run_function)(const void *args);

static int compare(const char *what, run_function run, const void *args, void *result, int64_t bytes, const void *expected) {
    void *first = expected ? memcpy(array(bytes, 1), expected, (size_t)bytes) : NULL;
    int wrong = 0;
    for (int32_t i = 0; rk_instruction_set(i); i++) {
        if (rk_select(i))
            continue;
        memset(result, 0x5a, (size_t)bytes);
        run(args);
        if (!first)
            first = memcpy(array(bytes, 1), result, (size_t)bytes);
        if (memcmp(first, result, (size_t)bytes)) {
            printf("%s: %s differs\n", what, rk_instruction_set(i));
            wrong = 1;
        }
    }
    free(first);
    return wrong;
}

#define RUNNER(name) \
    static void run_##name(const void *args) { \
        int64_t units = rk_##name##_units(args), middle = units / 2; \
        rk_##name(args, middle, units); \
        rk_##name(args, 0, middle); \
    }

/* mixed_linear */

RUNNER(mixed_linear)

typedef struct {
    int8_t *codes, *weights; /* plain: [rows][groups][width], [channels][groups][width] */
} plain_part;

static int64_t stride_of(int64_t width) { return (width + 7) / 8 * 8; }

static int8_t *pack_rows(const int8_t *codes, const rk_part *p, int64_t rows) {
    int8_t *packed = array(rows, (size_t)rk_row_bytes(p));
    memset(packed, 0, (size_t)(rows * rk_row_bytes(p)));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < p->groups; g++) {
            int8_t *row = packed + r * rk_row_bytes(p);
            int32_t sum = 0;
            for (int64_t k = 0; k < p->width; k++) {
                int8_t code = codes[(r * p->groups + g) * p->width + k];
                row[g * stride_of(p->width) + k] = code;
                sum += code;
            }
            memcpy(row + p->groups * stride_of(p->width) + 4 * g, &sum, 4);
        }
    return packed;
}

static uint8_t *pack_weights(const int8_t *weights, const rk_part *p, int bits, int64_t channels) {
    const int64_t tiles = (channels + 63) / 64, tile_bytes = rk_tile_bytes(p, bits), stride = stride_of(p->width);
    uint8_t *packed = array(tiles, (size_t)tile_bytes);
    memset(packed, bits <= 4 ? 0x88 : 0x80, (size_t)(tiles * tile_bytes));
    for (int64_t n = 0; n < channels; n++)
        for (int64_t g = 0; g < p->groups; g++)
            for (int64_t k = 0; k < p->width; k++) {
                int code = weights[(n * p->groups + g) * p->width + k];
                uint8_t *block = packed + n / 64 * tile_bytes + (g * stride + k) / 8 * (bits <= 4 ? 256 : 512);
                int64_t at = n % 64 / 16 * 64 + n % 16 * 4 + k % 4, half = k % 8 / 4;
                if (bits > 4)
                    block[256 * half + at] = (uint8_t)(code + 128);
                else
                    block[at] = half ? (uint8_t)((block[at] & 15) | (code + 8) << 4) : (uint8_t)((block[at] & 240) | (code + 8));
            }
    return packed;
}

static int64_t runs_of(const rk_mixed_linear_args *a, int summed) {
    int64_t runs = 0;
    for (int i = 0; i < a->parts; i++)
        runs += summed && RK_CENTRED(a->part[i].part.bits) ? 0 : a->part[i].part.groups;
    return runs;
}

static int8_t *random_codes(int64_t count, int bits) {
    int8_t *codes = array(count, 1);
    for (int64_t i = 0; i < count; i++)
        codes[i] = (int8_t)between(-(1 << (bits - 1)), (1 << (bits - 1)) - 1);
    return codes;
}

/* Of rows: with their zero points taken out they have one bit more. */
static int8_t *random_rows(int64_t count, int bits) { return random_codes(count, bits + RK_CENTRED(bits)); }

static int32_t *random_zero_points(const rk_mixed_linear_args *a, int64_t rows) {
    int32_t *zero_point = array(rows * runs_of(a, 0), 4), *next = zero_point;
    for (int64_t m = 0; m < rows; m++)
        for (int i = 0; i < a->parts; i++)
            for (int64_t g = 0; g < a->part[i].part.groups; g++)
                *next++ = RK_CENTRED(a->part[i].part.bits) ? 0 : (int32_t)between(-128, 127);
    return zero_point;
}

static void expected_linear(const rk_mixed_linear_args *a, const plain_part *plain, int64_t runs, float *y) {
    for (int64_t m = 0; m < a->rows; m++)
        for (int64_t n = 0; n < a->channels; n++) {
            float sum = 0;
            int64_t run = 0;
            for (int i = 0; i < a->parts; i++) {
                const rk_part *p = &a->part[i].part;
                float part_sum = 0, weight_scale = a->weight_scale[i * a->channels + n];
                for (int64_t g = 0; g < p->groups; g++, run++) {
                    int32_t acc = 0, zero_point = a->zero_point[m * runs + run];
                    for (int64_t k = 0; k < p->width; k++)
                        acc += (plain[i].codes[(m * p->groups + g) * p->width + k] - zero_point) *
                               plain[i].weights[(n * p->groups + g) * p->width + k];
                    float scale = a->scale[m * runs + run];
                    float value = p->groups == 1 ? (float)acc * (scale * weight_scale) : (float)acc * scale;
                    part_sum = g ? part_sum + value : value;
                }
                part_sum = p->groups == 1 ? part_sum : part_sum * weight_scale;
                sum = i ? sum + part_sum : part_sum;
            }
            sum = a->bias ? sum + a->bias[n] : sum;
            y[m * a->channels + n] = a->residual ? sum + a->residual[m * a->channels + n] : sum;
        }
}

static int32_t *weight_sums(const rk_mixed_linear_args *a, const plain_part *plain) {
    int32_t *sums = array(runs_of(a, 1) * a->channels, 4);
    int64_t run = 0;
    for (int i = 0; i < a->parts; i++)
        for (int64_t g = 0; g < a->part[i].part.groups && !RK_CENTRED(a->part[i].part.bits); g++, run++)
            for (int64_t n = 0; n < a->channels; n++) {
                int64_t width = a->part[i].part.width;
                int32_t sum = 0;
                for (int64_t k = 0; k < width; k++)
                    sum += plain[i].weights[(n * a->part[i].part.groups + g) * width + k];
                sums[run * a->channels + n] = sum;
            }
    return sums;
}

static int check_mixed_linear(void) {
    rk_mixed_linear_args a = {random_bits() & 1 ? between(1, 15) : between(16, 150), between(1, 150), (int32_t)between(1, 3), {{{0}, 0, 0, 0}}};
    plain_part plain[RK_MAX_PARTS];
    for (int i = 0; i < a.parts; i++) {
        rk_part p = {between(1, 40), (int32_t)between(1, 3), random_bits() & 1 ? 4 : 8, 1.0f};
        int weight_bits = random_bits() & 1 ? 4 : 8;
        plain[i].codes = random_rows(a.rows * p.groups * p.width, p.bits);
        plain[i].weights = random_codes(a.channels * p.groups * p.width, weight_bits);
        a.part[i] = (rk_linear_part){p, weight_bits, pack_rows(plain[i].codes, &p, a.rows),
                                     pack_weights(plain[i].weights, &p, weight_bits, a.channels)};
    }
    const int64_t runs = runs_of(&a, 0);
    a.zero_point = random_zero_points(&a, a.rows);
    a.scale = floats(a.rows * runs, 0.001f, 0.1f);
    a.weight_scale = floats(a.parts * a.channels, 0.001f, 0.1f);
    a.weight_sum = weight_sums(&a, plain);
    a.bias = random_bits() & 1 ? floats(a.channels, -1, 1) : NULL;
    a.residual = random_bits() & 1 ? floats(a.rows * a.channels, -1, 1) : NULL;
    a.residual_stride = a.y_stride = a.channels;
    a.y = array(a.rows * a.channels, 4);
    float *expected = array(a.rows * a.channels, 4);
    expected_linear(&a, plain, runs, expected);
    int wrong = compare("mixed_linear", run_mixed_linear, &a, a.y, a.rows * a.channels * 4, expected);
    for (int i = 0; i < a.parts; i++) {
        free(plain[i].codes), free(plain[i].weights);
        free((void *)a.part[i].x), free((void *)a.part[i].weight);
    }
    free((void *)a.zero_point), free((void *)a.scale), free((void *)a.weight_scale), free((void *)a.weight_sum);
    free((void *)a.bias), free((void *)a.residual), free(a.y), free(expected);
    return wrong;
}

/* grouped_linear and combined_linear: every group is a mixed_linear of its own. */

RUNNER(grouped_linear)
RUNNER(combined_linear)

#define MOST_EXPERTS 5
#define MOST_ROWS 31

typedef struct {
    rk_grouped_linear_args g;
    int64_t runs, rows, experts;
    int32_t expert[MOST_EXPERTS], first_row[MOST_EXPERTS + 1], bits[MOST_EXPERTS * RK_MAX_PARTS];
    int64_t at[MOST_EXPERTS];
    plain_part plain[MOST_EXPERTS][RK_MAX_PARTS]; /* weights of every expert; codes: those of all rows, the same in each */
    float *expected;
} mixture;

/* Some of the experts in rising order, with rows, or at times with none. */
static void random_groups(mixture *m) {
    m->experts = between(1, MOST_EXPERTS);
    m->first_row[0] = 0;
    for (int64_t e = 0; e < m->experts; e++)
        if (random_bits() % 4) {
            m->expert[m->g.groups++] = (int32_t)e;
            m->rows += m->rows < MOST_ROWS - 15 ? between(0, 15) : 0;
            m->first_row[m->g.groups] = (int32_t)m->rows;
        }
    m->g.expert = m->expert, m->g.first_row = m->first_row, m->g.weight_at = m->at, m->g.weight_bits = m->bits;
}

/* Codes of every expert's weights, packed one behind the other, and their sums. */
static void random_weights(mixture *m) {
    rk_mixed_linear_args *a = &m->g.linear;
    int64_t bytes = 0, tiles = (a->channels + 63) / 64;
    const int64_t summed = runs_of(a, 1) * a->channels;
    int32_t *sums = array(m->experts * summed, 4);
    uint8_t *packed = NULL;
    for (int64_t e = 0; e < m->experts; e++) {
        m->at[e] = bytes;
        for (int i = 0; i < a->parts; i++) {
            const rk_part *p = &a->part[i].part;
            const int bits = m->bits[e * a->parts + i] = (int32_t)between(2, 8);
            const int64_t size = tiles * rk_tile_bytes(p, bits);
            m->plain[e][i].weights = random_codes(a->channels * p->groups * p->width, bits);
            m->plain[e][i].codes = m->plain[0][i].codes;
            uint8_t *tile = pack_weights(m->plain[e][i].weights, p, bits, a->channels);
            packed = realloc(packed, (size_t)(bytes + size));
            memcpy(packed + bytes, tile, (size_t)size);
            free(tile);
            bytes += size;
        }
        int32_t *mine = weight_sums(a, m->plain[e]);
        memcpy(sums + e * summed, mine, (size_t)summed * 4);
        free(mine);
    }
    a->part[0].weight = packed, a->weight_sum = sums;
}

static void expected_groups(mixture *m) {
    const rk_mixed_linear_args *whole = &m->g.linear;
    m->expected = array(m->rows * whole->channels, 4);
    for (int64_t g = 0; g < m->g.groups; g++) {
        rk_mixed_linear_args a = *whole;
        const int64_t e = m->expert[g], row = m->first_row[g];
        plain_part plain[RK_MAX_PARTS];
        for (int i = 0; i < a.parts; i++) {
            plain[i] = m->plain[e][i];
            plain[i].codes += row * a.part[i].part.groups * a.part[i].part.width;
        }
        a.rows = m->first_row[g + 1] - row;
        a.scale += row * m->runs, a.zero_point += row * m->runs;
        a.weight_scale += e * a.parts * a.channels, a.bias = a.bias ? a.bias + e * a.channels : NULL, a.residual = NULL;
        expected_linear(&a, plain, m->runs, m->expected + row * a.channels);
    }
}

static int check_combined(const mixture *m) {
    rk_combined_linear_args c = {.grouped = m->g, .tokens = between(1, 9)};
    rk_mixed_linear_args *a = &c.grouped.linear;
    const int64_t n = a->channels, bytes = c.tokens * n * 4;
    int32_t *token = array(m->rows, 4);
    for (int64_t i = 0; i < m->rows; i++)
        token[i] = (int32_t)between(0, c.tokens - 1);
    float *expected = array(c.tokens * n, 4), *residual = random_bits() & 1 ? floats(c.tokens * n, -1, 1) : NULL;
    c.token = token, c.share = floats(m->rows, -1, 1), a->residual = residual, a->residual_stride = n, a->y = array(bytes, 1);
    for (int64_t i = 0; i < c.tokens * n; i++)
        expected[i] = residual ? residual[i] : 0;
    for (int64_t i = 0; i < m->rows * n; i++) {
        const float share = c.share[i / n] * m->expected[i];
        expected[token[i / n] * n + i % n] += share;
    }
    int wrong = compare("combined_linear", run_combined_linear, &c, a->y, bytes, expected);
    free(token), free(expected), free(residual), free((void *)c.share), free(a->y);
    return wrong;
}

static int check_grouped_linear(void) {
    mixture m = {.g.linear = {.channels = between(1, 150), .parts = (int32_t)between(1, 3)}};
    rk_mixed_linear_args *a = &m.g.linear;
    random_groups(&m);
    for (int i = 0; i < a->parts; i++) {
        rk_part p = {between(1, 40), (int32_t)between(1, 2), (int32_t)between(2, 8), 1.0f};
        m.plain[0][i].codes = random_rows(m.rows * p.groups * p.width, p.bits);
        a->part[i] = (rk_linear_part){p, 0, pack_rows(m.plain[0][i].codes, &p, m.rows), NULL};
        m.runs += p.groups;
    }
    random_weights(&m);
    a->zero_point = random_zero_points(a, m.rows), a->scale = floats(m.rows * m.runs, 0.001f, 0.1f);
    a->weight_scale = floats(m.experts * a->parts * a->channels, 0.001f, 0.1f);
    a->bias = random_bits() & 1 ? floats(m.experts * a->channels, -1, 1) : NULL;
    a->y_stride = a->channels, a->y = array(m.rows * a->channels, 4);
    expected_groups(&m);
    int wrong = compare("grouped_linear", run_grouped_linear, &m.g, a->y, m.rows * a->channels * 4, m.expected);
    wrong |= check_combined(&m);
    for (int i = 0; i < a->parts; i++) {
        free((void *)a->part[i].x), free(m.plain[0][i].codes);
        for (int64_t e = 0; e < m.experts; e++)
            free(m.plain[e][i].weights);
    }
    free((void *)a->part[0].weight), free((void *)a->weight_sum), free((void *)a->zero_point), free((void *)a->scale);
    free((void *)a->weight_scale), free((void *)a->bias), free(a->y), free(m.expected);
    return wrong;
}

/* Quantizers: codes, scales and zero points in one buffer, so that they are compared together. */

RUNNER(norm_quantize)
RUNNER(hadamard_quantize)

/* Puts random parts into `out`, with results in the buffer that is returned. Sets columns and the bytes of the buffer. */
static void *random_codes_out(rk_codes *out, int64_t rows, int max_groups, int64_t *columns, int64_t *bytes) {
    int64_t runs = 0;
    out->parts = (int32_t)between(1, 3);
    *columns = *bytes = 0;
    for (int i = 0; i < out->parts; i++) {
        out->part[i] = (rk_part){between(1, 70), (int32_t)between(1, max_groups), (int32_t)between(2, 8), uniform(0.5f, 1)};
        runs += out->part[i].groups;
        *columns += out->part[i].width * out->part[i].groups;
        *bytes += rows * rk_row_bytes(&out->part[i]);
    }
    int8_t *buffer = array(rows * runs * 8 + *bytes, 1), *at = buffer + rows * runs * 8;
    out->scale = (float *)buffer;
    out->zero_point = (int32_t *)(buffer + rows * runs * 4);
    for (int i = 0; i < out->parts; at += rows * rk_row_bytes(&out->part[i++]))
        out->rows[i] = at;
    *bytes += rows * runs * 8;
    return buffer;
}

static int check_norm_quantize(void) {
    rk_norm_quantize_args a = {.rows = between(1, 5), .norm = (int32_t)between(0, 2), .epsilon = 1e-5f};
    int64_t columns, bytes;
    void *result = random_codes_out(&a.out, a.rows, 3, &columns, &bytes);
    a.x_stride = columns;
    a.x = floats(a.rows * columns, -3, 5);
    a.weight = random_bits() & 1 ? floats(columns, -1, 1) : NULL;
    a.bias = random_bits() & 1 ? floats(columns, -1, 1) : NULL;
    int wrong = compare("norm_quantize", run_norm_quantize, &a, result, bytes, NULL);
    free(result), free((void *)a.x), free((void *)a.weight), free((void *)a.bias);
    return wrong;
}

static rk_transform random_transform(int64_t *width, float *signs) {
    rk_transform t = {.blocks = between(1, 3), .factors = (int32_t)between(0, 3)};
    *width = t.blocks;
    for (int f = 0; f < t.factors; f++) {
        t.factor[f] = random_bits() & 1 ? signs : NULL;
        t.order[f] = t.factor[f] ? 4 * (int32_t)between(3, 5) : 2 << between(0, 5);
        *width *= t.order[f];
    }
    return t;
}

static int check_hadamard_quantize(void) {
    rk_hadamard_quantize_args a = {.rows = between(1, 3), .activation = (int32_t)between(0, 5), .limit = 2.0f, .slope = 1.7f};
    int64_t columns, bytes;
    float *signs = array(400, sizeof *signs);
    for (int i = 0; i < 400; i++)
        signs[i] = random_bits() & 1 ? 1.0f : -1.0f;
    a.transform[0] = random_transform(&columns, signs);
    a.out = (rk_codes){.parts = 1, .part = {{columns, 1, 4 + 4 * (int32_t)between(0, 1), 1.0f}}};
    bytes = a.rows * (rk_row_bytes(&a.out.part[0]) + 8);
    int8_t *result = array(bytes, 1);
    a.out.scale = (float *)result;
    a.out.zero_point = (int32_t *)(result + 4 * a.rows);
    a.out.rows[0] = result + 8 * a.rows;
    a.gate_stride = a.up_stride = columns;
    a.gate = floats(a.rows * columns, -9, 9);
    a.up = random_bits() & 1 ? floats(a.rows * columns, -3, 3) : NULL;
    int wrong = compare("hadamard_quantize", run_hadamard_quantize, &a, result, bytes, NULL);
    free(result), free(signs), free((void *)a.gate), free((void *)a.up);
    return wrong;
}

/* The cache: rope_cache writes one, attention reads it. */

RUNNER(rope_cache)

/* With what is in front of scratch set to 0 before, and the units in two pieces, backwards. */
static void run_attention(const void *args) {
    const rk_attention_args *a = args;
    if (a->scratch)
        memset(a->scratch, 0, (size_t)(a->batch * a->kv_heads) * 4);
    int64_t units = rk_attention_units(a), middle = units / 2;
    rk_attention(a, middle, units);
    rk_attention(a, 0, middle);
}

static rk_head random_head(void) {
    rk_head h = {(int32_t)between(0, 45), (int32_t)between(0, 40), (int32_t)between(2, 4), (int32_t)between(5, 8)};
    h.high += h.low + h.high == 0;
    return h;
}

static int64_t columns_of(rk_head h) { return h.low + h.high; }

static int check_attention(const rk_rope_cache_args *r) {
    rk_attention_args a = {r->batch, r->tokens, r->heads, r->kv_heads, r->q_out, r->key, r->value, r->key_cache, r->value_cache,
                           r->capacity, r->start, .scale = 0.2f, .window = between(0, 1) * between(1, 9)};
    a.mask_stride = r->capacity;
    a.softcap = random_bits() & 1 ? 3.0f : 0.0f;
    a.sinks = random_bits() & 1 ? floats(a.heads, -1, 1) : NULL, a.slopes = random_bits() & 1 ? floats(a.heads, 0, 0.5f) : NULL;
    uint8_t *mask = random_bits() & 1 ? array(a.batch * a.capacity, 1) : NULL;
    for (int64_t i = 0; mask && i < a.batch * a.capacity; i++)
        mask[i] = random_bits() % 4 > 0;
    a.mask = mask;
    int64_t bytes = a.batch * a.tokens * a.heads * columns_of(a.value) * 4;
    a.out = array(bytes, 1);
    a.prefix = between(0, 1) * between(1, 3);
    const int64_t prefix = a.kv_heads * a.prefix;
    a.prefix_keys = floats(prefix * columns_of(a.key), -2, 2), a.prefix_values = floats(prefix * columns_of(a.value), -2, 2);
    int wrong = compare("attention", run_attention, &a, a.out, bytes, NULL);
    a.scratch = rk_attention_scratch(&a) ? array(rk_attention_scratch(&a), 1) : NULL;
    wrong |= compare("attention in chunks", run_attention, &a, a.out, bytes, NULL);
    free(mask), free((void *)a.sinks), free(a.out), free(a.scratch), free((void *)a.prefix_keys), free((void *)a.prefix_values);
    free((void *)a.slopes);
    return wrong;
}

/* Every row that is read is what was written into it, in plain arithmetic on the bytes of the cache. */
RUNNER(cache_image)

static void expected_image(const rk_cache_image_args *a, float *y) {
    const int64_t rows = a->batch * a->heads * a->total, bytes = rk_head_bytes(&a->head), half = a->head.low / 2;
    const int parts = (a->head.low > 0) + (a->head.high > 0);
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *row = a->cache + (r / a->total * a->capacity + r % a->total) * bytes, *zero_point = row + bytes - 5 * parts;
        float scale[2];
        memcpy(scale, zero_point + parts, (size_t)parts * 4);
        for (int64_t c = 0; c < a->head.low; c++, y++) {
            const int code = c < half ? row[c] & 15 : c < 2 * half ? row[c - half] >> 4 : row[half];
            *y = (float)(code - zero_point[0]) * scale[0];
        }
        for (int64_t c = 0; c < a->head.high; c++, y++)
            *y = (float)(row[(a->head.low + 1) / 2 + c] - zero_point[parts - 1]) * scale[parts - 1];
    }
}

static int check_cache_image(void) {
    rk_cache_image_args a = {.batch = between(1, 2), .heads = between(1, 2), .tokens = between(1, 9), .clip = 0.9f, .head = random_head()};
    const int64_t columns = columns_of(a.head), past = between(0, 7);
    a.total = past + a.tokens, a.capacity = a.total + between(0, 3);
    const int64_t slots = a.batch * a.heads * a.capacity, bytes = slots * rk_head_bytes(&a.head), size = a.batch * a.heads * a.total * columns * 4;
    a.x = floats(a.batch * a.heads * a.tokens * columns, -2, 2);
    int32_t start[2] = {(int32_t)past, (int32_t)past};
    a.start = start;
    uint8_t *result = array(size + bytes, 1); /* compared together: the image, and the bytes that the new rows became */
    a.out = (float *)result, a.cache = result + size;
    int wrong = compare("cache_image", run_cache_image, &a, result, size + bytes, NULL);
    float *expected = array(size, 1);
    expected_image(&a, expected);
    if (memcmp(expected, a.out, (size_t)size)) {
        printf("cache_image: not what the bytes say\n");
        wrong = 1;
    }
    free((void *)a.x), free(result), free(expected);
    return wrong;
}

#include "check_latent.h" /* behind what it is made of */

static int check_rope_cache_and_attention(void) {
    rk_rope_cache_args a = {.batch = between(1, 2), .tokens = between(1, 40), .kv_heads = between(1, 3), .epsilon = 1e-5f, .clip = 1};
    a.heads = a.kv_heads * between(1, 4);
    a.key = random_head(), a.value = random_head();
    const int64_t past = random_bits() % 4 ? 50 : 600; /* the longer one is cut into chunks */
    a.capacity = a.tokens + past;
    const int64_t d = columns_of(a.key), e = columns_of(a.value), rows = a.batch * a.tokens, slots = a.batch * a.kv_heads * a.capacity;
    a.q_stride = a.heads * d, a.k_stride = a.kv_heads * d, a.v_stride = a.kv_heads * e;
    a.q = floats(rows * a.q_stride, -2, 2), a.k = floats(rows * a.k_stride, -2, 2), a.v = floats(rows * a.v_stride, -2, 2);
    a.rotary = between(0, d / 2) * 2, a.rotary_batch_stride = a.tokens * a.rotary;
    a.cos = floats(rows * a.rotary, -1, 1), a.sin = floats(rows * a.rotary, -1, 1);
    a.bases = random_bits() & 1 ? 1 : a.kv_heads;
    a.basis = random_bits() & 1 ? floats(a.bases * d * d, -0.3f, 0.3f) : NULL;
    a.q_norm = random_bits() & 1 ? floats(d, 0.5f, 2) : NULL;
    a.k_norm = a.q_norm;
    int32_t *start = array(a.batch, 4);
    for (int64_t b = 0; b < a.batch; b++)
        start[b] = (int32_t)between(0, past);
    a.start = start;
    const int64_t key_bytes = slots * rk_head_bytes(&a.key), value_bytes = slots * rk_head_bytes(&a.value);
    int64_t bytes = rows * a.q_stride * 4 + key_bytes + value_bytes;
    uint8_t *result = array(bytes, 1);
    a.q_out = (float *)result, a.key_cache = result + rows * a.q_stride * 4, a.value_cache = a.key_cache + key_bytes;
    int wrong = compare("rope_cache", run_rope_cache, &a, result, bytes, NULL);
    memset(a.key_cache, 0, (size_t)(key_bytes + value_bytes)); /* slots that nothing was written to hold some numbers */
    run_rope_cache(&a);
    wrong |= check_attention(&a);
    free((void *)a.q), free((void *)a.k), free((void *)a.v), free((void *)a.cos), free((void *)a.sin), free((void *)a.basis);
    free((void *)a.q_norm), free(start), free(result);
    return wrong;
}

int main(int count, char **arguments) {
    int rounds = count > 1 ? atoi(arguments[1]) : 20, wrong = 0;
    for (int i = 0; i < rounds; i++)
        wrong |= check_mixed_linear() | check_grouped_linear() | check_norm_quantize() | check_hadamard_quantize() | check_rope_cache_and_attention() | check_cache_image() |
                 check_latent_attention();
    for (int32_t i = 0; rk_instruction_set(i); i++)
        printf("%s: %s\n", rk_instruction_set(i), rk_supported(i) ? "checked" : "not supported by this processor");
    return wrong;
}
