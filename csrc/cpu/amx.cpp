// The sweep for -mamx-tile -mamx-bf16, beside what avx512_bf16.cpp has: all features are bfloat16.
#define CLIPERASE_ISA amx
#define CLIPERASE_WIDTH 16
#define CLIPERASE_BF16
#define CLIPERASE_AMX
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
const IsaKernels amx_kernels = {"amx",         amx::forward_scratch, amx::forward,
    amx::backward_scratch, amx::backward, amx::sigmoid_scratch, amx::sigmoid, &avx512_kernels};
}
