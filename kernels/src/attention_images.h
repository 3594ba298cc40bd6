/* Tiles of cached keys and values as quads of bytes, and queries as quads that fit them. */
#ifndef RK_ATTENTION_IMAGES_H
#define RK_ATTENTION_IMAGES_H

#include "attention_codes.h"
#include "cache_rows.h"

#define TILE_KEYS 128
#define SLACK 64                            /* bytes that may be read behind a row */
#define ROW_BYTES (RK_MAX_HEAD + 10)     /* of a cached head, at most */
#define QUAD_SPACE (RK_MAX_HEAD / 4 + 4)    /* quads of a key */
#define QUERY_SPACE (RK_MAX_HEAD + 16)      /* codes of a query */
#define COLUMN_SPACE (RK_MAX_HEAD + 2 * 16) /* columns of a value */

/* Where the two parts of a head lie. A quad of a key is four bytes of its row, which hold eight columns of the low part or four of the
 * high one; each part of a value begins with a vector of its own. */
typedef struct {
    int64_t width[2], bytes[2];
    int64_t quads[2];              /* of a key */
    int64_t column_at[2], columns; /* of a value */
} head_layout;

static head_layout layout_of(const rk_head *h) {
    head_layout l = {{h->low, h->high}, {(h->low + 1) / 2, h->high}, {0}, {0}, 0};
    l.quads[0] = (l.bytes[0] + 3) / 4, l.quads[1] = (l.bytes[1] + 3) / 4;
    l.column_at[1] = rk_round_up(h->low, RK_WIDTH);
    l.columns = l.column_at[1] + rk_round_up(h->high, RK_WIDTH);
    return l;
}

/* Rows of a cached head from a token on. */
typedef struct {
    const uint8_t *row;
    int64_t bytes, left; /* left: bytes of the whole cache from `row` on */
} cache_reader;

/* What a tile's codes are multiplied with, and what is subtracted from them before. */
typedef struct {
    float scale[2][TILE_KEYS];
    uint8_t zero_point[2][TILE_KEYS];
} tile_scales;

/* The next `count` rows of a cache that has `keys` more, zeros where it has none, with SLACK bytes behind them that may be read: copied
 * to `space`, which has room for them, where the cache ends before. ask: for the rows that the next tile has in this place. */
RK_INLINE const uint8_t *next_rows(cache_reader *r, const int count, int64_t keys, const int ask, uint8_t *space) {
    const uint8_t *rows = r->row;
    const int64_t bytes = count * r->bytes;
    for (int64_t i = 0; ask && i < bytes; i += 64)
        __builtin_prefetch(rows + TILE_KEYS * r->bytes + i, 0, 2);
    if (keys < count || r->left < bytes + SLACK) {
        const int64_t there = rk_min(keys, count) * r->bytes;
        memcpy(space, rows, (size_t)there);
        memset(space + there, 0, (size_t)(bytes - there));
        rows = space;
    }
    r->row += bytes, r->left -= bytes;
    return rows;
}

/* 16 bytes of row i and of every fourth one behind it. */
RK_INLINE i32v every_fourth(const uint8_t *rows, int64_t stride, int i) {
    i32v v;
#if defined(__AVX512F__)
    __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows + i * stride)));
    four = _mm512_mask_broadcast_i32x4(four, 0x00f0, _mm_loadu_si128((const __m128i *)(rows + (i + 4) * stride)));
    four = _mm512_mask_broadcast_i32x4(four, 0x0f00, _mm_loadu_si128((const __m128i *)(rows + (i + 8) * stride)));
    v = (i32v)_mm512_mask_broadcast_i32x4(four, 0xf000, _mm_loadu_si128((const __m128i *)(rows + (i + 12) * stride)));
#else
    for (int j = 0; j < RK_WIDTH / 4; j++)
        memcpy((char *)&v + 16 * j, rows + (i + 4 * j) * stride, 16);
#endif
    return v;
}

/* 16 bytes of RK_WIDTH rows as four quads, row i in lane i. */
RK_INLINE void four_quads(const uint8_t *rows, int64_t stride, i32v quads[4]) {
    i32v v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        v[i] = every_fourth(rows, stride, i);
    rk_transpose_fours(v, quads);
}

/* The same of RK_WIDTH rows. */
typedef struct {
    f32v scale[2];
    i32v zero_point[2];
} row_scales;

/* Scales and zero points of rows from the quads behind their codes. */
RK_INLINE row_scales scales_of(const head_layout l, const i32v quads[3]) {
    const u32v t[3] = {(u32v)quads[0], (u32v)quads[1], (u32v)quads[2]};
    const int both = l.width[0] && l.width[1];
    const u32v first = both ? t[0] >> 16 | t[1] << 16 : t[0] >> 8 | t[1] << 24, second = both ? t[1] >> 16 | t[2] << 16 : first;
    return (row_scales){{(f32v)first, (f32v)second}, {(i32v)(t[0] & 255), (i32v)((both ? t[0] >> 8 : t[0]) & 255)}};
}

/* Those of rows whose first is the j-th of the tile. */
RK_INLINE void store_scales(const head_layout l, const i32v quads[3], int64_t j, tile_scales *s) {
    const row_scales rows = scales_of(l, quads);
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
        rk_store_bytes(s->zero_point[part] + j, rows.zero_point[part]);
        rk_store(s->scale[part] + j, rows.scale[part]);
    }
}

/* Whether both parts of a row and what lies behind them begin a quad. */
RK_INLINE int in_whole_quads(const head_layout *l) {
    return (l->bytes[0] % 4 == 0 || !l->width[1]) && (l->bytes[0] + l->bytes[1]) % 4 == 0;
}

RK_INLINE void read_scales(const head_layout l, const uint8_t *rows, int64_t stride, int64_t j, tile_scales *s) {
    i32v quads[4];
    four_quads(rows + l.bytes[0] + l.bytes[1], stride, quads);
    store_scales(l, quads, j, s);
}

/* Quads of some rows, row i in lane i: quads [quad][TILE_KEYS]; the three behind them go to `rest` if there is one. */
RK_INLINE void spread(const uint8_t *rows, int64_t stride, int64_t count, int32_t *quads, i32v *rest) {
    for (int64_t first = 0; first < count + (rest ? 3 : 0); first += 4) {
        i32v v[4];
        four_quads(rows + 4 * first, stride, v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            if (first + i < count)
                rk_store_i32(quads + (first + i) * TILE_KEYS, v[i]);
            else if (rest && first + i < count + 3)
                rest[first + i - count] = v[i];
    }
}

/* Codes of a tile of keys: quads [quad][TILE_KEYS], up to whole vectors of keys. Bytes that lie behind a part in its last quad are
 * multiplied with zeros of the query. */
static void read_keys(const head_layout l, cache_reader r, int64_t keys, int32_t *quads, tile_scales *s) {
    const int64_t together = l.bytes[0] % 4 == 0 ? l.quads[1] : 0;
    const int all = in_whole_quads(&l);
    uint8_t space[RK_WIDTH * ROW_BYTES + SLACK];
    for (int64_t j = 0; j < keys; j += RK_WIDTH) {
        const int64_t bytes = r.bytes;
        const uint8_t *rows = next_rows(&r, RK_WIDTH, keys - j, 1, space);
        if (all) {
            i32v rest[3];
            spread(rows, bytes, l.quads[0] + l.quads[1], quads + j, rest);
            store_scales(l, rest, j, s);
            continue;
        }
        read_scales(l, rows, bytes, j, s);
        spread(rows, bytes, l.quads[0] + together, quads + j, NULL);
        spread(rows + l.bytes[0], bytes, l.quads[1] - together, quads + l.quads[0] * TILE_KEYS + j, NULL);
    }
}

/* Bytes of four rows side by side, RK_WIDTH lanes. */
RK_INLINE i32v four_rows(const uint8_t *rows, int64_t stride) {
#if defined(__AVX512F__)
    const __m512i bring = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)rows));
    four = _mm512_mask_broadcast_i32x4(four, 0x00f0, _mm_loadu_si128((const __m128i *)(rows + stride)));
    four = _mm512_mask_broadcast_i32x4(four, 0x0f00, _mm_loadu_si128((const __m128i *)(rows + 2 * stride)));
    four = _mm512_mask_broadcast_i32x4(four, 0xf000, _mm_loadu_si128((const __m128i *)(rows + 3 * stride)));
    return (i32v)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(bring, four), turn);
#else
    return rk_load_bytes(rows) | rk_load_bytes(rows + stride) << 8 | rk_load_bytes(rows + 2 * stride) << 16 |
           (i32v)((u32v)rk_load_bytes(rows + 3 * stride) << 24);
#endif
}

/* Every column of four values. Whole vectors are written. */
RK_INLINE void value_quads(const head_layout l, const uint8_t *rows, int64_t stride, int32_t *quads) {
    const int64_t half = l.width[0] / 2;
    for (int64_t i = rk_round_up(half, RK_WIDTH) - RK_WIDTH; i >= 0; i -= RK_WIDTH) { /* the end of a vector is written over */
        const i32v codes = four_rows(rows + i, stride);
        rk_store_i32(quads + i, codes & 0x0f0f0f0f);
        rk_store_i32(quads + half + i, codes >> 4 & 0x0f0f0f0f);
    }
    if (l.width[0] % 2)
        quads[l.width[0] - 1] = four_rows(rows + half, stride)[0];
    for (int64_t i = 0; i < l.width[1]; i += RK_WIDTH)
        rk_store_i32(quads + l.column_at[1] + i, four_rows(rows + l.bytes[0] + i, stride));
}

/* A tile of values: quads [quad of keys][column]. What is missing has a scale of 0. */
static void read_values(const head_layout l, cache_reader r, int64_t keys, int32_t *quads, tile_scales *s) {
    uint8_t space[RK_WIDTH * ROW_BYTES + SLACK];
    for (int64_t j = 0; j < TILE_KEYS; j += RK_WIDTH) {
        const int64_t bytes = r.bytes;
        const uint8_t *rows = next_rows(&r, RK_WIDTH, keys > j ? keys - j : 0, 1, space);
        read_scales(l, rows, bytes, j, s);
        for (int64_t i = 0; i < rk_min(RK_WIDTH, keys - j); i += 4)
            value_quads(l, rows + i * bytes, bytes, quads + (j + i) / 4 * l.columns);
    }
}

/* What the codes of a part of a query are multiplied with, and their sum: an integer. */
typedef struct {
    float scale, sum;
} query_codes;

/* Codes of some columns, zeros up to a whole vector; returns their sum. */
static int32_t code_columns(const float *q, int64_t count, float factor, int8_t *codes) {
    i32v sum = {0};
    for (int64_t i = 0; i < count; i += RK_WIDTH) {
        const i32v code = code_of(rk_load_some(q + i, count - i), factor);
        rk_store_bytes(codes + i, code);
        sum += (i32v)((u32v)code << 24) >> 24;
    }
    return rk_sum_across(sum);
}

static float largest_of(const float *q, int64_t width) {
    f32v highest = {0};
    for (int64_t i = 0; i < width; i += RK_WIDTH) {
        const f32v v = rk_load_some(q + i, width - i);
        highest = rk_highest(highest, rk_highest(v, -v));
    }
    return rk_highest_of(highest);
}

/* The low part of a query: the quads that low nibbles are multiplied with (the first half of the columns, and an odd last one) in turn
 * with those of high nibbles. */
static query_codes code_low(const float *q, int64_t width, int64_t quads, int8_t *codes) {
    const int64_t half = width / 2;
    const float largest = largest_of(q, width), factor = to_codes(largest, LARGEST_QUERY);
    int8_t first[QUERY_SPACE] = {0}, second[QUERY_SPACE] = {0};
    int32_t sum = code_columns(q, half, factor, first) + code_columns(q + half, half, factor, second);
    if (width % 2)
        sum += code_columns(q + width - 1, 1, factor, first + half);
    for (int64_t j = 0; j < quads; j++) {
        memcpy(codes + 8 * j, first + 4 * j, 4);
        memcpy(codes + 8 * j + 4, second + 4 * j, 4);
    }
    return (query_codes){from_codes(largest, LARGEST_QUERY), (float)sum};
}

/* The high part. */
static query_codes code_high(const float *q, int64_t width, int64_t quads, int8_t *codes) {
    const float largest = largest_of(q, width);
    int8_t made[QUERY_SPACE] = {0};
    const int32_t sum = code_columns(q, width, to_codes(largest, LARGEST_QUERY), made);
    memcpy(codes, made, (size_t)(4 * quads));
    return (query_codes){from_codes(largest, LARGEST_QUERY), (float)sum};
}

#endif
