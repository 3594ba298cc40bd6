/* Kernels for compiled models on CPUs: the public interface.
 *
 * A quantized value is codes q with x ~ (q - zero_point) * scale, one scale and zero point for each row and run. A run is `width`
 * neighbouring columns of `bits`-bit codes; a part is `groups` runs of the same width. Rows of activations hold q - zero_point instead of
 * codes of less than 8 bits, which fits into a byte: products with them need no sums of weights. How operands lie in memory:
 *
 *   activations, one part   row: groups x stride int8 codes, then groups int32 sums of the codes; stride is width rounded up to 8,
 *                           padding is zero. Rows are rk_row_bytes(part) bytes apart.
 *   scale, zero_point       [rows, runs of all parts], float and int32; 0 where it is taken out of the codes
 *   weights, one part       tiles of 64 output channels, each groups x stride/8 blocks. A block holds 8 columns of the tile:
 *                           codes of up to 4 bits: 4 x 64 bytes, byte 4 c + j of the i-th 64 is channel 16 i + c with column j
 *                           in the low nibble and column j + 4 in the high one, stored as code + 8;
 *                           wider codes: 2 x 4 x 64 bytes, columns 0..3 and then 4..7, stored as code + 128.
 *   cache row               codes of the low part (columns of its first half in the low nibbles, of its second half in the high
 *                           ones), codes of the high part a byte each, one zero point byte for each part, one float scale for
 *                           each part; codes and zero points are stored unsigned, as code + 2^(bits - 1).
 *
 * Every kernel computes the units [begin, end) of its output out of the number that its ..._units function names. Units may be
 * computed in any order and by any threads: the result has the same bytes. No kernel allocates, locks or starts a thread.
 * Results smaller than FLT_MIN, and subnormal inputs, count as zero. Pointers need no alignment beyond that of their type.
 */
#ifndef RESQ_KERNELS_H
#define RESQ_KERNELS_H

#include <stdint.h>

#define RK_VERSION 9
#define RK_TILE 64
#define RK_MAX_PARTS 4
#define RK_CENTRED(bits) ((bits) < 8) /* whether zero points are taken out of codes of so many bits */
#define RK_MAX_FACTORS 6
#define RK_MAX_HEAD 256 /* columns of a head */
#define RK_MAX_ENTRY 1024 /* columns of a cached row that is read as floats */
#define RK_MAX_COLUMNS 65536 /* of a row that is quantized */
#define RK_API __attribute__((visibility("default")))

/* One precision of a linear's input. clip: the share of the range that quantizers keep, (0, 1]. */
typedef struct {
    int64_t width;
    int32_t groups;
    int32_t bits;
    float clip;
} rk_part;

/* One precision of a linear: what the part's codes are multiplied with. weight_bits says which container holds the weights. */
typedef struct {
    rk_part part;
    int32_t weight_bits;
    const int8_t *x;
    const uint8_t *weight;
} rk_linear_part;

/* y[m, n] = sum over parts of float(sum_k (q[m, k] - zero_point[m]) w[n, k]) * (scale[m] * weight_scale[n]), plus bias[n], plus
 * residual[m, n]. A part with several runs: weight_scale[n] * sum over runs of float(...) * scale[m, run].
 * bias and residual may be NULL; residual may be y. */
typedef struct {
    int64_t rows, channels;
    int32_t parts;
    rk_linear_part part[RK_MAX_PARTS];
    const float *scale;
    const int32_t *zero_point;
    const float *weight_scale;     /* [parts, channels] */
    const int32_t *weight_sum;     /* [runs whose codes have zero points, channels], sums of weight codes */
    const float *bias;
    const float *residual;
    int64_t residual_stride;       /* floats from row to row, as y_stride */
    float *y;
    int64_t y_stride;
} rk_mixed_linear_args;

/* The linears of several experts on rows that are sorted by expert: group g has rows [first_row[g], first_row[g + 1]), and the weights of
 * expert[g]. In `linear`, rows is not read, and residual is NULL; weight of the first part is where the codes of all experts begin, the
 * others' and weight_bits are not read; weight_scale, weight_sum and bias are those of all experts, one behind the other.
 * A unit is a tile of channels and a few rows of a group. */
typedef struct {
    rk_mixed_linear_args linear;
    int64_t groups;
    const int32_t *expert;         /* [groups] */
    const int32_t *first_row;      /* [groups + 1], ascending from 0 */
    const int64_t *weight_at;      /* [experts]: where an expert's codes begin, in bytes; its parts lie one behind the other */
    const int32_t *weight_bits;    /* [experts, parts] */
} rk_grouped_linear_args;

/* The same, and what comes out of it is added up: y[token[m], n] = residual[token, n] + sum over its rows m of share[m] * (product of row m
 * and bias), in the order of groups. y and residual have `tokens` rows; residual may be NULL, or y. A unit is a tile of channels. */
typedef struct {
    rk_grouped_linear_args grouped;
    int64_t tokens;
    const int32_t *token;          /* [rows] */
    const float *share;            /* [rows] */
} rk_combined_linear_args;

/* Codes of rows: y, computed in float, becomes for each run of every part
 *     low = min(y, 0) * clip, high = max(y, 0) * clip, scale = max((high - low) / (2^bits - 1), FLT_MIN),
 *     zero_point = rint(-low / scale) - 2^(bits - 1), code = clamp(rint(y / scale) + zero_point),
 * and the zero point is taken out of codes of less than 8 bits.
 * Columns of y: all runs of the first part, then those of the next. */
typedef struct {
    int32_t parts;
    rk_part part[RK_MAX_PARTS];
    int8_t *rows[RK_MAX_PARTS];
    float *scale;
    int32_t *zero_point;
} rk_codes;

enum { RK_NORM_NONE, RK_NORM_RMS, RK_NORM_LAYER };

/* y = x / sqrt(mean(x^2) + epsilon) * weight, or (x - mean) / sqrt(var + epsilon) * weight + bias, or x; then codes of y.
 * weight and bias may be NULL. A unit is a row. */
typedef struct {
    int64_t rows;
    const float *x;
    int64_t x_stride;
    int32_t norm;
    float epsilon;
    const float *weight, *bias;
    rk_codes out;
} rk_norm_quantize_args;

/* y = x H / sqrt(block): H is `blocks` times, along the diagonal, the Kronecker product of factors with these orders; the product of
 * the orders is block. factor: [order, order] of +1 and -1, row-major, y[j] = sum_i x[i] factor[i][j]; NULL: the Sylvester matrix
 * of an order that is a power of two. */
typedef struct {
    int64_t blocks;
    int32_t factors;
    int32_t order[RK_MAX_FACTORS];
    const float *factor[RK_MAX_FACTORS];
} rk_transform;

enum {
    RK_ACTIVATION_NONE, RK_ACTIVATION_SILU, RK_ACTIVATION_GELU, RK_ACTIVATION_GELU_TANH, RK_ACTIVATION_RELU,
    RK_ACTIVATION_CLAMPED /* g sigmoid(slope g) of g = min(gate, limit), times 1 + up, up being clamped to [-limit, limit] */
};

/* y = transform(activation(gate) * up), a transform for every part, over all its runs; then codes of y. up may be NULL. A unit is a
 * row. limit, slope: of RK_ACTIVATION_CLAMPED. */
typedef struct {
    int64_t rows;
    const float *gate, *up;
    int64_t gate_stride, up_stride;
    int32_t activation;
    float limit, slope;
    rk_transform transform[RK_MAX_PARTS];
    rk_codes out;
} rk_hadamard_quantize_args;

/* A cached head: columns [0, low) in codes of at most 4 bits, the `high` columns behind them in codes of 5 to 8 bits; either may be
 * 0. A part that is there has a zero point and a scale. */
typedef struct {
    int32_t low, high, low_bits, high_bits;
} rk_head;

/* Queries, keys and values of new tokens; keys and values are quantized and written into the cache behind what is there.
 *     x = rms_norm(x) * norm            per head; q_norm or k_norm NULL: not
 *     x = x * cos + rotate_half(x) * sin    the first `rotary` columns of queries and keys
 *     x = x U                           queries and keys, with the basis of their key head; basis NULL: not
 * A unit is one head of one token. */
typedef struct {
    int64_t batch, tokens, heads, kv_heads;
    const float *q, *k, *v;                /* [batch, tokens, heads, columns]; floats from token to token: */
    int64_t q_stride, k_stride, v_stride;
    const float *cos, *sin;                /* [batch or 1, tokens, rotary] */
    int64_t rotary, rotary_batch_stride;   /* floats from batch to batch, 0 when all share them */
    const float *basis;                    /* [bases, D, D]; bases: 1 or kv_heads */
    int64_t bases;
    const float *q_norm, *k_norm;
    float epsilon, clip;
    rk_head key, value;
    uint8_t *key_cache, *value_cache;      /* [batch, kv_heads, capacity, rk_head_bytes] */
    int64_t capacity;
    const int32_t *start;                  /* [batch]: tokens that are there already */
    float *q_out;                          /* [batch, tokens, heads, D] */
} rk_rope_cache_args;

/* Rows of new tokens, quantized and written into the cache behind what is there, and the floats that all rows stand for,
 * (code - zero_point) * scale: for what is made from cached values before attention reads it. head: at most RK_MAX_ENTRY columns. Slots
 * beyond start + tokens are read as they are. A unit is a row. */
typedef struct {
    int64_t batch, heads, tokens, total;
    const float *x;                        /* [batch, heads, tokens, columns] */
    rk_head head;
    float clip;
    uint8_t *cache;                        /* [batch, heads, capacity, rk_head_bytes] */
    int64_t capacity;                      /* at least total */
    const int32_t *start;                  /* [batch]: tokens that are there already */
    float *out;                            /* [batch, heads, total, columns] */
} rk_cache_image_args;

/* Rows of new tokens, quantized and written into the cache behind what is there; if out.parts is not 0 also the codes of all rows, as a
 * linear reads them: every part lies within one of the head's, whose bits, zero point and scale it has. A unit is a row: of the new ones, or of all. */
typedef struct {
    int64_t batch, heads, tokens, total;
    const float *x;                        /* [batch, heads, tokens, columns] */
    rk_head head;
    float clip;
    uint8_t *cache;                        /* [batch, heads, capacity, rk_head_bytes] */
    int64_t capacity;
    const int32_t *start;                  /* [batch]: tokens that are there already */
    rk_codes out;                          /* [batch, heads, total] rows; clip is not read */
} rk_cache_codes_args;

/* Attention over tokens that have a cached vector c, from which a linear makes the keys and then the values of all heads, and rotary
 * columns r, with which the keys of all heads end; new tokens have been written. For every head
 *     softmax(scale (q_own . W_k c + q_rotary . r)) W_v c,
 * computed as scale (W_k^T q_own . c + q_rotary . r) and W_v (weights . c), or from keys and values that are there, `expanded`. A query
 * sees the slots t <= start + its token with mask[t] != 0; one that sees nothing gives 0. All sums are in float.
 * own, values: at most RK_MAX_HEAD columns each, and so rotary; latent: at most RK_MAX_ENTRY. A unit is a few queries. */
typedef struct {
    int64_t batch, tokens, heads, own, values;
    const float *q;                        /* [batch, heads, tokens, own + rotary columns] */
    rk_head latent, rotary;
    const uint8_t *latent_cache, *rotary_cache; /* [batch, capacity, rk_head_bytes] */
    int64_t capacity;
    const int32_t *start;
    const uint8_t *mask;                   /* [batch, slots] or NULL */
    int64_t mask_stride;
    float scale;
    int32_t parts;
    rk_linear_part part[RK_MAX_PARTS];     /* one run each; x and bits are not read */
    const float *weight_scale;             /* [parts, heads * (own + values)] */
    const float *expanded;                 /* [batch, total, heads * (own + values)] or NULL */
    int64_t total;
    float *out;                            /* [batch, tokens, heads, values] */
} rk_latent_attention_args;

/* softmax(scale q k^T) v over the cache, into which the new tokens have been written. Query i of a batch, in slot start + i, sees
 * the slots t with slot - window < t <= slot (window 0: all t <= slot) and mask[t] != 0. softcap c > 0: scores are c tanh(score / c).
 * slopes: slopes[head] * (t - slot) is added to scores. sinks: a further score of every head that has no value. prefix: tokens that every
 * query sees besides, in float. A query that sees nothing gives 0.
 * The result goes to out, or if codes.parts is not 0 to codes, a run for each head, cut into the parts' columns.
 * A unit is a few queries of the heads that share a key head. Where few queries see many keys, these are cut into chunks, which are
 * units, if there is scratch: rk_attention_scratch bytes, aligned to 4, the first batch * kv_heads * 4 of them zero. Products with
 * codes of the cache are exact, of codes of a byte: signed ones of each query's part, unsigned ones of each tile's weights times their
 * value's scale. */
typedef struct {
    int64_t batch, tokens, heads, kv_heads;
    const float *q;                        /* [batch, tokens, heads, D] */
    rk_head key, value;
    const uint8_t *key_cache, *value_cache;
    int64_t capacity;
    const int32_t *start;
    const uint8_t *mask;                   /* [batch, slots] or NULL */
    int64_t mask_stride;
    float scale, softcap;
    int64_t window;
    const float *sinks, *slopes;           /* [heads] or NULL */
    int64_t prefix;
    const float *prefix_keys, *prefix_values; /* [kv_heads, prefix, columns] */
    void *scratch;                         /* or NULL */
    float *out;                            /* [batch, tokens, heads, value columns] or NULL */
    rk_codes codes;
} rk_attention_args;

/* Interface version, to be compared with RK_VERSION. */
RK_API int32_t rk_version(void);
/* Instruction sets compiled into this library, best first; NULL behind the last. */
RK_API const char *rk_instruction_set(int32_t index);
/* 1 when this processor can run the instruction set of that index. */
RK_API int32_t rk_supported(int32_t index);
/* Index in use: at load the first that is supported. */
RK_API int32_t rk_selected(void);
/* Use another one; 0, or -1 when it is not supported here. Not while kernels run. */
RK_API int32_t rk_select(int32_t index);

/* Bytes of one row of activations, and of one tile of weights, of a part. */
RK_API int64_t rk_row_bytes(const rk_part *part);
RK_API int64_t rk_tile_bytes(const rk_part *part, int32_t weight_bits);

/* Bytes of one token of a cached head. */
RK_API int64_t rk_head_bytes(const rk_head *head);
/* 1 where making keys and values of all `total` tokens, and then attending to them, is less work than turning queries. */
RK_API int32_t rk_latent_expands(const rk_latent_attention_args *args);
/* Bytes of scratch that attention can use; 0: none. */
RK_API int64_t rk_attention_scratch(const rk_attention_args *args);

RK_API int64_t rk_mixed_linear_units(const rk_mixed_linear_args *args);
RK_API void rk_mixed_linear(const rk_mixed_linear_args *args, int64_t begin, int64_t end);
RK_API int64_t rk_grouped_linear_units(const rk_grouped_linear_args *args);
RK_API void rk_grouped_linear(const rk_grouped_linear_args *args, int64_t begin, int64_t end);
RK_API int64_t rk_combined_linear_units(const rk_combined_linear_args *args);
RK_API void rk_combined_linear(const rk_combined_linear_args *args, int64_t begin, int64_t end);
RK_API int64_t rk_norm_quantize_units(const rk_norm_quantize_args *args);
RK_API void rk_norm_quantize(const rk_norm_quantize_args *args, int64_t begin, int64_t end);

RK_API int64_t rk_hadamard_quantize_units(const rk_hadamard_quantize_args *args);
RK_API void rk_hadamard_quantize(const rk_hadamard_quantize_args *args, int64_t begin, int64_t end);

RK_API int64_t rk_rope_cache_units(const rk_rope_cache_args *args);
RK_API void rk_rope_cache(const rk_rope_cache_args *args, int64_t begin, int64_t end);

RK_API int64_t rk_cache_image_units(const rk_cache_image_args *args);
RK_API void rk_cache_image(const rk_cache_image_args *args, int64_t begin, int64_t end);

RK_API int64_t rk_cache_codes_units(const rk_cache_codes_args *args);
RK_API void rk_cache_codes(const rk_cache_codes_args *args, int64_t begin, int64_t end);

RK_API int64_t rk_latent_attention_units(const rk_latent_attention_args *args);
RK_API void rk_latent_attention(const rk_latent_attention_args *args, int64_t begin, int64_t end);

RK_API int64_t rk_attention_units(const rk_attention_args *args);
RK_API void rk_attention(const rk_attention_args *args, int64_t begin, int64_t end);

#endif
