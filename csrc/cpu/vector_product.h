// The innermost part of a product, in vector registers.
#pragma once

#include "steps.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// A tile of C in registers: MR rows of NV vectors. There are 32 registers with W = 16, otherwise 16.
constexpr int MR = W == 16 ? 8 : 6;
constexpr int NV = W == 16 ? 3 : 2;
constexpr int NR = NV * W;

constexpr i64 PANEL_DEPTH = 256;  // 16 KiB of a panel with W = 8: half of the first-level cache

// Vector registers need no preparation by the thread that multiplies.
struct ProductRegisters {
    ProductRegisters() {}
};

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

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
