/* Keys and values of a tile multiplied as they lie in the cache: for tiles of few queries, as in decoding, where unpacking them first
 * would take longer than multiplying. Scores are those of score_rows and sums those of value_rows, bit for bit. */
#ifndef RK_ATTENTION_FEW_H
#define RK_ATTENTION_FEW_H

#include "attention_rows.h"

#if defined(__AVX512F__) /* elsewhere bringing four rows side by side takes too long, and registers are too few */
#define TAKES_CACHED 1
#else
#define TAKES_CACHED 0
#endif

/* Whether keys are multiplied so. */
RK_INLINE int takes_cached_keys(const query_tile *t, const head_layout *l) {
    return TAKES_CACHED && t->rows <= BLOCK_ROWS && in_whole_quads(l);
}

/* Whether a tile of so many values is multiplied so. */
RK_INLINE int takes_cached_values(const query_tile *t, const head_layout *l, const cache_reader *r, int64_t keys) {
    return TAKES_CACHED && t->rows <= BLOCK_ROWS && l->width[0] % 2 == 0 && r->left >= rk_round_up(keys, 4) * r->bytes + SLACK;
}

#if TAKES_CACHED

#define KEY_VECTORS 2 /* vectors of keys that are multiplied with a quad of queries once it is loaded */

/* sums[part] = q . k of some rows and some vectors of cached keys of `low` quads and others up to `both`; behind: the three quads behind
 * their codes. The last quads come first, since they are what scores wait for. */
RK_INLINE void sum_cached_keys(const attention_space *w, const uint8_t *cached, int64_t stride, int64_t low, int64_t both, const int rows,
                               const int vectors, i32v sums[2][BLOCK_ROWS][BLOCK_VECTORS], i32v behind[3][KEY_VECTORS]) {
    clear_sums(rows, vectors, sums[0]);
    clear_sums(rows, vectors, sums[1]);
#pragma GCC unroll 3
    for (int64_t first = (both + 2) / 4 * 4; first >= 0; first -= 4) {
        i32v quads[KEY_VECTORS][4];
#pragma GCC unroll 2
        for (int i = 0; i < vectors; i++)
            four_quads(cached + 4 * first + i * RK_WIDTH * stride, stride, quads[i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const int64_t quad = first + j;
            i32v v[BLOCK_VECTORS], high[BLOCK_VECTORS];
#pragma GCC unroll 2
            for (int i = 0; i < vectors; i++)
                v[i] = quads[i][j];
            if (quad < low) {
#pragma GCC unroll 2
                for (int i = 0; i < vectors; i++)
                    high[i] = v[i] >> 4 & 0x0f0f0f0f, v[i] &= 0x0f0f0f0f;
                add_quads(w->queries + 8 * quad, QUERY_SPACE, v, 1, QUERIES, rows, vectors, sums[0]);
                add_quads(w->queries + 8 * quad + 4, QUERY_SPACE, high, 1, QUERIES, rows, vectors, sums[0]);
            } else if (quad < both)
                add_quads(w->queries + 4 * (low + quad), QUERY_SPACE, v, 0, QUERIES, rows, vectors, sums[1]);
            else if (quad < both + 3)
                memcpy(behind[quad - both], v, sizeof(i32v) * (size_t)vectors);
        }
    }
}

/* Scores of some rows with some vectors of cached keys. */
RK_INLINE void score_cached_keys(attention_space *w, const uint8_t *cached, int64_t stride, int64_t key, int64_t low, int64_t both,
                                 const int rows, const int vectors) {
    i32v sums[2][BLOCK_ROWS][BLOCK_VECTORS], behind[3][KEY_VECTORS];
    sum_cached_keys(w, cached, stride, low, both, rows, vectors, sums, behind);
#pragma GCC unroll 2
    for (int i = 0; i < vectors; i++) {
        const i32v last[3] = {behind[0][i], behind[1][i], behind[2][i]};
        const row_scales scales = scales_of(w->key, last);
        const f32v zero[2] = {zero_points(scales.zero_point[0], 0), zero_points(scales.zero_point[1], 1)};
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) { /* a part without columns adds nothing */
            const query_codes *c = w->codes[r];
            const f32v score = score_of(c, sums[0][r][i], scales.scale[0], zero[0]);
            rk_store(w->scores[r] + key + i * RK_WIDTH, score + score_of(c + 1, sums[1][r][i], scales.scale[1], zero[1]));
        }
    }
}

/* Asks a second time, half a tile ahead, for as many rows as are multiplied at once: not all have come that next_rows asked for. */
RK_INLINE void prefetch_keys(const cache_reader *r) {
    const uint8_t *later = r->row + TILE_KEYS / 2 * r->bytes;
    for (int64_t i = 0; i < KEY_VECTORS * RK_WIDTH * r->bytes; i += 64)
        __builtin_prefetch(later + i, 0, 2);
}

RK_INLINE void score_all_cached_keys(attention_space *w, int64_t keys, int64_t low, int64_t both, const int rows) {
    uint8_t space[KEY_VECTORS * RK_WIDTH * ROW_BYTES + SLACK];
    cache_reader r = w->key_rows;
    int64_t j = 0;
    for (; j + RK_WIDTH < keys; j += KEY_VECTORS * RK_WIDTH) {
        prefetch_keys(&r);
        score_cached_keys(w, next_rows(&r, KEY_VECTORS * RK_WIDTH, keys - j, 1, space), r.bytes, j, low, both, rows, KEY_VECTORS);
    }
    if (j < keys)
        score_cached_keys(w, next_rows(&r, RK_WIDTH, keys - j, 1, space), r.bytes, j, low, both, rows, 1);
}

/* Up to a multiple of 16 keys. Without branches for heads of 64 columns with 1/8 of them high: these would take a fifth of the time. */
RK_INLINE void cached_score_rows(attention_space *w, int64_t keys, const int rows) {
    const int64_t low = w->key.quads[0], both = low + w->key.quads[1];
    if (low == 7 && both == 9)
        score_all_cached_keys(w, keys, 7, 9, rows);
    else
        score_all_cached_keys(w, keys, low, both, rows);
}

/* Half a vector: shuffles of these are as many a cycle, or twice as many. */
typedef int32_t i32h __attribute__((vector_size(32)));

#define HALVES(name, a, b, ...) (i32h)_mm256_##name((__m256i)(a), (__m256i)(b), ##__VA_ARGS__)
#define BLOCK_BYTES 32 /* of a row that are multiplied at once */

RK_INLINE i32h load_half(const void *p) { i32h v; memcpy(&v, p, sizeof v); return v; }

/* Bytes of four rows side by side: the first eight of each 16 bytes, or the last eight; quads[0] has the first four of these. */
RK_INLINE void four_half_rows(const uint8_t *rows, int64_t stride, const int last, i32h quads[2]) {
    const i32h v[4] = {load_half(rows), load_half(rows + stride), load_half(rows + 2 * stride), load_half(rows + 3 * stride)};
    const i32h a = last ? HALVES(unpackhi_epi8, v[0], v[1]) : HALVES(unpacklo_epi8, v[0], v[1]);
    const i32h b = last ? HALVES(unpackhi_epi8, v[2], v[3]) : HALVES(unpacklo_epi8, v[2], v[3]);
    quads[0] = HALVES(unpacklo_epi16, a, b), quads[1] = HALVES(unpackhi_epi16, a, b);
}

/* sums[r][i] = sum_k a[r][k] . b[k] for some rows and 16 columns of a block of cached rows, those of four_half_rows: of low parts in low
 * nibbles (i = 0, 1) and in high ones (2, 3). Asks for the next tile's values on the way: all passes over a tile together ask for about as
 * many bytes as it has. */
RK_INLINE void half_product(attention_space *w, const int part, const uint8_t *b, int64_t quads, const int last, const int rows,
                            i32h sums[BLOCK_ROWS][4]) {
    const uint8_t *a = w->weights[part], *next = w->next_values;
    const int64_t stride = w->value_bytes;
    const int kinds = part ? 2 : 4;
    w->next_values += 64 * quads;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = (i32h){0};
    for (int64_t j = 0; j < quads; j++, a += 4, b += 4 * stride, next += 64) {
        i32h v[4];
        __builtin_prefetch(next, 0, 2);
        four_half_rows(b, stride, last, v);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
            if (part)
                v[i] ^= (int32_t)0x80808080; /* as rk_dot_unsigned has it */
            else
                v[i + 2] = v[i] >> 4 & 0x0f0f0f0f, v[i] &= 0x0f0f0f0f;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, a + r * TILE_KEYS, sizeof four);
            i32h weights = four - (i32h){0};
            KEEP_IN_REGISTER(weights);
#pragma GCC unroll 4
            for (int i = 0; i < kinds; i++)
                sums[r][i] = (i32h)_mm256_dpbusd_epi32((__m256i)sums[r][i], (__m256i)weights, (__m256i)v[i]);
        }
    }
}

/* The same in the order of columns, which are those of a half of sums[r][0] and sums[r][1], and of [2] and [3] in high nibbles. */
RK_INLINE void product_of_cached(attention_space *w, const int part, const uint8_t *b, int64_t quads, const int last, const int rows,
                                 i32v sums[BLOCK_ROWS][BLOCK_VECTORS]) {
    i32h found[BLOCK_ROWS][4];
    half_product(w, part, b, quads, last, rows, found);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < (part ? 2 : 4); i += 2) {
            const i32h first = HALVES(permute2x128_si256, found[r][i], found[r][i + 1], 0x20);
            const i32h second = HALVES(permute2x128_si256, found[r][i], found[r][i + 1], 0x31);
            memcpy((char *)&sums[r][i] + (last ? sizeof first : 0), &first, sizeof first);
            memcpy((char *)&sums[r][i + 1] + (last ? sizeof second : 0), &second, sizeof second);
        }
}

/* A block of bytes of which `count` belong to the part. */
RK_INLINE void cached_value_block(attention_space *w, const int part, int64_t byte, int64_t count, int64_t keys, const int rows,
                                  const int32_t zeros[BLOCK_ROWS]) {
    const uint8_t *cached = w->value_rows + byte + (part ? w->value.bytes[0] : 0);
    const int64_t half = w->value.width[0] / 2, column = byte + (part ? w->value.column_at[1] : 0);
    i32v sums[BLOCK_ROWS][BLOCK_VECTORS];
    product_of_cached(w, part, cached, (keys + 3) / 4, 0, rows, sums);
    if (count > RK_WIDTH / 2)
        product_of_cached(w, part, cached, (keys + 3) / 4, 1, rows, sums);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2 && i * RK_WIDTH < count; i++) {
            const int64_t at = i * RK_WIDTH;
            add_products(w, part, 0, r, column + at, count - at, sums[r][i], zeros);
            if (!part)
                add_products(w, 0, 0, r, half + column + at, count - at, sums[r][i + 2], zeros);
        }
}

/* One part of the values. */
RK_INLINE void cached_value_rows(attention_space *w, const int part, int64_t keys, const int rows) {
    const int64_t count = part ? w->value.width[1] : w->value.width[0] / 2;
    int32_t zeros[BLOCK_ROWS];
    if (count)
        weigh_zero_points(w, part, rk_round_up(keys, 16), rows, zeros);
    for (int64_t i = 0; i < count; i += BLOCK_BYTES)
        cached_value_block(w, part, i, count - i, keys, rows, zeros);
}

#else

RK_INLINE void cached_score_rows(attention_space *w, int64_t keys, const int rows) { (void)w, (void)keys, (void)rows; }

RK_INLINE void cached_value_rows(attention_space *w, const int part, int64_t keys, const int rows) {
    (void)w, (void)part, (void)keys, (void)rows;
}

#endif

#endif
