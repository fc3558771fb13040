// Vectors of CLIPERASE_WIDTH floats, in the compiler's vector extension, and exp of them. Included only by files that
// are compiled for one instruction set each, in a namespace of its name, so that the linker keeps them apart.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#if !defined(CLIPERASE_ISA) || !defined(CLIPERASE_WIDTH)
#error "compile with CLIPERASE_ISA (a name) and CLIPERASE_WIDTH (floats a vector) defined"
#endif

namespace cliperase {
namespace CLIPERASE_ISA {

using i64 = std::int64_t;

constexpr int W = CLIPERASE_WIDTH;
using Floats = float __attribute__((vector_size(4 * W)));
using Ints = std::int32_t __attribute__((vector_size(4 * W)));

// Stands for excluded entries: exp of it is 0, and the difference of two is finite.
constexpr float LOWEST = -FLT_MAX;

inline Floats load(const float* from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline Ints load(const std::int32_t* from) {
    Ints out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline Floats all(float value) { return Floats{} + value; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }
inline i64 larger(i64 a, i64 b) { return a > b ? a : b; }
inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
inline i64 round_up(i64 value, i64 to) { return (value + to - 1) / to * to; }

// The sum of the lanes, by folding halves onto each other.
inline float sum(Floats v) {
    float lanes[W];
    std::memcpy(lanes, &v, sizeof v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

inline float largest(Floats v) {
    float lanes[W];
    std::memcpy(lanes, &v, sizeof v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] = larger(lanes[lane], lanes[lane + half]);
    return lanes[0];
}

// exp(x) for x up to 88, to about one unit in the last place; 0 below -87; NaN for NaN.
//
// x = k ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact; e^r = 1 + r + r^2 p(r), p the polynomial
// of degree 4 for which the largest relative error of the whole, 3.1e-9, is least (a weighted least-squares fit). A call
// would spill the registers of the loop around it.
__attribute__((always_inline)) inline Floats exp(Floats x) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    constexpr float LOG2_E = 1.44269504f, LN_2_HIGH = 0.693359375f, LN_2_LOW = -2.12194440e-4f;
    const Floats clamped = x < -87.0f ? all(-87.0f) : x;
    const Floats shifted = clamped * LOG2_E + SHIFT;
    const Floats k = shifted - SHIFT;
    const Floats r = (clamped - k * LN_2_HIGH) - k * LN_2_LOW;
    Floats p = all(0.00138146f);
    p = p * r + 0.00836871f;
    p = p * r + 0.04166839f;
    p = p * r + 0.16666521f;
    p = p * r + 0.49999994f;
    const Floats e = (p * r) * r + r + 1.0f;
    Ints bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000;  // the low bits of `shifted` are k: 2^k. 0x4b400000 << 23 is 0.
    Floats power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? Floats{} : e * power;
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
