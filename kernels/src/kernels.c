/* All kernels of one instruction set: the build compiles this file once for each, with RK_ISA=avx512vnni and RK_AVX512VNNI. */
#if defined(RK_AMX) /* matrix tiles for linears of many rows; all else as without them */
#define RK_AVX512VNNI
#endif
#include "attention.c"
#include "cache_codes.c"
#include "cache_image.c"
#include "latent_attention.c" /* behind these, of which it is made */
#include "hadamard_quantize.c"
#include "mixed_linear.c"
#include "grouped_linear.c" /* behind mixed_linear.c, of which it is made */
#include "norm_quantize.c"
#include "rope_cache.c"

#include "table.h"

#define ENTRY(name) name##_units, name,

const rk_table RK_NAME(rk_table_of) = {RK_FOR_EACH_KERNEL(ENTRY)};
