// Products of small matrices, C += A B, in float32: A is read where it lies, B from packed panels.
#pragma once

#include "vector.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// A tile of C in registers: MR rows of NV vectors. With W = 16 there are 32 registers, else 16.
constexpr int MR = W == 16 ? 8 : 6;
constexpr int NV = W == 16 ? 3 : 2;
constexpr int NR = NV * W;

inline i64 round_up(i64 value, i64 to) { return (value + to - 1) / to * to; }

// A matrix [rows, depth] of floats with any strides.
struct Left {
    const float* data;
    i64 row, depth;  // strides
    Left at(i64 i, i64 k) const { return {data + i * row + k * depth, row, depth}; }
};

// B [depth, columns] in panels of NR columns (the last as many vectors as it needs, zeros beyond the columns). A panel
// is [depth, its width].
struct Panels {
    const float* data;
    i64 stride;  // floats from panel to panel
    i64 start;   // the row of B to begin with
    static i64 width(i64 columns, i64 panel) { return smaller(NR, round_up(columns - panel * NR, W)); }
};

template <int VECTORS>
inline void tile_product(i64 depth, Left a, i64 rows, const float* b, float* c, i64 c_row, bool add) {
    const float* row[MR];
    Floats total[MR][VECTORS];
    for (int r = 0; r < MR; ++r) {
        row[r] = a.data + smaller(r, rows - 1) * a.row;  // beyond the last, its sums are not stored
        for (int v = 0; v < VECTORS; ++v) total[r][v] = Floats{};
    }
    for (i64 k = 0; k < depth; ++k) {
        Floats right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) right[v] = load(b + v * W);
        b += VECTORS * W;
        for (int r = 0; r < MR; ++r) {
            const float left = row[r][k * a.depth];
            for (int v = 0; v < VECTORS; ++v) total[r][v] += left * right[v];
        }
    }
    for (int r = 0; r < MR; ++r) {
        if (r >= rows) break;
        for (int v = 0; v < VECTORS; ++v) {
            float* to = c + r * c_row + v * W;
            store(to, add ? load(to) + total[r][v] : total[r][v]);
        }
    }
}

// C [rows, columns] = or += A [rows, depth] B. C has room for `columns` rounded up to whole vectors in each row.
inline void product(i64 rows, i64 columns, i64 depth, Left a, Panels b, float* c, i64 c_row, bool add) {
    constexpr i64 DEPTH = 256;  // of a panel: 16 KiB, half of the first-level cache
    for (i64 k = 0; k < depth; k += DEPTH) {
        const i64 now = smaller(DEPTH, depth - k);
        for (i64 panel = 0; panel * NR < columns; ++panel) {
            const i64 width = Panels::width(columns, panel);
            const float* from = b.data + panel * b.stride + (b.start + k) * width;
            for (i64 i = 0; i < rows; i += MR) {
                const Left left = a.at(i, k);
                float* to = c + i * c_row + panel * NR;
                const i64 left_rows = smaller(MR, rows - i);
                if (width == W) tile_product<1>(now, left, left_rows, from, to, c_row, add || k > 0);
                if (width == 2 * W) tile_product<2>(now, left, left_rows, from, to, c_row, add || k > 0);
                if constexpr (NV == 3)
                    if (width == 3 * W) tile_product<3>(now, left, left_rows, from, to, c_row, add || k > 0);
            }
        }
    }
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
