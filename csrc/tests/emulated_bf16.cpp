// The sweep of avx512_bf16.cpp with its instruction in portable C++: this tests the layout of pairs on every machine.
#define CLIPERASE_ISA emulated_bf16
#define CLIPERASE_WIDTH 16
#define CLIPERASE_BF16
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
extern const IsaKernels emulated_bf16_kernels;
const IsaKernels emulated_bf16_kernels = {
    "emulated_bf16",         emulated_bf16::forward_scratch, emulated_bf16::forward, emulated_bf16::backward_scratch,
    emulated_bf16::backward, emulated_bf16::sigmoid_scratch, emulated_bf16::sigmoid, &portable_kernels};
}  // namespace cliperase
