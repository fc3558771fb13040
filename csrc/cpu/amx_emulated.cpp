// The sweep of amx.cpp with its instructions in portable C++, for tests on any processor; chosen by name only.
#define CLIPERASE_ISA amx_emulated
#define CLIPERASE_WIDTH 16
#define CLIPERASE_BF16
#define CLIPERASE_AMX
#define CLIPERASE_AMX_EMULATED
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
const IsaKernels amx_emulated_kernels = {"amx_emulated",         amx_emulated::forward_scratch, amx_emulated::forward,
    amx_emulated::backward_scratch, amx_emulated::backward, amx_emulated::sigmoid_scratch, amx_emulated::sigmoid, &portable_kernels};
}
