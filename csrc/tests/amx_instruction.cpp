#define CLIPERASE_ISA amx_instruction
#define CLIPERASE_WIDTH 16
#define CLIPERASE_BF16
#define CLIPERASE_AMX
#include "amx_instruction.h"

void multiply_add_by_amx(const std::int32_t* a, const std::int32_t* b, float* c) {
    cliperase::amx_instruction::multiply_add(a, b, c);
}
