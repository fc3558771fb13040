// The sweep for any processor.
#define CLIPERASE_ISA portable
#define CLIPERASE_WIDTH 4
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
const IsaKernels portable_kernels = {
    "portable",         portable::forward_scratch, portable::forward, portable::backward_scratch,
    portable::backward, portable::sigmoid_scratch, portable::sigmoid};
}
