// The sweep for -mavx512f and what comes with it.
#define CLIPERASE_ISA avx512
#define CLIPERASE_WIDTH 16
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
const IsaKernels avx512_kernels = {"avx512",         avx512::forward_scratch, avx512::forward, avx512::backward_scratch,
                                   avx512::backward, avx512::sigmoid_scratch, avx512::sigmoid};
}
