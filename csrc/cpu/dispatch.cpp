// The choice of the instruction set.
#include <cstring>

#include "sweep.h"

#if defined(CLIPERASE_AMX_BF16)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cliperase {
namespace {

#if defined(CLIPERASE_AMX_BF16)

// Whether the processor has AMX-TILE and AMX-BF16, and the operating system saves the tile registers.
bool has_amx() {
    constexpr unsigned OSXSAVE = 1u << 27, BF16 = 1u << 22, TILE = 1u << 24, STATES = 3u << 17;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
    unsigned enabled, high;
    asm volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
    if ((enabled & STATES) != STATES) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE);
}

// Linux lets a process use the tile registers when it has asked for them: for all of its threads, also those to come. It
// refuses where a thread has too small a stack for signals.
bool may_use_amx() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool allowed =
        has_amx() && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return allowed;
}

#endif

bool runs(const IsaKernels* kernels) {
#if defined(CLIPERASE_AMX_BF16)
    if (kernels == &amx_kernels) return runs(&avx512_bf16_kernels) && may_use_amx();
#endif
#if defined(CLIPERASE_AVX512_BF16)
    if (kernels == &avx512_bf16_kernels) return runs(&avx512_kernels) && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(CLIPERASE_X86)
    if (kernels == &avx512_kernels)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (kernels == &avx2_kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return kernels == &portable_kernels || kernels == &amx_emulated_kernels;
}

// Whether to choose them where they run. The instructions of AVX512-BF16 are faster than float32's on AMD's processors,
// and slower on a Xeon with AMX, the one of Intel's that was measured.
bool worthwhile(const IsaKernels* kernels) {
#if defined(CLIPERASE_AVX512_BF16)
    if (kernels == &avx512_bf16_kernels) return __builtin_cpu_is("amd");
#endif
    return kernels != &amx_emulated_kernels;
}

}  // namespace

const IsaKernels* choose_kernels(const char* name) {
    const IsaKernels* const widest_first[] = {
#if defined(CLIPERASE_AMX_BF16)
        &amx_kernels,
#endif
#if defined(CLIPERASE_AVX512_BF16)
        &avx512_bf16_kernels,
#endif
#if defined(CLIPERASE_X86)
        &avx512_kernels,
        &avx2_kernels,
#endif
        &portable_kernels,
        &amx_emulated_kernels,
    };
    for (const IsaKernels* kernels : widest_first)
        if ((name == nullptr ? worthwhile(kernels) : std::strcmp(name, kernels->name) == 0) && runs(kernels))
            return kernels;
    return nullptr;
}

}  // namespace cliperase
