/* What the processor can run. */
#ifndef RK_CPU_H
#define RK_CPU_H

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Register states that the operating system saves: 6 = XMM and YMM, 0xe6 = ZMM as well. */
static inline uint64_t cpu_saved_states(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

static inline int cpu_avx2(void) {
    uint32_t a, b, c, d;
    if ((cpu_saved_states() & 6) != 6 || !__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_FMA))
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

static inline int cpu_avxvnni(void) {
    uint32_t a, b, c, d;
    return cpu_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

static inline int cpu_avx512vnni(void) {
    uint32_t a, b, c, d;
    const uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    if (!cpu_avx2() || (cpu_saved_states() & 0xe6) != 0xe6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    return (b & f_dq_bw_vl) == f_dq_bw_vl && (c >> 11 & 1);
}

#define TILE_STATES 0x60000 /* of registers: 17 and 18 */

/* Linux saves matrix tiles of processes that asked for it. */
static inline int cpu_amx(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    uint32_t a, b, c, d;
    const uint32_t tile_int8 = 1u << 24 | 1u << 25;
    if (!cpu_avx512vnni() || (cpu_saved_states() & TILE_STATES) != TILE_STATES || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return 0;
    return (d & tile_int8) == tile_int8 && !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18);
#else
    return 0;
#endif
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static inline int cpu_neon_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }
static inline int cpu_neon_i8mm(void) { return cpu_neon_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); }

#elif defined(__aarch64__) && defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>

static inline int cpu_has(const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, NULL, 0) == 0 && value;
}

static inline int cpu_neon_dotprod(void) { return cpu_has("hw.optional.arm.FEAT_DotProd"); }
static inline int cpu_neon_i8mm(void) { return cpu_neon_dotprod() && cpu_has("hw.optional.arm.FEAT_I8MM"); }
#endif

static inline int cpu_portable(void) { return 1; }

#endif
