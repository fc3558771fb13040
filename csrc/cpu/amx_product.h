// The innermost part of a product, in the tile registers of AMX. Everything along the depth is padded with zeros to
// whole registers.
#pragma once

#include "amx_registers.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// A tile of C: two by two registers.
constexpr int MR = 2 * AMX;
constexpr int NV = 2;
constexpr int NR = NV * W;

// A panel, 64 KiB, is read from the second-level cache. Half of that, which stays in the first, is not faster: the sums
// are then written twice as often.
constexpr i64 PANEL_DEPTH = 512;

// The registers of a thread, for as long as it multiplies.
using ProductRegisters = AmxRegisters;

// The left matrix [rows, depth] of a product: [depth / 16, MR, 16] for each MR rows, `stride` from one such group to the
// next. Memory beyond the last row is read, but the sums are not stored.
struct RowGroups {
    Step* data;
    i64 stride;
    // Where row i has its steps from k on, k a multiple of 16.
    Step* at(i64 i, i64 k) const { return data + i / MR * stride + k * MR + i % MR * AMX; }
};

// total [ROWS * 16, VECTORS * 16] = A B.
//
// On a Xeon of 2.8 GHz the multiplications alone reach 2,840 GFLOP/s, this loop 1,900 with operands in the second-level
// cache, and with the sums written 1,600. In a whole pass the operands and tiles of sums come from the third: half of that.
template <int ROWS, int VECTORS>
inline void multiply_registers(i64 depth, const Step* a, const Step* b, float* total) {
    constexpr i64 B_ROW = VECTORS * AMX_BYTES;
    amx_zero<0>();
    if constexpr (VECTORS > 1) amx_zero<1>();
    if constexpr (ROWS > 1) amx_zero<2>();
    if constexpr (ROWS > 1 && VECTORS > 1) amx_zero<3>();
    for (i64 k = 0; k < depth; k += AMX) {
        amx_load<4>(b, B_ROW);
        amx_load<6>(a, AMX_BYTES);
        amx_multiply_add<0, 6, 4>();
        if constexpr (VECTORS > 1) amx_load<5>(b + W, B_ROW), amx_multiply_add<1, 6, 5>();
        if constexpr (ROWS > 1) amx_load<7>(a + AMX * AMX, AMX_BYTES), amx_multiply_add<2, 7, 4>();
        if constexpr (ROWS > 1 && VECTORS > 1) amx_multiply_add<3, 7, 5>();
        a += MR * AMX;
        b += AMX * VECTORS * W;
    }
    amx_store<0>(total, B_ROW);
    if constexpr (VECTORS > 1) amx_store<1>(total + W, B_ROW);
    if constexpr (ROWS > 1) amx_store<2>(total + AMX * VECTORS * W, B_ROW);
    if constexpr (ROWS > 1 && VECTORS > 1) amx_store<3>(total + AMX * VECTORS * W + W, B_ROW);
}

// C [rows, VECTORS * W] = or += factor A B.
template <int VECTORS, typename Left>
__attribute__((noinline)) void tile_product(i64 depth, Left, const Step* a, i64 rows, const Step* b, float* c, i64 c_row,
                                            float factor, bool add) {
    alignas(64) float total[MR * VECTORS * W];
    if (rows > AMX)
        multiply_registers<2, VECTORS>(depth, a, b, total);
    else
        multiply_registers<1, VECTORS>(depth, a, b, total);
    for (i64 r = 0; r < rows; ++r)
        for (int v = 0; v < VECTORS; ++v) {
            float* to = c + r * c_row + v * W;
            const Floats sum = load(total + (r * VECTORS + v) * W) * factor;
            store(to, add ? load(to) + sum : sum);
        }
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
