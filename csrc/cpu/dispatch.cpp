// The choice of the instruction set, and sizes that are common to all of them.
#include <cstring>

#include "sweep.h"

namespace cliperase {
namespace {

bool runs(const IsaKernels* kernels) {
#if defined(CLIPERASE_AVX512_BF16)
    if (kernels == &avx512_bf16_kernels) return runs(&avx512_kernels) && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(CLIPERASE_X86)
    if (kernels == &avx512_kernels)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (kernels == &avx2_kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return kernels == &portable_kernels;
}

}  // namespace

const IsaKernels* choose_kernels(const char* name) {
    const IsaKernels* const widest_first[] = {
#if defined(CLIPERASE_AVX512_BF16)
        &avx512_bf16_kernels,
#endif
#if defined(CLIPERASE_X86)
        &avx512_kernels,
        &avx2_kernels,
#endif
        &portable_kernels,
    };
    for (const IsaKernels* kernels : widest_first)
        if ((name == nullptr || std::strcmp(name, kernels->name) == 0) && runs(kernels)) return kernels;
    return nullptr;
}

std::int64_t gradient_stride(std::int64_t width) { return (width + 15) / 16 * 16; }

}  // namespace cliperase
