// How the C++ tests report failures.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "sweep.h"

inline int failures = 0;
inline std::string context;  // the current case, for the report

inline void fail(const char* what, const char* isa, const std::string& why = "") {
    if (++failures > 20) return;
    std::printf("%s, %s%s%s%s\n", isa, what, context.empty() ? "" : ", ", context.c_str(), why.c_str());
}

// NaN always fails.
inline void expect_within(const char* what, const char* isa, double found, double expected, double allowed) {
    if (std::abs(found - expected) <= allowed) return;
    char why[99];
    std::snprintf(why, sizeof why, ": %.9g, expected %.9g within %.3g", found, expected, allowed);
    fail(what, isa, why);
}

inline void expect_close(const char* what, const char* isa, double found, double expected, double tolerance) {
    expect_within(what, isa, found, expected, tolerance * (1 + std::abs(expected)));
}

// What dS may be off by, relative to itself: kernels for bfloat16 round it.
inline double rounding_of_ds(const cliperase::IsaKernels& kernels) {
    return kernels.for_any_dtype == nullptr ? 0 : 1.0 / (1 << 8);
}

// test_losses.cpp
void check_losses(const std::vector<const cliperase::IsaKernels*>& all_kernels);

// test_comparison.cpp
void check_comparison(const cliperase::IsaKernels& kernels);

// test_amx.cpp
void check_amx();

// test_buffers.cpp
void check_buffers();
