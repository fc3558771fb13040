// The sweep with vectors of 16 floats, as for AVX-512, compiled for AVX2: this tests its layouts on machines without
// AVX-512.
#define CLIPERASE_ISA wide
#define CLIPERASE_WIDTH 16
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
extern const IsaKernels wide_kernels;
const IsaKernels wide_kernels = {"wide",         wide::forward_scratch, wide::forward, wide::backward_scratch,
                                 wide::backward, wide::sigmoid_scratch, wide::sigmoid};
}  // namespace cliperase
