// One multiplication in the tile registers, for test_amx.cpp: by the processor or emulated, by the macros of the file.
#pragma once

#include "amx_registers.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// C += A B, all [16, 16]; A and B have pairs of bfloat16.
inline void multiply_add(const std::int32_t* a, const std::int32_t* b, float* c) {
    const AmxRegisters registers;
    amx_load<0>(c, AMX_BYTES);
    amx_load<4>(a, AMX_BYTES);
    amx_load<7>(b, AMX_BYTES);
    amx_multiply_add<0, 4, 7>();
    amx_store<0>(c, AMX_BYTES);
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
