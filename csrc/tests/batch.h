// Batches for the C++ tests: features of any dtype and layout, and the regimes in which cancellation matters, as in
// tests/ops/accuracy_cases.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "sweep.h"

using cliperase::Dtype;
using std::int64_t;

// Converts values of `dtype` to bits and back, without the code under test.
inline std::uint32_t encode(Dtype dtype, double value) {
    if (dtype == Dtype::float16) {
        int exponent;
        std::frexp(value, &exponent);
        exponent = value == 0 ? -14 : std::max(exponent - 1, -14);  // that of subnormal numbers, for their spacing
        const auto mantissa = static_cast<std::uint32_t>(std::lrint(std::ldexp(std::abs(value), 10 - exponent)));
        return (std::signbit(value) ? 0x8000u : 0u) + mantissa + (static_cast<std::uint32_t>(exponent + 14) << 10);
    }
    const auto single = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    return dtype == Dtype::float32 ? bits : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline double decode(Dtype dtype, std::uint32_t bits) {
    if (dtype == Dtype::float16) {
        const int exponent = static_cast<int>(bits >> 10 & 31u), fraction = static_cast<int>(bits & 1023u);
        const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
        return bits & 0x8000u ? -magnitude : magnitude;
    }
    if (dtype == Dtype::bfloat16) bits <<= 16;
    float single;
    std::memcpy(&single, &bits, sizeof single);
    return static_cast<double>(single);
}

enum class Layout { rows, transposed, every_other_column, expanded };  // expanded: all rows are the same memory

// Features [n, width] as the sweep takes them, and the same numbers in double.
struct Features {
    int64_t n, width;
    std::vector<double> values;
    std::vector<std::uint16_t> memory;  // in halves of float32
    cliperase::Matrix strides;

    Features(int64_t rows, int64_t wide, std::vector<double> exact, Dtype dtype, Layout layout)
        : n(rows), width(wide), values(std::move(exact)) {
        strides = {nullptr, width, 1, dtype};
        if (layout == Layout::transposed) strides.row = 1, strides.column = n;
        if (layout == Layout::every_other_column) strides.row = 2 * width, strides.column = 2;
        if (layout == Layout::expanded) strides.row = 0;
        const int64_t halves = dtype == Dtype::float32 ? 2 : 1;
        memory.assign(static_cast<std::size_t>(2 * n * width * halves), 0xffff);  // NaN in between
        for (int64_t i = 0; i < n; ++i)
            for (int64_t k = 0; k < width; ++k) {
                double& value = values[i * width + k];
                if (layout == Layout::expanded) value = values[k];
                const std::uint32_t bits = encode(dtype, value);
                std::memcpy(&memory[(i * strides.row + k * strides.column) * halves], &bits,
                            2 * halves);  // little-endian
                value = decode(dtype, bits);
            }
    }
    cliperase::Matrix matrix() const {
        cliperase::Matrix found = strides;
        found.data = memory.data();
        return found;
    }
};

enum class Regime { random, converged, anti_aligned, collapsed, collapsed_teacher, half_converged, swapped, axes };

// The parameters of a batch. `Regime::axes`: image and text of a pair are a unit vector of their own. `groups`: random ids, or with `Regime::swapped` those of the pairs whose texts are
// swapped.
struct Case {
    int64_t n = 140, width = 40, teacher_width = 24;
    bool retention = true, consistency = true, groups = false;
    Regime regime = Regime::random;
    float scale = 14, teacher_scale = 9;
    Dtype dtype = Dtype::float32;
    Layout layout = Layout::rows;

    std::string name() const {
        return "n " + std::to_string(n) + ", width " + std::to_string(width) + " and " + std::to_string(teacher_width) +
               (retention ? ", retention" : "") + (consistency ? ", consistency" : "") + (groups ? ", groups" : "") +
               ", regime " + std::to_string(static_cast<int>(regime)) + " at scale " + std::to_string(scale) +
               ", dtype " + std::to_string(static_cast<int>(dtype)) + ", layout " +
               std::to_string(static_cast<int>(layout));
    }
};

class Batch {
  public:
    Case of;
    Features image, text, teacher_image, teacher_text;
    std::vector<std::int32_t> groups;

    explicit Batch(const Case& c) : Batch(c, Directions(c)) {}

    cliperase::SimilarityInputs inputs(int threads) const {
        cliperase::SimilarityInputs in{};
        in.rows = in.columns = of.n, in.width = of.width, in.scale = of.scale, in.threads = threads;
        in.image = image.matrix(), in.text = text.matrix();
        in.has_teacher = of.consistency;
        if (of.consistency) {
            in.teacher_width = of.teacher_width, in.teacher_scale = of.teacher_scale;
            in.teacher_image = teacher_image.matrix(), in.teacher_text = teacher_text.matrix();
        }
        if (of.groups) in.row_groups = in.column_groups = groups.data();
        return in;
    }

  private:
    struct Directions {
        std::mt19937 random{7};
        std::vector<double> image, text, teacher_image, teacher_text;

        explicit Directions(const Case& c) {
            image = unit_rows(c.n, c.width, {}, 1), text = unit_rows(c.n, c.width, {}, 1);
            teacher_image = unit_rows(c.n, c.teacher_width, {}, 1),
            teacher_text = unit_rows(c.n, c.teacher_width, {}, 1);
            std::vector<double> near = image;
            const auto near_rows = [&](double noise) { return unit_rows(c.n, c.width, near, noise); };
            if (c.regime == Regime::converged) {
                text = near_rows(0.05);
                if (c.width == c.teacher_width) teacher_image = near_rows(0.1), teacher_text = near_rows(0.1);
            }
            if (c.regime == Regime::anti_aligned || c.regime == Regime::half_converged) {
                for (int64_t i = 0; i < c.n; ++i)
                    for (int64_t k = 0; k < c.width; ++k)
                        if (c.regime == Regime::anti_aligned || i % 3 == 0) near[i * c.width + k] *= -1;
                text = near_rows(0.05);
            }
            if (c.regime == Regime::collapsed) collapse(image, c.n, c.width), collapse(text, c.n, c.width);
            if (c.regime == Regime::collapsed_teacher)
                collapse(teacher_image, c.n, c.teacher_width), collapse(teacher_text, c.n, c.teacher_width);
            if (c.regime == Regime::axes)
                for (int64_t i = 0; i < c.n; ++i)
                    for (int64_t k = 0; k < c.width; ++k) image[i * c.width + k] = text[i * c.width + k] = i == k;
            if (c.regime == Regime::swapped)
                for (int64_t i = 0; i < c.n; ++i)
                    for (int64_t k = 0; k < c.width; ++k)
                        text[i * c.width + k] = image[std::min(i ^ 1, c.n - 1) * c.width + k];
        }
        static void collapse(std::vector<double>& rows, int64_t n, int64_t width) {
            for (int64_t i = width; i < n * width; ++i) rows[i] = rows[i - width];
        }
        // Normalised rows: those of `near`, if there are any, plus noise times random ones.
        std::vector<double> unit_rows(int64_t n, int64_t width, const std::vector<double>& near, double noise) {
            std::normal_distribution<double> normal;
            std::vector<double> out(n * width);
            for (int64_t i = 0; i < n; ++i) {
                double squares = 0;
                for (int64_t k = i * width; k < (i + 1) * width; ++k) {
                    out[k] =
                        (near.empty() ? 0 : near[k]) + noise * normal(random) / std::sqrt(static_cast<double>(width));
                    squares += out[k] * out[k];
                }
                for (int64_t k = i * width; k < (i + 1) * width; ++k) out[k] /= std::sqrt(squares);
            }
            return out;
        }
    };

    Batch(const Case& c, Directions made)
        : of(c),
          image(c.n, c.width, made.image, c.dtype, c.layout),
          text(c.n, c.width, made.text, c.dtype, c.layout),
          teacher_image(c.n, c.teacher_width, made.teacher_image, c.dtype, c.layout),
          teacher_text(c.n, c.teacher_width, made.teacher_text, c.dtype, c.layout) {
        for (int64_t i = 0; i < c.n; ++i)
            groups.push_back(
                static_cast<std::int32_t>(c.regime == Regime::swapped ? i / 2 : made.random() % (c.n / 3 + 1)) - 3);
    }
};
