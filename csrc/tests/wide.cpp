// The sweep as AVX-512 has it, 16 floats a vector, compiled for AVX2: its layouts are tested on more machines than it runs on.
#define CLIPERASE_ISA wide
#define CLIPERASE_WIDTH 16
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
extern const IsaKernels wide_kernels;
const IsaKernels wide_kernels = {"wide", wide::forward_scratch, wide::forward, wide::backward_scratch,
    wide::backward, wide::sigmoid_scratch, wide::sigmoid};
}  // namespace cliperase
