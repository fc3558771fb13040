// The unit in which products read their operands along the depth: a float or, with CLIPERASE_BF16, a pair of bfloat16
// numbers. Both are 4 bytes, so that groups and panels have one layout.
#pragma once

#include "vector.h"

#if defined(CLIPERASE_BF16) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace cliperase {
namespace CLIPERASE_ISA {

#if defined(CLIPERASE_BF16)

constexpr i64 PER_STEP = 2;
using Step = std::int32_t;  // the first number in the low half
using Halves = std::uint16_t __attribute__((vector_size(2 * W)));

inline Step pair_of(std::uint16_t first, std::uint16_t second) {
    const std::uint32_t bits = std::uint32_t{second} << 16 | first;
    return static_cast<Step>(bits);
}

// Features are multiplied as they are, and the sums by the scale.
inline float packed_factor(float) { return 1; }
inline float product_factor(float scale) { return scale; }

#if defined(__AVX512BF16__)

// total + the products of the pair `a` with each pair of b. Takes numbers that are not normal for 0.
inline Floats multiply_add(Floats total, Step a, Ints b) {
    return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}

// Rounds to bfloat16, to nearest even.
inline Halves rounded(Floats value) { return (Halves)_mm512_cvtneps_pbh((__m512)value); }

#else

inline Floats as_floats(Ints bits) {
    Floats out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline Floats multiply_add(Floats total, Step a, Ints b) {
    const Ints pair = Ints{} + a, high = Ints{} + static_cast<std::int32_t>(0xffff0000u);
    total += as_floats(pair & high) * as_floats(b & high);
    return total + as_floats(pair << 16) * as_floats(b << 16);
}

inline Halves rounded(Floats value) {
    using Bits = std::uint32_t __attribute__((vector_size(4 * W)));
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    const Bits nearest = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, nan = Bits{} + 0x7fc0u;
    return __builtin_convertvector(value == value ? nearest : nan, Halves);
}

#endif

#else

constexpr i64 PER_STEP = 1;
using Step = float;

// The scale is applied to the rows when they are packed.
inline float packed_factor(float scale) { return scale; }
inline float product_factor(float) { return 1; }

inline Floats multiply_add(Floats total, Step a, Floats b) { return total + a * b; }

#endif

// The registers of AMX take so many steps at a time.
#if defined(CLIPERASE_AMX)
constexpr i64 STEP_UNIT = 16;
#else
constexpr i64 STEP_UNIT = 1;
#endif

// The steps of so many numbers; those beyond the last number are 0.
inline i64 steps(i64 depth) { return round_up((depth + PER_STEP - 1) / PER_STEP, STEP_UNIT); }

// What two parts of a depth may have more than the whole.
constexpr i64 EXTRA_STEPS = PER_STEP > 1 ? STEP_UNIT : 0;

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
