/* The kernels of one instruction set. */
#ifndef RK_TABLE_H
#define RK_TABLE_H

#include "resq_kernels.h"

#define RK_FOR_EACH_KERNEL(X) \
    X(mixed_linear) X(grouped_linear) X(combined_linear) X(norm_quantize) X(hadamard_quantize) X(rope_cache) X(cache_image) \
    X(cache_codes) X(attention) X(latent_attention)

#define RK_FIELDS(name) \
    int64_t (*name##_units)(const rk_##name##_args *); \
    void (*name)(const rk_##name##_args *, int64_t, int64_t);

typedef struct {
    RK_FOR_EACH_KERNEL(RK_FIELDS)
} rk_table;

/* Instruction sets of the architecture this is compiled for, best first. */
#if defined(__x86_64__)
#define RK_FOR_EACH_ISA(X) X(amx) X(avx512vnni) X(avxvnni) X(avx2) X(portable)
#elif defined(__aarch64__)
#define RK_FOR_EACH_ISA(X) X(neon_i8mm) X(neon_dotprod) X(portable)
#else
#define RK_FOR_EACH_ISA(X) X(portable)
#endif

#endif
