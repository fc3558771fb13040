// The tile registers of AMX, or an emulation of them in portable C++: eight registers of 16 rows of 64 bytes. All code
// that uses them is the same for both.
#pragma once

#include "steps.h"

#if defined(CLIPERASE_AMX_EMULATED)
#include <cstdlib>
#endif

namespace cliperase {
namespace CLIPERASE_ISA {

// A register has 16 rows of 16 steps or floats.
constexpr i64 AMX = 16, AMX_BYTES = 64;
static_assert(W == AMX && STEP_UNIT == AMX);

#if !defined(CLIPERASE_AMX_EMULATED)

// The shapes of the registers: all of them are used whole.
struct AmxShapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {AMX_BYTES, AMX_BYTES, AMX_BYTES, AMX_BYTES,
                                   AMX_BYTES, AMX_BYTES, AMX_BYTES, AMX_BYTES};
    std::uint8_t rows[16] = {AMX, AMX, AMX, AMX, AMX, AMX, AMX, AMX};
};
static_assert(sizeof(AmxShapes) == 64);

// A thread configures the registers before it uses them, and releases them so that no other code finds their state.
class AmxRegisters {
  public:
    AmxRegisters() {
        const AmxShapes shapes;
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~AmxRegisters() { asm volatile("tilerelease" ::: "memory"); }
    AmxRegisters(const AmxRegisters&) = delete;
    AmxRegisters& operator=(const AmxRegisters&) = delete;
};

// Assembler rather than the compiler's intrinsics: those of GCC 12 do not tell it that they read and write memory.
template <int REGISTER>
inline void amx_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(REGISTER));
}

// Reads 16 rows, `stride` bytes apart.
template <int REGISTER>
inline void amx_load(const void* from, i64 stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(REGISTER), "r"(from), "r"(stride) : "memory");
}

template <int REGISTER>
inline void amx_store(void* to, i64 stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(REGISTER), "r"(to), "r"(stride) : "memory");
}

// C += A B, where A [16, 16] and B [16, 16] have pairs of bfloat16, and C [16, 16] floats.
template <int C, int A, int B>
inline void amx_multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

struct EmulatedAmx {
    Step data[8][AMX * AMX];
    bool configured = false;
};

inline thread_local EmulatedAmx emulated_amx;

class AmxRegisters {
  public:
    AmxRegisters() { emulated_amx.configured = true; }
    ~AmxRegisters() { emulated_amx.configured = false; }
    AmxRegisters(const AmxRegisters&) = delete;
    AmxRegisters& operator=(const AmxRegisters&) = delete;
};

// As on the processor, to use registers that are not configured ends the process.
inline Step* amx_register(int number) {
    if (!emulated_amx.configured) std::abort();
    return emulated_amx.data[number];
}

template <int REGISTER>
inline void amx_zero() {
    std::memset(amx_register(REGISTER), 0, AMX * AMX_BYTES);
}

template <int REGISTER>
inline void amx_load(const void* from, i64 stride) {
    Step* const to = amx_register(REGISTER);
    for (i64 i = 0; i < AMX; ++i) std::memcpy(to + i * AMX, static_cast<const char*>(from) + i * stride, AMX_BYTES);
}

template <int REGISTER>
inline void amx_store(void* to, i64 stride) {
    const Step* const from = amx_register(REGISTER);
    for (i64 i = 0; i < AMX; ++i) std::memcpy(static_cast<char*>(to) + i * stride, from + i * AMX, AMX_BYTES);
}

inline Floats without_subnormals(Floats value) {
    const Floats magnitude = value < 0 ? -value : value;
    return magnitude < FLT_MIN ? Floats{} : value;
}

// As Intel documents TDPBF16PS: the first and the second numbers of all pairs are summed apart, then added to each other
// and to C. Rounds to nearest even; subnormal operands and results are 0. The product of two bfloat16 numbers is exact.
template <int C, int A, int B>
inline void amx_multiply_add() {
    const Ints high = Ints{} + static_cast<std::int32_t>(0xffff0000u);
    const Step *const a = amx_register(A), *const b = amx_register(B);
    Floats b_first[AMX], b_second[AMX];
    for (i64 k = 0; k < AMX; ++k) {
        const Ints pairs = load(b + k * AMX);
        b_first[k] = without_subnormals(as_floats(pairs << 16));
        b_second[k] = without_subnormals(as_floats(pairs & high));
    }
    for (i64 i = 0; i < AMX; ++i) {
        Floats first{}, second{};
        for (i64 k = 0; k < AMX; ++k) {
            const Ints pair = Ints{} + a[i * AMX + k];
            first = without_subnormals(first + without_subnormals(as_floats(pair << 16)) * b_first[k]);
            second = without_subnormals(second + without_subnormals(as_floats(pair & high)) * b_second[k]);
        }
        float* const to = reinterpret_cast<float*>(amx_register(C)) + i * AMX;
        const Floats before = without_subnormals(load(to));
        store(to, without_subnormals(before + without_subnormals(first + second)));
    }
}

#endif

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
