// The sweep for any processor.
#define CLIPERASE_ISA portable
#define CLIPERASE_WIDTH 4
#include "backward_pass.h"
#include "forward_pass.h"
#include "sigmoid_pass.h"

namespace cliperase {
const Engine portable_engine = {"portable", portable::forward_scratch, portable::forward, portable::backward_scratch,
    portable::backward, portable::sigmoid_scratch, portable::sigmoid};
}
