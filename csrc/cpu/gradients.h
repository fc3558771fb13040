// A pass that forms dS, whichever the loss: strip by strip, tile by tile, and the gradients from it.
#pragma once

#include "strips.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// Its scratch memory. Wanted: the gradients that are wanted, a Backward or a Sigmoid.
struct GradientLayout {
    i64 strip, blocks, width, tiles_each;
    Operands operands;
    float* image_panels;  // [strip, width] in panels: the strip of image times scale, for dT
    float* text_panels;   // [columns, width] in panels, for dI
    float* tiles;         // for each thread a tile of S and, with a teacher, one of S°
    float* ds;            // [blocks, strip, TILE_COLUMNS], if there are gradients, and room for what products read beyond them
    float* dots;          // [rows], of dI and I

    template <typename Wanted>
    GradientLayout(const Problem& p, const Wanted& wanted, bool gradients, Carver& carver)
        : strip(strip_rows(p, gradients)),
          blocks(divide_up(p.columns, TILE_COLUMNS)),
          width(round_up(p.width, NR)),
          tiles_each(p.has_teacher ? 2 : 1),
          operands(p, strip, carver) {
        image_panels = carver.floats(wanted.grad_text ? strip * width : 0);
        text_panels = carver.floats(wanted.grad_image ? p.columns * width : 0);
        tiles = carver.floats(p.threads * tiles_each * TILE);
        ds = carver.floats(gradients ? (blocks * strip + MR) * TILE_COLUMNS : 0);
        dots = carver.floats(wanted.grad_scale ? p.rows : 0);
    }

    float* own_tiles() const { return tiles + thread() * tiles_each * TILE; }
    float* ds_tile(i64 block, i64 row_in_strip) const { return ds + (block * strip + row_in_strip) * TILE_COLUMNS; }

  private:
    static i64 strip_rows(const Problem& p, bool gradients) {
        const i64 most = STRIP_TILES * TILE_ROWS;
        const i64 fit = STRIP_FLOATS / round_up(p.columns, TILE_COLUMNS) / TILE_ROWS * TILE_ROWS;
        return smaller(p.rows, gradients ? larger(TILE_ROWS, smaller(fit, most)) : most);
    }
};

// A tile of a strip: rows [row, row + rows), in the strip from row_in_strip on, and columns [column, column + columns), the
// block with this number.
struct TilePlace {
    i64 row, rows, row_in_strip, column, columns, block;
};

// What follows is called by every thread of a parallel region, but for what is of one block.

// text [columns, width] in panels, for dI.
inline void pack_text_panels(const Problem& p, float* panels) {
#pragma omp for schedule(static)
    for (i64 block = 0; block < divide_up(p.columns, TILE_COLUMNS); ++block) {
        const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
        pack_panels(p.text, column, columns, p.width, 1, panels, column, p.columns);
    }
}

// A share of the width of a gradient.
struct PanelGroup {
    i64 first, width;  // panel, columns
    PanelGroup(const Problem& p, i64 group)
        : first(group * PANEL_GROUP), width(smaller(PANEL_GROUP * NR, p.width - first * NR)) {}
    static i64 count(const Problem& p) { return divide_up(divide_up(p.width, NR), PANEL_GROUP); }
};

// dT of one block of columns, `width` of it from a panel on, = or += dSᵀ times the strip of scale * image.
inline void add_text_gradient(const Problem& p, const GradientLayout& layout, i64 block, i64 first, i64 width, i64 strip,
                              float* grad_text, bool add) {
    const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
    product(columns, width, strip, Columns<TILE_COLUMNS>{layout.ds_tile(block, 0)},
            {layout.image_panels + first * layout.strip * NR, layout.strip * NR, 0},
            grad_text + column * gradient_stride(p.width) + first * NR, gradient_stride(p.width), add);
}

// dI of a strip, without the factor scale.
inline void write_image_gradient(const Problem& p, const GradientLayout& layout, i64 start, i64 strip, float* grad_image) {
    const i64 stride = gradient_stride(p.width), panel_groups = PanelGroup::count(p), row_groups = divide_up(strip, ROW_GROUP);
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < row_groups * panel_groups; ++task) {
        const i64 row = task / panel_groups * ROW_GROUP, rows = smaller(ROW_GROUP, strip - row);
        const PanelGroup panels(p, task % panel_groups);
        float* to = grad_image + (start + row) * stride + panels.first * NR;
        for (i64 block = 0; block < layout.blocks; ++block) {
            const i64 column = block * TILE_COLUMNS, depth = smaller(TILE_COLUMNS, p.columns - column);
            product(rows, panels.width, depth, Rows{layout.ds_tile(block, row), TILE_COLUMNS},
                    {layout.text_panels + panels.first * p.columns * NR, p.columns * NR, column}, to, stride, block > 0);
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

// The whole pass. write_tile(place): leaves dS of a tile in layout.ds_tile, if there are gradients. Of the first `kept_rows`
// it needs no packed features.
template <typename Wanted, typename WriteTile>
inline void pass_over_strips(const Problem& p, const Wanted& wanted, const GradientLayout& layout, i64 kept_rows,
                             WriteTile write_tile) {
#pragma omp parallel num_threads(p.threads)
    {
        if (wanted.grad_image) pack_text_panels(p, layout.text_panels);
        for (i64 start = 0; start < p.rows; start += layout.strip) {
            const i64 strip = smaller(layout.strip, p.rows - start);
#pragma omp for schedule(static)
            for (i64 i = 0; i < RowGroup::in_strip(strip); ++i) {
                const RowGroup group(i, strip);
                const i64 row = start + group.row;
                if (row + group.count > kept_rows) layout.operands.pack_rows_of(p, start, group);
                if (wanted.grad_text)
                    pack_panels(p.image, row, group.count, p.width, p.scale, layout.image_panels, group.row, layout.strip);
            }
            const TileShares shares(strip, layout.blocks, p.threads);
            i64 packed = -1;  // the block whose columns this thread has packed
#pragma omp for schedule(dynamic, shares.chunk)
            for (i64 task = 0; task < shares.count; ++task) {
                const i64 block = task / shares.tiles, i = task % shares.tiles * TILE_ROWS;
                const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
                if (start + strip > kept_rows && block != packed) layout.operands.pack_columns_of(p, column, columns);
                packed = block;
                write_tile(TilePlace{start + i, smaller(TILE_ROWS, strip - i), i, column, columns, block});
                // While dS of the block is near.
                if (wanted.grad_text && shares.whole_blocks() && i + TILE_ROWS >= strip)
                    add_text_gradient(p, layout, block, 0, p.width, strip, wanted.grad_text, start > 0);
            }
            if (wanted.grad_text && !shares.whole_blocks()) {
#pragma omp for schedule(dynamic)
                for (i64 task = 0; task < layout.blocks * PanelGroup::count(p); ++task) {
                    const PanelGroup panels(p, task % PanelGroup::count(p));
                    add_text_gradient(p, layout, task / PanelGroup::count(p), panels.first, panels.width, strip,
                                      wanted.grad_text, start > 0);
                }
            }
            if (wanted.grad_image) {
                write_image_gradient(p, layout, start, strip, wanted.grad_image);
                scale_image_gradient(p, start, strip, wanted.grad_image, wanted.grad_scale ? layout.dots : nullptr);
            }
        }
    }
    if (wanted.grad_scale) {
        double total = 0;
        for (i64 i = 0; i < p.rows; ++i) total += static_cast<double>(layout.dots[i]);
        *wanted.grad_scale = total;
    }
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
