// A pass that forms dS, for either loss, by strips and tiles, and the gradients from it.
#pragma once

#include "strips.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// Its scratch memory. Wanted: a Backward or a Sigmoid, with the gradients that are wanted.
struct GradientLayout {
    i64 strip, blocks, width, tiles_each;
    Operands operands;
    float* image_panels;  // [strip, width] in panels: the strip of image times scale, for dT
    float* text_panels;   // [columns, width] in panels, for dI
    float* tiles;         // for each thread a tile of S and, with a teacher, one of S°
    float* ds;    // [blocks, strip, TILE_COLUMNS] if there are gradients, and MR rows that products read beyond it
    float* dots;  // [rows], <dI_i, I_i>

    template <typename Wanted>
    GradientLayout(const SimilarityInputs& in, const Wanted& wanted, bool gradients, BumpAllocator& allocator)
        : strip(strip_rows(in, gradients)),
          blocks(column_tiles(in).tiles),
          width(round_up(in.width, NR)),
          tiles_each(in.has_teacher ? 2 : 1),
          operands(in, strip, allocator) {
        image_panels = allocator.floats(wanted.grad_text ? strip * width : 0);
        text_panels = allocator.floats(wanted.grad_image ? in.columns * width : 0);
        tiles = allocator.floats(in.threads * tiles_each * TILE);
        ds = allocator.floats(gradients ? (blocks * strip + MR) * TILE_COLUMNS : 0);
        dots = allocator.floats(wanted.grad_scale ? in.rows : 0);
    }

    float* own_tiles() const { return tiles + thread() * tiles_each * TILE; }
    float* ds_tile(i64 block, i64 row_in_strip) const { return ds + (block * strip + row_in_strip) * TILE_COLUMNS; }

  private:
    static i64 strip_rows(const SimilarityInputs& in, bool gradients) {
        const i64 most = STRIP_TILES * TILE_ROWS;
        const i64 fit = STRIP_FLOATS / (column_tiles(in).tiles * TILE_COLUMNS) / TILE_ROWS * TILE_ROWS;
        return smaller(in.rows, gradients ? larger(TILE_ROWS, smaller(fit, most)) : most);
    }
};

// Every thread of a parallel region calls the functions below, except those for one block.

// Packs text [columns, width] in panels, for dI.
inline void pack_text_panels(const SimilarityInputs& in, float* panels) {
    const Tiling blocks = column_tiles(in);
#pragma omp for schedule(static)
    for (i64 block = 0; block < blocks.tiles; ++block)
        pack_panels(in.text, blocks.start(block), blocks.length(block), in.width, 1, panels, blocks.start(block),
                    in.columns);
}

// A share of the width of a gradient.
struct PanelGroup {
    i64 first, width;  // panel, columns
    PanelGroup(const SimilarityInputs& in, i64 group)
        : first(group * PANEL_GROUP), width(smaller(PANEL_GROUP * NR, in.width - first * NR)) {}
    static i64 count(const SimilarityInputs& in) { return divide_up(divide_up(in.width, NR), PANEL_GROUP); }
};

// dT of one block of columns, `width` columns from panel `first` on, = or += dSᵀ times the strip of scale * image.
inline void add_text_gradient(const SimilarityInputs& in, const GradientLayout& layout, i64 block, i64 first, i64 width,
                              i64 strip, float* grad_text, bool add) {
    const i64 column = column_tiles(in).start(block), columns = column_tiles(in).length(block);
    product(columns, width, strip, Columns<TILE_COLUMNS>{layout.ds_tile(block, 0)},
            {layout.image_panels + first * layout.strip * NR, layout.strip * NR, 0},
            grad_text + column * gradient_stride(in.width) + first * NR, gradient_stride(in.width), add);
}

// Writes dI of a strip, without the factor scale.
inline void write_image_gradient(const SimilarityInputs& in, const GradientLayout& layout, i64 start, i64 strip,
                                 float* grad_image) {
    const i64 stride = gradient_stride(in.width), panel_groups = PanelGroup::count(in),
              row_groups = divide_up(strip, ROW_GROUP);
    const Tiling blocks = column_tiles(in);
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < row_groups * panel_groups; ++task) {
        const i64 row = task / panel_groups * ROW_GROUP, rows = smaller(ROW_GROUP, strip - row);
        const PanelGroup panels(in, task % panel_groups);
        float* to = grad_image + (start + row) * stride + panels.first * NR;
        for (i64 block = 0; block < blocks.tiles; ++block)
            product(rows, panels.width, blocks.length(block), Rows{layout.ds_tile(block, row), TILE_COLUMNS},
                    {layout.text_panels + panels.first * in.columns * NR, in.columns * NR, blocks.start(block)}, to,
                    stride, block > 0);
    }
}

// Multiplies dI of a strip by scale. Before that, as scale may be 0, writes <dI_i, I_i> of each row to `dots`, unless
// null, for the gradient of scale.
inline void scale_image_gradient(const SimilarityInputs& in, i64 start, i64 strip, float* grad_image, float* dots) {
    const i64 stride = gradient_stride(in.width);
#pragma omp for schedule(static)
    for (i64 i = start; i < start + strip; ++i) {
        float* gradient = grad_image + i * stride;
        if (dots)
            dots[i] = static_cast<float>(entry({grad_image, stride, 1, Dtype::float32}, in.image, in.width, 1, i, i));
        for (i64 k = 0; k < in.width; ++k) gradient[k] *= in.scale;
    }
}

// Runs the whole pass. write_tile(place) writes dS of a tile to layout.ds_tile, if there are gradients; for the first
// `cached_rows` it needs no packed features.
template <typename Wanted, typename WriteTile>
inline void pass_over_strips(const SimilarityInputs& in, const Wanted& wanted, const GradientLayout& layout,
                             i64 cached_rows, WriteTile write_tile) {
    const Tiling rows = row_tiles(in), blocks = column_tiles(in);
#pragma omp parallel num_threads(in.threads)
    {
        if (wanted.grad_image) pack_text_panels(in, layout.text_panels);
        for (i64 start = 0; start < in.rows; start += layout.strip) {
            const Strip strip(rows, start, layout.strip);
#pragma omp for schedule(static)
            for (i64 i = 0; i < RowGroup::count_of(strip.tiles); ++i) {
                const RowGroup group(i, strip);
                const i64 row = start + group.row;
                if (row + group.count > cached_rows) layout.operands.pack_rows_of(in, start, group);
                if (wanted.grad_text)
                    pack_panels(in.image, row, group.count, in.width, in.scale, layout.image_panels, group.row,
                                layout.strip);
            }
            const TileShares shares(strip, blocks.tiles, in.threads);
            i64 packed = -1;  // the block whose columns this thread has packed
#pragma omp for schedule(dynamic, shares.chunk)
            for (i64 task = 0; task < shares.count; ++task) {
                const TilePlace at(strip, task % shares.tiles, blocks, task / shares.tiles);
                if (start + strip.rows > cached_rows && at.block != packed)
                    layout.operands.pack_columns_of(in, at.column, at.columns);
                packed = at.block;
                write_tile(at);
                // While dS of the block is in the cache.
                if (wanted.grad_text && shares.whole_blocks() && at.tile == shares.tiles - 1)
                    add_text_gradient(in, layout, at.block, 0, in.width, strip.rows, wanted.grad_text, start > 0);
            }
            if (wanted.grad_text && !shares.whole_blocks()) {
#pragma omp for schedule(dynamic)
                for (i64 task = 0; task < blocks.tiles * PanelGroup::count(in); ++task) {
                    const PanelGroup panels(in, task % PanelGroup::count(in));
                    add_text_gradient(in, layout, task / PanelGroup::count(in), panels.first, panels.width,
                                      strip.rows, wanted.grad_text, start > 0);
                }
            }
            if (wanted.grad_image) {
                write_image_gradient(in, layout, start, strip.rows, wanted.grad_image);
                scale_image_gradient(in, start, strip.rows, wanted.grad_image,
                                     wanted.grad_scale ? layout.dots : nullptr);
            }
        }
    }
    if (wanted.grad_scale) {
        double total = 0;
        for (i64 i = 0; i < in.rows; ++i) total += static_cast<double>(layout.dots[i]);
        *wanted.grad_scale = total;
    }
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
