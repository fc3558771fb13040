// The sigmoid loss of all pairs and, in the same pass, its gradients: dS needs nothing of the other tiles, so each tile of S
// is formed once, three products in all.
#pragma once

#include "gradients.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// log(1 + exp(y)) and its slope 1 / (1 + exp(-y)).
struct Softplus {
    Floats value, slope;
};

// With e = exp(-|y|) in [0, 1] nothing overflows, and log(1 + e) = 2 artanh(z), z = e / (2 + e) in [0, 1/3], keeps its digits
// where e is tiny. artanh(z) = z (1 + z^2 q(z^2)), q the polynomial of degree 3 for which the largest relative error of the
// whole, 5e-9, is least (a weighted least-squares fit). One division serves both quotients.
inline Softplus softplus(Floats y) {
    const Floats e = exp(y < 0.0f ? y : -y);
    const Floats one = 1.0f + e, two = 2.0f + e, inverse = 1.0f / (one * two);
    const Floats z = e * one * inverse, t = z * z, half = z + z * t * (0.333332082f + t * (0.200107606f + t * (0.140009576f + t * 0.14005699f)));
    const Floats rest = two * inverse;  // 1 / (1 + e)
    return {larger(y, Floats{}) + (half + half), y < 0.0f ? e * rest : rest};
}

struct SigmoidLayout {
    i64 strip, blocks, width;
    Operands operands;
    float* image_panels;  // as in the backward pass
    float* text_panels;
    float* tiles;   // one for each thread
    float* ds;      // [blocks, strip, TILE_COLUMNS], if there are gradients
    float* dots;    // [rows], of dI and I
    double* sums;   // [blocks, 2], of the loss and of dS
    std::size_t bytes;

    SigmoidLayout(const Problem& p, const Sigmoid& s, char* scratch) : SigmoidLayout(p, s, Carver(scratch)) {}

    float* own_tile() const { return tiles + thread() * TILE; }
    float* ds_tile(i64 block, i64 row_in_strip) const { return ds + (block * strip + row_in_strip) * TILE_COLUMNS; }

  private:
    static i64 strip_rows(const Problem& p, const Sigmoid& s) {
        const i64 most = STRIP_TILES * TILE_ROWS;
        const i64 fit = STRIP_FLOATS / round_up(p.columns, TILE_COLUMNS) / TILE_ROWS * TILE_ROWS;
        return smaller(p.rows, s.gradients() ? larger(TILE_ROWS, smaller(fit, most)) : most);
    }
    SigmoidLayout(const Problem& p, const Sigmoid& s, Carver carver)
        : strip(strip_rows(p, s)),
          blocks(divide_up(p.columns, TILE_COLUMNS)),
          width(round_up(p.width, NR)),
          operands(p, strip, carver) {
        image_panels = carver.floats(s.grad_text ? strip * width : 0);
        text_panels = carver.floats(s.grad_image ? p.columns * width : 0);
        tiles = carver.floats(p.threads * TILE);
        ds = carver.floats(s.gradients() ? blocks * strip * TILE_COLUMNS : 0);
        dots = carver.floats(s.grad_scale ? p.rows : 0);
        sums = reinterpret_cast<double*>(carver.floats(4 * blocks));
        bytes = carver.used();
    }
};

// Adds the losses of a tile of S to sums[0] and, with GRADIENT, writes dS and adds it to sums[1].
template <bool GRADIENT>
inline void softplus_tile(const float* tile, i64 rows, float bias, float* ds, double* sums) {
    for (i64 i = 0; i < rows; ++i) {
        Floats loss{}, slope{};
        for (i64 j = 0; j < TILE_COLUMNS; j += W) {
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

// The same of a whole tile: pairs enter with the other sign.
inline void sigmoid_tile(const Problem& p, const Sigmoid& s, i64 row, i64 rows, i64 column, i64 columns, float* tile, float* ds,
                         double* sums) {
    alignas(64) float own[TILE_ROWS];
    for (i64 i = 0; i < rows; ++i) own[i] = LOWEST;
    each_diagonal(p, row, rows, column, columns, [&](i64 i, i64 j) { own[i] = -(tile[i * TILE_COLUMNS + j] + s.bias); });
    leave_out(p, row, rows, column, columns, {nullptr, nullptr}, tile);
    if (ds)
        softplus_tile<true>(tile, rows, s.bias, ds, sums);
    else
        softplus_tile<false>(tile, rows, s.bias, ds, sums);
    each_diagonal(p, row, rows, column, columns, [&](i64 i, i64 j) {
        const Softplus found = softplus(all(own[i]));
        sums[0] += static_cast<double>(found.value[0]);
        if (ds == nullptr) return;
        sums[1] -= static_cast<double>(found.slope[0]);
        ds[i * TILE_COLUMNS + j] = -found.slope[0];
    });
}

inline void sigmoid(const Problem& p, const Sigmoid& s, char* scratch) {
    const SigmoidLayout layout(p, s, scratch);
    for (i64 i = 0; i < 2 * layout.blocks; ++i) layout.sums[i] = 0;
#pragma omp parallel num_threads(p.threads)
    {
        if (s.grad_image) pack_text_panels(p, layout.text_panels);
        for (i64 start = 0; start < p.rows; start += layout.strip) {
            const i64 strip = smaller(layout.strip, p.rows - start);
#pragma omp for schedule(static)
            for (i64 i = 0; i < strip; i += MR) {
                const i64 count = smaller(MR, strip - i);
                layout.operands.pack_rows_of(p, start, start + i, count);
                if (s.grad_text) pack_panels(p.image, start + i, count, p.width, p.scale, layout.image_panels, i, layout.strip);
            }
#pragma omp for schedule(dynamic)
            for (i64 block = 0; block < layout.blocks; ++block) {
                const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
                layout.operands.pack_columns_of(p, column, columns);
                for (i64 i = 0; i < strip; i += TILE_ROWS) {
                    const i64 rows = smaller(TILE_ROWS, strip - i);
                    float* tile = layout.own_tile();
                    layout.operands.student_tile(p, i, rows, columns, tile);
                    sigmoid_tile(p, s, start + i, rows, column, columns, tile, s.gradients() ? layout.ds_tile(block, i) : nullptr,
                                 layout.sums + 2 * block);
                }
                if (s.grad_text) add_text_gradient(p, layout, block, strip, s.grad_text, start > 0);
            }
            if (s.grad_image) write_image_gradient(p, layout, start, strip, s.grad_image);
            if (s.grad_image) scale_image_gradient(p, start, strip, s.grad_image, s.grad_scale ? layout.dots : nullptr);
        }
    }
    double loss = 0, bias = 0, scale = 0;
    for (i64 block = 0; block < layout.blocks; ++block) loss += layout.sums[2 * block], bias += layout.sums[2 * block + 1];
    *s.loss = loss;
    if (s.grad_bias) *s.grad_bias = bias;
    if (s.grad_scale) {
        for (i64 i = 0; i < p.rows; ++i) scale += static_cast<double>(layout.dots[i]);
        *s.grad_scale = scale;
    }
}

inline std::size_t sigmoid_scratch(const Problem& p, const Sigmoid& s) { return SigmoidLayout(p, s, nullptr).bytes; }

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
