// The sigmoid loss of all pairs and, in the same pass, its gradients: dS of a tile depends on no other tile, so that
// each tile of S is formed once, three products in total.
#pragma once

#include "gradients.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// log(1 + exp(y)) and its slope 1 / (1 + exp(-y)).
struct Softplus {
    Floats value, slope;
};

// With e = exp(-|y|) in [0, 1] nothing overflows, and log(1 + e) = 2 artanh(z), z = e / (2 + e) in [0, 1/3], is exact
// where e is tiny. artanh(z) = z (1 + z^2 q(z^2)), q the polynomial of degree 3 for which the largest relative error of
// the whole, 5e-9, is least (a weighted least-squares fit). One division serves both quotients.
inline Softplus softplus(Floats y) {
    const Floats e = exp(y < 0.0f ? y : -y);
    const Floats one = 1.0f + e, two = 2.0f + e, inverse = 1.0f / (one * two);
    const Floats z = e * one * inverse, t = z * z,
                 half = z + z * t * (0.333332082f + t * (0.200107606f + t * (0.140009576f + t * 0.14005699f)));
    const Floats quotient = two * inverse;  // 1 / (1 + e)
    return {larger(y, Floats{}) + (half + half), y < 0.0f ? e * quotient : quotient};
}

struct SigmoidLayout : GradientLayout {
    double* sums;  // [blocks, STRIP_TILES, 2], of the loss and of dS

    double* tile_sums(const TilePlace& at) const {
        return sums + 2 * (at.block * STRIP_TILES + at.tile);
    }

    SigmoidLayout(const SimilarityInputs& in, const Sigmoid& s, BumpAllocator& allocator)
        : GradientLayout(in, s, s.gradients(), allocator),
          sums(reinterpret_cast<double*>(allocator.floats(4 * blocks * STRIP_TILES))) {}
};

// Adds the losses of all entries of a tile to sums[0] and, with GRADIENT, writes dS and adds it to sums[1].
template <bool GRADIENT>
inline void softplus_tile(const float* tile, i64 rows, i64 width, float bias, float* ds, double* sums) {
    for (i64 i = 0; i < rows; ++i) {
        Floats loss{}, slope{};
        for (i64 j = 0; j < width; j += W) {
            const Softplus found = softplus(load(tile + i * TILE_COLUMNS + j) + bias);
            loss += found.value;
            if constexpr (GRADIENT) {
                slope += found.slope;
                store(ds + i * TILE_COLUMNS + j, found.slope);
            }
        }
        sums[0] += static_cast<double>(sum(loss));
        if constexpr (GRADIENT) sums[1] += static_cast<double>(sum(slope));
    }
}

// The same for a whole tile, in which pairs have the opposite sign.
inline void sigmoid_tile(const SimilarityInputs& in, const Sigmoid& s, const TilePlace& at, float* tile, float* ds,
                         double* sums) {
    const i64 row = at.row, rows = at.rows, column = at.column, columns = at.columns;
    alignas(64) float own[TILE_ROWS];
    for (i64 i = 0; i < rows; ++i) own[i] = LOWEST;
    for_each_pair(in, row, rows, column, columns,
                  [&](i64 i, i64 j) { own[i] = -(tile[i * TILE_COLUMNS + j] + s.bias); });
    exclude(in, row, rows, column, columns, {nullptr, nullptr}, tile);
    if (ds)
        softplus_tile<true>(tile, rows, at.width, s.bias, ds, sums);
    else
        softplus_tile<false>(tile, rows, at.width, s.bias, ds, sums);
    for_each_pair(in, row, rows, column, columns, [&](i64 i, i64 j) {
        const Softplus found = softplus(all(own[i]));
        sums[0] += static_cast<double>(found.value[0]);
        if (ds == nullptr) return;
        sums[1] -= static_cast<double>(found.slope[0]);
        ds[i * TILE_COLUMNS + j] = -found.slope[0];
    });
}

inline void sigmoid(const SimilarityInputs& in, const Sigmoid& s, char* scratch) {
    BumpAllocator allocator(scratch);
    const SigmoidLayout layout(in, s, allocator);
    for (i64 i = 0; i < 2 * layout.blocks * STRIP_TILES; ++i) layout.sums[i] = 0;
    pass_over_strips(in, s, layout, 0, nullptr, [&](const TilePlace& at) {
        float* tile = layout.own_tiles();
        layout.operands.student_tile(in, at, tile);
        sigmoid_tile(in, s, at, tile, s.gradients() ? layout.ds.tile(at) : nullptr, layout.tile_sums(at));
        if (s.gradients()) layout.ds.finish(at);
    });
    double loss = 0, bias = 0;
    for (i64 i = 0; i < layout.blocks * STRIP_TILES; ++i) loss += layout.sums[2 * i], bias += layout.sums[2 * i + 1];
    *s.loss = loss;
    if (s.grad_bias) *s.grad_bias = bias;
}

inline std::size_t sigmoid_scratch(const SimilarityInputs& in, const Sigmoid& s) {
    BumpAllocator allocator(nullptr);
    const SigmoidLayout layout(in, s, allocator);
    return allocator.used();
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
