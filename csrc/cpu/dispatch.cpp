// Which instruction set's code runs, and the sizes that all of them agree on.
#include <cstring>

#include "sweep.h"

namespace cliperase {
namespace {

bool runs(const Engine* engine) {
#if defined(CLIPERASE_X86)
    if (engine == &avx512_engine)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (engine == &avx2_engine) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return engine == &portable_engine;
}

}  // namespace

const Engine* choose_engine(const char* name) {
    const Engine* const widest_first[] = {
#if defined(CLIPERASE_X86)
        &avx512_engine,
        &avx2_engine,
#endif
        &portable_engine,
    };
    for (const Engine* engine : widest_first)
        if ((name == nullptr || std::strcmp(name, engine->name) == 0) && runs(engine)) return engine;
    return nullptr;
}

std::int64_t gradient_stride(std::int64_t width) { return (width + 15) / 16 * 16; }

}  // namespace cliperase
