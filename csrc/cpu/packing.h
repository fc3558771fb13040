// Copies features of any dtype and stride to the layouts that the products read: groups of rows, and panels.
#pragma once

#include <utility>

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
    // The exponents differ by 112. The smallest numbers are converted as integers: as a float32, `magnitude` would then
    // be below the smallest normal number, which a thread may be told to take for 0. Infinity and NaN are unchanged.
    const float small = static_cast<float>(static_cast<std::int32_t>(magnitude >> 13)) * 0x1p-24f;
    const float normal = from_bits(magnitude + 0x38000000u), special = from_bits(magnitude | 0x7f800000u);
    const float out = magnitude >= 0x0f800000u ? special : magnitude >= 0x00800000u ? normal : small;
    return sign ? -out : out;
}

inline std::uint32_t to_bits(float value) {
    std::uint32_t out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

// Rounds to nearest even, as torch does. Numbers below the smallest normal one are kept; the processor's instruction
// for bfloat16 would set them to 0.
inline void round_to(float& out, float value) { out = value; }
inline void round_to(Bfloat16& out, float value) {
    const std::uint32_t bits = to_bits(value), nearest = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    out.bits = static_cast<std::uint16_t>(value == value ? nearest : 0x7fc0u);
}
inline void round_to(Float16& out, float value) {
    const std::uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffffu;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Adding 0.5 rounds at the spacing of the numbers below the smallest normal one.
    const std::uint32_t small = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const std::uint32_t rounded = magnitude < 0x38800000u ? small : magnitude < 0x47800000u ? normal : large;
    out.bits = static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | rounded);
}

// Calls `work` with a null pointer to the element's type.
template <typename Work>
inline void with_dtype(Dtype dtype, Work work) {
    if (dtype == Dtype::float32) work(static_cast<float*>(nullptr));
    if (dtype == Dtype::bfloat16) work(static_cast<Bfloat16*>(nullptr));
    if (dtype == Dtype::float16) work(static_cast<Float16*>(nullptr));
}

// The same for features, which are all bfloat16 if products multiply pairs.
template <typename Work>
inline void with_feature_dtype(Dtype dtype, Work work) {
#if defined(CLIPERASE_BF16)
    static_cast<void>(dtype);
    work(static_cast<Bfloat16*>(nullptr));
#else
    with_dtype(dtype, work);
#endif
}

#if defined(CLIPERASE_AMX)

// Some of 16 numbers, `next` from one to the next, of which `left` are there; the others are 0.
__attribute__((noinline)) inline Halves gathered(const Bfloat16* from, i64 next, i64 left) {
    Halves out{};
    for (i64 lane = 0; lane < smaller(W, left); ++lane) out[lane] = from[lane * next].bits;
    return out;
}

// The same, and fast where they are adjacent: features are packed in each pass.
__attribute__((always_inline)) inline Halves numbers(const Bfloat16* from, i64 next, i64 left) {
    if (next != 1 || left < W) return gathered(from, next, left);
    Halves out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

// 16 pairs likewise.
__attribute__((always_inline)) inline Ints pairs(const Bfloat16* from, i64 next, i64 left) {
    Ints out;
    if (next == 1 && left >= 2 * W) {
        std::memcpy(&out, from, sizeof out);
        return out;
    }
    const Halves both[2] = {numbers(from, next, left), left > W ? numbers(from + W * next, next, left - W) : Halves{}};
    std::memcpy(&out, both, sizeof out);
    return out;
}

// The pairs of two rows, column by column.
inline Ints pairs_of(Halves first, Halves second) {
    return __builtin_convertvector(first, Ints) | __builtin_convertvector(second, Ints) << 16;
}

// Exchanges the off-diagonal quarters of the squares of 2 BY x 2 BY numbers that two rows, BY apart, lie in.
template <int BY, int... LANE>
inline void exchange_quarters(Ints& a, Ints& b, std::integer_sequence<int, LANE...>) {
    const Ints old_a = a, old_b = b;
#if defined(__clang__)
    a = __builtin_shufflevector(old_a, old_b, (LANE & BY ? LANE - BY + W : LANE)...);
    b = __builtin_shufflevector(old_a, old_b, (LANE & BY ? LANE + W : LANE + BY)...);
#else
    a = __builtin_shuffle(old_a, old_b, Ints{(LANE & BY ? LANE - BY + W : LANE)...});
    b = __builtin_shuffle(old_a, old_b, Ints{(LANE & BY ? LANE + W : LANE + BY)...});
#endif
}

template <int BY>
inline void exchange_all_quarters(Ints* rows) {
    for (int r = 0; r < W; ++r)
        if (!(r & BY)) exchange_quarters<BY>(rows[r], rows[r + BY], std::make_integer_sequence<int, W>{});
}

// Transposes 16 rows.
inline void transpose(Ints* rows) {
    exchange_all_quarters<8>(rows);
    exchange_all_quarters<4>(rows);
    exchange_all_quarters<2>(rows);
    exchange_all_quarters<1>(rows);
}

inline const Bfloat16* at(const Matrix& m, i64 i, i64 k) {
    return static_cast<const Bfloat16*>(m.data) + i * m.row + k * m.column;
}

// `count` rows of m as a group of `RowGroups`, then zeros.
inline void pack_group(const Matrix& m, i64 start, i64 count, i64 width, float, Step* out) {
    for (i64 k = 0; k < steps(width); k += AMX)
        for (i64 r = 0; r < MR; ++r) {
            const i64 number = PER_STEP * k;
            const Ints row = r < count ? pairs(at(m, start + r, number), m.column, width - number) : Ints{};
            std::memcpy(out + k * MR + r * AMX, &row, sizeof row);
        }
}

// Rows of m as the columns of B: B [steps of width, count] in panels.
inline void pack_transposed(const Matrix& m, i64 start, i64 count, i64 width, Step* out) {
    for (i64 column = 0; column < count; column += W) {
        const i64 panel = column / NR, lanes = Panels::width(count, panel);
        Step* to = out + panel * steps(width) * NR + column % NR;
        for (i64 k = 0; k < steps(width); k += AMX) {
            const i64 number = PER_STEP * k;
            Ints rows[W];
            for (i64 r = 0; r < W; ++r)
                rows[r] = column + r < count ? pairs(at(m, start + column + r, number), m.column, width - number)
                                             : Ints{};
            transpose(rows);
            for (i64 s = 0; s < AMX; ++s) std::memcpy(to + (k + s) * lanes, &rows[s], sizeof rows[s]);
        }
    }
}

// Rows of m as the rows of B [depth, width], in panels: as the steps from `step` on, of `depth`.
inline void pack_panels(const Matrix& m, i64 start, i64 count, i64 width, float, Step* out, i64 step, i64 depth) {
    for (i64 column = 0; column < width; column += W) {
        const i64 panel = column / NR, lanes = Panels::width(width, panel), left = width - column;
        Step* to = out + panel * depth * NR + step * lanes + column % NR;
        const auto row = [&](i64 r) {
            return r < count ? numbers(at(m, start + r, column), m.column, left) : Halves{};
        };
        for (i64 s = 0; s < steps(count); ++s, to += lanes) {
            const Ints both = pairs_of(row(PER_STEP * s), row(PER_STEP * s + 1));
            std::memcpy(to, &both, sizeof both);
        }
    }
}

#else

// A step along the depth, which begins at the number `from` and of which `left` numbers are left; `next`: the distance
// to the one after it.
#if defined(CLIPERASE_BF16)
inline Step to_step(const Bfloat16* from, i64 next, i64 left, float) {
    return pair_of(from->bits, left > 1 ? from[next].bits : std::uint16_t{0});
}
#else
template <typename T>
inline Step to_step(const T* from, i64, i64, float factor) {
    return factor * to_float(*from);
}
#endif

// out [steps of width, MR] = factor * `count` rows of m, at most MR, then zeros.
inline void pack_group(const Matrix& m, i64 start, i64 count, i64 width, float factor, Step* out) {
    with_feature_dtype(m.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* row[MR];
        for (i64 r = 0; r < MR; ++r) row[r] = static_cast<const T*>(m.data) + (start + smaller(r, count - 1)) * m.row;
        for (i64 k = 0; k < steps(width); ++k)
            for (i64 r = 0; r < MR; ++r)
                out[k * MR + r] = to_step(row[r] + PER_STEP * k * m.column, m.column, width - PER_STEP * k, factor);
        for (i64 r = count; r < MR; ++r)
            for (i64 k = 0; k < steps(width); ++k) out[k * MR + r] = 0;
    });
}

// Rows of m as the columns of B: B [steps of width, count] in panels.
inline void pack_transposed(const Matrix& m, i64 start, i64 count, i64 width, Step* out) {
    with_feature_dtype(m.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (i64 panel = 0; panel * NR < count; ++panel) {
            const i64 lanes = Panels::width(count, panel), valid = smaller(lanes, count - panel * NR);
            const T* from = static_cast<const T*>(m.data) + (start + panel * NR) * m.row;
            Step* to = out + panel * steps(width) * NR;
            for (i64 k = 0; k < steps(width); ++k) {
                const i64 at = PER_STEP * k;
                for (i64 lane = 0; lane < valid; ++lane)
                    to[lane] = to_step(from + lane * m.row + at * m.column, m.column, width - at, 1);
                for (i64 lane = valid; lane < lanes; ++lane) to[lane] = 0;
                to += lanes;
            }
        }
    });
}

// Rows of m times factor as the rows of B [depth, width], in panels: as the steps from `at` on, of `depth`.
inline void pack_panels(const Matrix& m, i64 start, i64 count, i64 width, float factor, Step* out, i64 at, i64 depth) {
    with_feature_dtype(m.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (i64 panel = 0; panel * NR < width; ++panel) {
            const i64 lanes = Panels::width(width, panel), valid = smaller(lanes, width - panel * NR);
            const T* from = static_cast<const T*>(m.data) + start * m.row + panel * NR * m.column;
            Step* to = out + panel * depth * NR + at * lanes;
            for (i64 i = 0; i < count; i += PER_STEP) {
                for (i64 lane = 0; lane < valid; ++lane)
                    to[lane] = to_step(from + i * m.row + lane * m.column, m.row, count - i, factor);
                for (i64 lane = valid; lane < lanes; ++lane) to[lane] = 0;
                to += lanes;
            }
        }
    });
}

#endif

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
