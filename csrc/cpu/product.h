// Products of small matrices, C += A B, with sums in float32: A is read in place or from packed groups of rows, B from
// packed panels. Depths and strides along the depth count steps.
#pragma once

#include "steps.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// A tile of C in registers: MR rows of NV vectors. There are 32 registers with W = 16, otherwise 16.
constexpr int MR = W == 16 ? 8 : 6;
constexpr int NV = W == 16 ? 3 : 2;
constexpr int NR = NV * W;

inline i64 round_up(i64 value, i64 to) { return (value + to - 1) / to * to; }

// The left matrix [rows, depth] of a product, read MR rows at a time. Where fewer are left, the memory beyond them is
// read, but the sums are not stored. `NEXT`: from one k to the next.
struct Rows {  // `stride` from row to row
    const Step* data;
    i64 stride;
    static constexpr i64 NEXT = 1;
    const Step* at(i64 i, i64 k) const { return data + i * stride + k; }
    i64 row(i64 r) const { return r * stride; }
};
template <i64 STRIDE>
struct Columns {  // the transpose of rows `STRIDE` apart
    const Step* data;
    static constexpr i64 NEXT = STRIDE;
    const Step* at(i64 i, i64 k) const { return data + i + k * NEXT; }
    static i64 row(i64 r) { return r; }
};
struct RowGroups {  // [depth, MR] for each MR rows, `stride` from one group to the next
    const Step* data;
    i64 stride;
    static constexpr i64 NEXT = MR;
    const Step* at(i64 i, i64 k) const { return data + i / MR * stride + k * NEXT; }
    static i64 row(i64 r) { return r; }
};

// B [depth, columns] in panels [depth, width] of NR columns. The last panel is a whole number of vectors wide, with
// zeros beyond the columns.
struct Panels {
    const Step* data;
    i64 stride;  // from panel to panel
    i64 start;   // the first row of B
    static i64 width(i64 columns, i64 panel) { return smaller(NR, round_up(columns - panel * NR, W)); }
};

// C [rows, VECTORS * W] = or += factor A B, one tile in registers. Not inlined: the loop would lack registers for
// addresses.
template <int VECTORS, typename Left>
__attribute__((noinline)) void tile_product(i64 depth, Left left, const Step* a, i64 rows, const Step* b, float* c,
                                            i64 c_row, float factor, bool add) {
    Floats total[MR][VECTORS];
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < VECTORS; ++v) total[r][v] = Floats{};
    for (i64 k = 0; k < depth; ++k) {
        decltype(load(b)) right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) right[v] = load(b + v * W);
        for (int r = 0; r < MR; ++r)
            for (int v = 0; v < VECTORS; ++v) total[r][v] = multiply_add(total[r][v], a[left.row(r)], right[v]);
        a += Left::NEXT;
        b += VECTORS * W;
    }
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < VECTORS; ++v)
            if (r < rows) {
                float* to = c + r * c_row + v * W;
                if constexpr (PER_STEP > 1) total[r][v] *= factor;  // otherwise 1
                store(to, add ? load(to) + total[r][v] : total[r][v]);
            }
}

// C [rows, columns] = or += factor A [rows, depth] B. C has room for `columns` rounded up to whole vectors in each row.
template <typename Left>
inline void product(i64 rows, i64 columns, i64 depth, Left a, Panels b, float* c, i64 c_row, float factor,
                    bool add) {
    constexpr i64 DEPTH = 256;  // of a panel: 16 KiB, half of the first-level cache
    for (i64 k = 0; k < depth; k += DEPTH) {
        const i64 now = smaller(DEPTH, depth - k);
        for (i64 panel = 0; panel * NR < columns; ++panel) {
            const i64 width = Panels::width(columns, panel);
            const Step* from = b.data + panel * b.stride + (b.start + k) * width;
            for (i64 i = 0; i < rows; i += MR) {
                float* to = c + i * c_row + panel * NR;
                const i64 left_rows = smaller(MR, rows - i);
                const auto multiply = width == W        ? tile_product<1, Left>
                                      : width == 2 * W ? tile_product<2, Left>
                                                       : tile_product<NV, Left>;
                multiply(now, a, a.at(i, k), left_rows, from, to, c_row, factor, add || k > 0);
            }
        }
    }
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
