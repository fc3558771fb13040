// The sweep for -mavx2 -mfma.
#define CLIPERASE_ISA avx2
#define CLIPERASE_WIDTH 8
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
const IsaKernels avx2_kernels = {"avx2",         avx2::forward_scratch, avx2::forward, avx2::backward_scratch,
                                 avx2::backward, avx2::sigmoid_scratch, avx2::sigmoid};
}
