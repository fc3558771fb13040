// The sweep for -mavx512bf16, beside what avx512.cpp has: all features are bfloat16.
#define CLIPERASE_ISA avx512_bf16
#define CLIPERASE_WIDTH 16
#define CLIPERASE_BF16
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
const IsaKernels avx512_bf16_kernels = {
    "avx512_bf16",         avx512_bf16::forward_scratch, avx512_bf16::forward, avx512_bf16::backward_scratch,
    avx512_bf16::backward, avx512_bf16::sigmoid_scratch, avx512_bf16::sigmoid, &avx512_kernels};
}
