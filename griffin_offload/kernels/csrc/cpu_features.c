/* What this processor has. */
#define _GNU_SOURCE /* syscall */

#if defined(__x86_64__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Every processor with AVX2 has F16C, whose name older compilers do not know here. */
int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
}

int has_vnni(void) {
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

int has_bf16(void) { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

int has_vbmi2(void) { return has_avx512() && __builtin_cpu_supports("avx512vbmi2"); }

/* Products of whole tiles, whose registers the system has to be asked for. */
int has_amx(void) {
#if defined(__clang__) || __GNUC__ >= 11
    enum { KNOWN = 1 };
#else
    enum { KNOWN = 0 }; /* to the compiler */
#endif
    enum { ASK = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    unsigned a, b, c, d;
    if (!has_bf16() || !has_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const int bfloats = d >> 22 & 1, tiles = d >> 24 & 1, bytes = d >> 25 & 1;
    return KNOWN && bfloats && tiles && bytes && syscall(SYS_arch_prctl, ASK, TILES) == 0;
}

/* Intel's prefetchers end with a page: a thread gets half of what memory can give (benchmarks/NOTES.md). AMD's do
 * better alone. */
int fetches_ahead(void) { return __builtin_cpu_is("intel") != 0; }

#else

int has_avx2(void) { return 0; }

int has_vnni(void) { return 0; }

int has_bf16(void) { return 0; }

int has_vbmi2(void) { return 0; }

int has_amx(void) { return 0; }

int fetches_ahead(void) { return 0; }

#endif
