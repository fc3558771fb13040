// Copies features of any dtype and stride to the layouts that the products read: groups of rows, and panels.
#pragma once

#include "product.h"
#include "sweep.h"

namespace cliperase {
namespace CLIPERASE_ISA {

struct Bfloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

inline float from_bits(std::uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) { return from_bits(std::uint32_t{value.bits} << 16); }
inline float to_float(Float16 value) {
    const std::uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
    // The exponents differ by 112; the product also normalises the smallest numbers. Infinity and NaN are unchanged.
    const float moved = from_bits(magnitude) * from_bits(0x77800000u);
    const float special = from_bits(magnitude | 0x7f800000u);
    const float out = magnitude >= 0x0f800000u ? special : moved;
    return sign ? -out : out;
}

template <typename T>
inline float element(const Matrix& m, i64 i, i64 k) {
    return to_float(static_cast<const T*>(m.data)[i * m.row + k * m.column]);
}

// Calls `work` with a null pointer to the element's type.
template <typename Work>
inline void with_dtype(Dtype dtype, Work work) {
    if (dtype == Dtype::float32) work(static_cast<float*>(nullptr));
    if (dtype == Dtype::bfloat16) work(static_cast<Bfloat16*>(nullptr));
    if (dtype == Dtype::float16) work(static_cast<Float16*>(nullptr));
}

// out [width, MR] = scale * `count` rows of m, at most MR, then zeros.
inline void pack_group(const Matrix& m, i64 start, i64 count, i64 width, float scale, float* out) {
    with_dtype(m.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* row[MR];
        for (i64 r = 0; r < MR; ++r) row[r] = static_cast<const T*>(m.data) + (start + smaller(r, count - 1)) * m.row;
        for (i64 k = 0; k < width; ++k)
            for (i64 r = 0; r < MR; ++r) out[k * MR + r] = scale * to_float(row[r][k * m.column]);
        for (i64 r = count; r < MR; ++r)
            for (i64 k = 0; k < width; ++k) out[k * MR + r] = 0;
    });
}

// Rows of m as the columns of B: B [width, count] in panels, `width` deep.
inline void pack_transposed(const Matrix& m, i64 start, i64 count, i64 width, float* out) {
    with_dtype(m.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (i64 panel = 0; panel * NR < count; ++panel) {
            const i64 lanes = Panels::width(count, panel), valid = smaller(lanes, count - panel * NR);
            const T* from = static_cast<const T*>(m.data) + (start + panel * NR) * m.row;
            float* to = out + panel * width * NR;
            for (i64 k = 0; k < width; ++k) {
                for (i64 lane = 0; lane < valid; ++lane) to[lane] = to_float(from[lane * m.row + k * m.column]);
                for (i64 lane = valid; lane < lanes; ++lane) to[lane] = 0;
                to += lanes;
            }
        }
    });
}

// Rows of m as the rows of B: rows `at` to `at + count` of B [depth, width] in panels of `depth` rows.
inline void pack_panels(const Matrix& m, i64 start, i64 count, i64 width, float scale, float* out, i64 at, i64 depth) {
    with_dtype(m.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (i64 panel = 0; panel * NR < width; ++panel) {
            const i64 lanes = Panels::width(width, panel), valid = smaller(lanes, width - panel * NR);
            float* to = out + panel * depth * NR + at * lanes;
            for (i64 i = 0; i < count; ++i) {
                for (i64 lane = 0; lane < valid; ++lane) to[lane] = scale * element<T>(m, start + i, panel * NR + lane);
                for (i64 lane = valid; lane < lanes; ++lane) to[lane] = 0;
                to += lanes;
            }
        }
    });
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
