// Products of small matrices, C += A B, with sums in float32: A is read in place or from packed groups of rows, B from
// packed panels. Depths and strides along the depth count steps.
#pragma once

#if defined(CLIPERASE_AMX)
#include "amx_product.h"
#else
#include "vector_product.h"
#endif

namespace cliperase {
namespace CLIPERASE_ISA {

// B [depth, columns] in panels [depth, width] of NR columns. The last panel is a whole number of vectors wide, with
// zeros beyond the columns.
struct Panels {
    const Step* data;
    i64 stride;  // from panel to panel
    i64 start;   // the first row of B
    static i64 width(i64 columns, i64 panel) { return smaller(NR, round_up(columns - panel * NR, W)); }
};

// C [rows, columns] = or += factor A [rows, depth] B. C has room for `columns` rounded up to whole vectors in each row.
template <typename Left>
inline void product(i64 rows, i64 columns, i64 depth, Left a, Panels b, float* c, i64 c_row, float factor,
                    bool add) {
    for (i64 k = 0; k < depth; k += PANEL_DEPTH) {
        const i64 now = smaller(PANEL_DEPTH, depth - k);
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
