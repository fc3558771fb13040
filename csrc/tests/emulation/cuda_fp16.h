// Replaces CUDA's header, see cuda_runtime.h: conversion of float to half, to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half { std::uint16_t bits; };
struct __half2 { __half x, y; };

inline __half __float2half_rn(float value) {
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (value != value) return {0x7fff};
    if (size >= 65520.0F) return {static_cast<std::uint16_t>(sign | 0x7c00)};
    if (size == 0.0F) return {sign};
    int exponent = 0;
    std::frexp(size, &exponent);  // size < 2^exponent
    if (exponent < -13) exponent = -13;  // subnormal: their exponent is fixed
    // In units of the last place, rounded to nearest even by the current mode; a carry increments the exponent.
    const auto steps = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));
    const std::uint32_t biased = static_cast<std::uint32_t>(exponent + 13);
    return {static_cast<std::uint16_t>(sign | ((biased << 10) + steps))};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
