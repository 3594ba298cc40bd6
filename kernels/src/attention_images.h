/* Tiles of cached keys and values as quads of bytes, and queries as quads that fit them. */
#ifndef RK_ATTENTION_IMAGES_H
#define RK_ATTENTION_IMAGES_H

#include "cache_rows.h"
#include "limbs.h"

#define TILE_KEYS 128
#define SLACK 64                            /* bytes that may be read behind a row */
#define ROW_SPACE (RK_MAX_HEAD + 16 + SLACK)
#define QUAD_SPACE (RK_MAX_HEAD / 4 + 4)    /* quads of a key */
#define QUERY_SPACE (RK_MAX_HEAD + 16)      /* bytes of a query's limb */
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

/* The next row, with SLACK bytes behind it that may be read; copied to `space` if the cache ends there. */
RK_INLINE const uint8_t *next_row(cache_reader *r, uint8_t space[ROW_SPACE]) {
    const uint8_t *row = r->row;
    if (r->left < r->bytes + SLACK)
        row = memcpy(space, row, (size_t)r->bytes);
    r->row += r->bytes, r->left -= r->bytes;
    return row;
}

/* What a tile's codes are multiplied with, and what is subtracted from them before. */
typedef struct {
    float scale[2][TILE_KEYS];
    uint8_t zero_point[2][TILE_KEYS];
} tile_scales;

/* The next RK_WIDTH rows of a cache that has `left` more; zeros where it has none. */
typedef struct {
    const uint8_t *row[RK_WIDTH];
    uint8_t space[RK_WIDTH][ROW_SPACE];
} some_rows;

RK_INLINE void next_rows(cache_reader *r, int64_t left, some_rows *rows) {
    static const uint8_t nothing[ROW_SPACE];
    for (int64_t i = 0; i < RK_WIDTH; i++)
        rows->row[i] = i < left ? next_row(r, rows->space[i]) : nothing;
}

/* Four bytes from `at` on, and the twelve behind them, of every row. */
RK_INLINE void tails(const some_rows *rows, int64_t at, u32v tail[4]) {
#if defined(__AVX512F__)
    i32v v[4], u[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows->row[i] + at)));
        four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(rows->row[i + 4] + at)), 1);
        four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(rows->row[i + 8] + at)), 2);
        v[i] = (i32v)_mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(rows->row[i + 12] + at)), 3);
    }
    u[0] = ACROSS(unpacklo_epi32, v[0], v[1]), u[1] = ACROSS(unpackhi_epi32, v[0], v[1]);
    u[2] = ACROSS(unpacklo_epi32, v[2], v[3]), u[3] = ACROSS(unpackhi_epi32, v[2], v[3]);
    tail[0] = (u32v)ACROSS(unpacklo_epi64, u[0], u[2]), tail[1] = (u32v)ACROSS(unpackhi_epi64, u[0], u[2]);
    tail[2] = (u32v)ACROSS(unpacklo_epi64, u[1], u[3]), tail[3] = (u32v)ACROSS(unpackhi_epi64, u[1], u[3]);
#else
    for (int i = 0; i < RK_WIDTH; i++) {
        uint32_t four[4];
        memcpy(four, rows->row[i] + at, sizeof four);
        for (int j = 0; j < 4; j++)
            tail[j][i] = four[j];
    }
#endif
}

/* Zero points and scales of some rows, the first being the j-th of the tile. */
RK_INLINE void read_scales(const head_layout l, const some_rows *rows, int64_t j, tile_scales *s) {
    u32v t[4];
    tails(rows, l.bytes[0] + l.bytes[1], t);
    const int both = l.width[0] && l.width[1];
    const u32v first = both ? t[0] >> 16 | t[1] << 16 : t[0] >> 8 | t[1] << 24, second = both ? t[1] >> 16 | t[2] << 16 : first;
    rk_store_bytes(s->zero_point[0] + j, (i32v)(t[0] & 255));
    rk_store_bytes(s->zero_point[1] + j, (i32v)((both ? t[0] >> 8 : t[0]) & 255));
    rk_store(s->scale[0] + j, (f32v)first);
    rk_store(s->scale[1] + j, (f32v)second);
}

/* Quads of some rows from a byte on, row i in lane i: quads [quad][TILE_KEYS]. */
RK_INLINE void spread(const some_rows *rows, int64_t at, int64_t count, int32_t *quads) {
    for (int64_t first = 0; first < count; first += RK_WIDTH) {
        i32v v[RK_WIDTH];
#pragma GCC unroll 16
        for (int i = 0; i < RK_WIDTH; i++)
            memcpy(&v[i], rows->row[i] + at + 4 * first, sizeof v[i]);
        rk_transpose(v);
        for (int64_t i = 0; i < rk_min(RK_WIDTH, count - first); i++)
            rk_store_i32(quads + (first + i) * TILE_KEYS, v[i]);
    }
}

/* Codes of a tile of keys: quads [quad][TILE_KEYS], up to whole vectors of keys. Bytes that lie behind a part in its last quad are
 * multiplied with zeros of the query. */
static void read_keys(const head_layout l, cache_reader r, int64_t keys, int32_t *quads, tile_scales *s) {
    some_rows rows;
    for (int64_t j = 0; j < keys; j += RK_WIDTH) {
        next_rows(&r, keys - j, &rows);
        read_scales(l, &rows, j, s);
        const int together = l.bytes[0] % 4 == 0;
        spread(&rows, 0, l.quads[0] + (together ? l.quads[1] : 0), quads + j);
        if (!together)
            spread(&rows, l.bytes[0], l.quads[1], quads + l.quads[0] * TILE_KEYS + j);
    }
}

/* Bytes of four rows side by side, RK_WIDTH lanes. */
RK_INLINE i32v four_rows(const uint8_t *const rows[4], int64_t at) {
#if defined(__AVX512F__)
    const __m512i bring = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i four = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[0] + at)));
    four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(rows[1] + at)), 1);
    four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(rows[2] + at)), 2);
    four = _mm512_inserti32x4(four, _mm_loadu_si128((const __m128i *)(rows[3] + at)), 3);
    return (i32v)_mm512_shuffle_epi8(_mm512_permutexvar_epi32(bring, four), turn);
#else
    return rk_load_bytes(rows[0] + at) | rk_load_bytes(rows[1] + at) << 8 | rk_load_bytes(rows[2] + at) << 16 |
           (i32v)((u32v)rk_load_bytes(rows[3] + at) << 24);
#endif
}

/* Every column of four values. Whole vectors are written. */
RK_INLINE void value_quads(const head_layout l, const uint8_t *const rows[4], int32_t *quads) {
    const int64_t half = l.width[0] / 2;
    i32v codes[RK_MAX_HEAD / 2 / RK_WIDTH];
    for (int64_t i = 0; i < half; i += RK_WIDTH) {
        codes[i / RK_WIDTH] = four_rows(rows, i);
        rk_store_i32(quads + i, codes[i / RK_WIDTH] & 0x0f0f0f0f);
    }
    for (int64_t i = 0; i < half; i += RK_WIDTH)
        rk_store_i32(quads + half + i, codes[i / RK_WIDTH] >> 4 & 0x0f0f0f0f);
    if (l.width[0] % 2)
        quads[l.width[0] - 1] = four_rows(rows, half)[0];
    for (int64_t i = 0; i < l.width[1]; i += RK_WIDTH)
        rk_store_i32(quads + l.column_at[1] + i, four_rows(rows, l.bytes[0] + i));
}

/* A tile of values: quads [quad of keys][column]. What is missing has a scale of 0. */
static void read_values(const head_layout l, cache_reader r, int64_t keys, int32_t *quads, tile_scales *s) {
    some_rows rows;
    for (int64_t j = 0; j < TILE_KEYS; j += RK_WIDTH) {
        next_rows(&r, keys - j, &rows);
        read_scales(l, &rows, j, s);
        for (int64_t i = 0; i < rk_min(RK_WIDTH, keys - j); i += 4)
            value_quads(l, rows.row + i, quads + (j + i) / 4 * l.columns);
    }
}

/* Sums of the codes of a part of a query. */
typedef struct {
    float scale;
    int32_t rest, bottom;
} query_codes;

/* Codes of some columns, limbs [LIMBS][QUERY_SPACE]; zeros up to a whole vector. */
static void code_columns(const float *q, int64_t count, float factor, int8_t *limbs, query_codes *sums) {
    i32v rest = {0}, bottom = {0};
    for (int64_t i = 0; i < count; i += RK_WIDTH) {
        const i32v code = code_of(rk_load_some(q + i, count - i), factor);
        store_limbs(code, limbs + i, QUERY_SPACE);
        rest += rest_of(code), bottom += bottom_of(code);
    }
    sums->rest += rk_sum_across(rest), sums->bottom += rk_sum_across(bottom);
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
 * with those of high nibbles. limbs: [LIMBS][QUERY_SPACE]. */
static query_codes code_low(const float *q, int64_t width, int64_t quads, int8_t *limbs) {
    const int64_t half = width / 2;
    const float largest = largest_of(q, width), factor = to_codes(largest);
    int8_t first[LIMBS * QUERY_SPACE] = {0}, second[LIMBS * QUERY_SPACE] = {0};
    query_codes c = {from_codes(largest), 0, 0};
    code_columns(q, half, factor, first, &c);
    code_columns(q + half, half, factor, second, &c);
    if (width % 2) {
        int8_t last[LIMBS * QUERY_SPACE];
        code_columns(q + width - 1, 1, factor, last, &c);
        for (int i = 0; i < LIMBS; i++)
            first[i * QUERY_SPACE + half] = last[i * QUERY_SPACE];
    }
    for (int i = 0; i < LIMBS; i++)
        for (int64_t j = 0; j < quads; j++) {
            memcpy(limbs + i * QUERY_SPACE + 8 * j, first + i * QUERY_SPACE + 4 * j, 4);
            memcpy(limbs + i * QUERY_SPACE + 8 * j + 4, second + i * QUERY_SPACE + 4 * j, 4);
        }
    return c;
}

/* The high part. */
static query_codes code_high(const float *q, int64_t width, int64_t quads, int8_t *limbs) {
    const float largest = largest_of(q, width);
    int8_t made[LIMBS * QUERY_SPACE] = {0};
    query_codes c = {from_codes(largest), 0, 0};
    code_columns(q, width, to_codes(largest), made, &c);
    for (int i = 0; i < LIMBS; i++)
        memcpy(limbs + i * QUERY_SPACE, made + i * QUERY_SPACE, (size_t)(4 * quads));
    return c;
}

#endif
