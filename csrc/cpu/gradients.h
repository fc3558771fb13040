// From a strip of dS to the gradients, and what these products read: the same for every loss. All but `add_text_gradient` are
// called by every thread of a parallel region. A layout holds [blocks, strip, TILE_COLUMNS] of dS and the packed features.
#pragma once

#include "strips.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// text [columns, width] in panels, for dI.
inline void pack_text_panels(const Problem& p, float* panels) {
#pragma omp for schedule(static)
    for (i64 block = 0; block < divide_up(p.columns, TILE_COLUMNS); ++block) {
        const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
        pack_panels(p.text, column, columns, p.width, 1, panels, column, p.columns);
    }
}

// dT of one block of columns = or += dSᵀ times the strip of scale * image.
template <typename Layout>
inline void add_text_gradient(const Problem& p, const Layout& layout, i64 block, i64 strip, float* grad_text, bool add) {
    const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
    product(columns, p.width, strip, {layout.ds_tile(block, 0), 1, TILE_COLUMNS},
            {layout.image_panels, layout.strip * NR, 0}, grad_text + column * gradient_stride(p.width),
            gradient_stride(p.width), add);
}

// dI of a strip, without the factor scale.
template <typename Layout>
inline void write_image_gradient(const Problem& p, const Layout& layout, i64 start, i64 strip, float* grad_image) {
    const i64 stride = gradient_stride(p.width), panels = divide_up(p.width, NR);
    const i64 panel_groups = divide_up(panels, PANEL_GROUP), row_groups = divide_up(strip, ROW_GROUP);
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < row_groups * panel_groups; ++task) {
        const i64 row = task / panel_groups * ROW_GROUP, rows = smaller(ROW_GROUP, strip - row);
        const i64 panel = task % panel_groups * PANEL_GROUP;
        const i64 width = smaller(PANEL_GROUP * NR, p.width - panel * NR);
        float* to = grad_image + (start + row) * stride + panel * NR;
        for (i64 block = 0; block < layout.blocks; ++block) {
            const i64 column = block * TILE_COLUMNS, depth = smaller(TILE_COLUMNS, p.columns - column);
            product(rows, width, depth, {layout.ds_tile(block, row), TILE_COLUMNS, 1},
                    {layout.text_panels + panel * p.columns * NR, p.columns * NR, column}, to, stride, block > 0);
        }
    }
}

// dI of a strip times scale and, before that factor, which may be 0, <dI_i, I_i> of each row into `dots`, for the gradient of
// scale; null: not needed.
inline void scale_image_gradient(const Problem& p, i64 start, i64 strip, float* grad_image, float* dots) {
    const i64 stride = gradient_stride(p.width);
#pragma omp for schedule(static)
    for (i64 i = start; i < start + strip; ++i) {
        float* gradient = grad_image + i * stride;
        if (dots) dots[i] = static_cast<float>(entry({grad_image, stride, 1, Dtype::float32}, p.image, p.width, 1, i, i));
        for (i64 k = 0; k < p.width; ++k) gradient[k] *= p.scale;
    }
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
