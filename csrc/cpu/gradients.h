// A pass that forms dS, for either loss, by strips and tiles, and the gradients from it.
#pragma once

#include "gradient_strip.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// The float32 sums of a gradient: in the result itself if it is float32 and its rows fill whole vectors, otherwise in
// scratch memory for `rows` rows, from which each finished row is written to the result once.
struct GradientSums {
    i64 stride;  // from row to row
    bool in_place;
    float* data;

    GradientSums(const Gradient& result, i64 rows, i64 width, BumpAllocator& allocator)
        : stride(round_up(width, ALIGNED)), in_place(result.dtype == Dtype::float32 && width == stride) {
        float* const scratch = allocator.floats(result && !in_place ? rows * stride : 0);
        data = in_place ? static_cast<float*>(result.data) : scratch;
    }
    // The sums of a strip that starts at `row`, where scratch memory is for one strip.
    float* of_strip(i64 row) const { return in_place ? data + row * stride : data; }

    // Writes columns [first, first + count) of a row of the result [., width], unless the sums are there already.
    void write(const float* sums, const Gradient& result, i64 width, i64 row, i64 first, i64 count) const {
        if (in_place) return;
        with_dtype(result.dtype, [&](auto* type) {
            auto* to = static_cast<decltype(type)>(result.data) + row * width + first;
            for (i64 k = 0; k < count; ++k) round_to(to[k], sums[k]);
        });
    }
};

// Its scratch memory. Wanted: a Backward or a Sigmoid, with the gradients that are wanted.
struct GradientLayout {
    i64 strip, strip_steps, blocks, column_steps, width, tiles_each;
    Operands operands;
    GradientStrip ds;         // empty without gradients
    GradientSums image_sums;  // of a strip
    GradientSums text_sums;   // of all columns
    Step* image_panels;       // [strip, width] in panels: the strip of image, for dT
    Step* text_panels;        // [columns, width] in panels, for dI
    float* tiles;             // for each thread a tile of S and, with a teacher, one of S°
    float* dots;              // [rows], <dI_i, I_i>

    template <typename Wanted>
    GradientLayout(const SimilarityInputs& in, const Wanted& wanted, bool gradients, BumpAllocator& allocator)
        : strip(strip_rows(in, gradients)),
          strip_steps(steps(strip) + EXTRA_STEPS),
          blocks(column_tiles(in).tiles),
          column_steps(total_steps(column_tiles(in))),
          width(round_up(in.width, NR)),
          tiles_each(in.has_teacher ? 2 : 1),
          operands(in, strip, allocator),
          ds(gradients ? blocks : 0, strip, column_steps, in.threads, allocator),
          image_sums(wanted.grad_image, strip, in.width, allocator),
          text_sums(wanted.grad_text, in.columns, in.width, allocator) {
        image_panels = allocator.packed(wanted.grad_text ? strip_steps * width : 0);
        text_panels = allocator.packed(wanted.grad_image ? column_steps * width : 0);
        tiles = allocator.floats(in.threads * tiles_each * TILE);
        dots = allocator.floats(wanted.grad_scale ? in.rows : 0);
    }

    float* own_tiles() const { return tiles + thread() * tiles_each * TILE; }

  private:
    static i64 strip_rows(const SimilarityInputs& in, bool gradients) {
        const i64 most = STRIP_TILES * TILE_ROWS;
        const i64 fit = STRIP_FLOATS / (column_tiles(in).tiles * TILE_COLUMNS) / TILE_ROWS * TILE_ROWS;
        return smaller(in.rows, gradients ? larger(TILE_ROWS, smaller(fit, most)) : most);
    }
};

// Whether dS is rounded for the products. dS of the pairs, the diagonal, is then 0 in the strip: it would cost most of
// the precision, as it is about as large as the rest of its row. It is added to the gradients in float32 instead.
constexpr bool ROUNDS_DS = PER_STEP > 1;

// to [count] += factor * columns [first, first + count) of row i of m.
inline void add_row(const Matrix& m, i64 i, i64 first, i64 count, float factor, float* to) {
    with_feature_dtype(m.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* from = static_cast<const T*>(m.data) + i * m.row + first * m.column;
        for (i64 k = 0; k < count; ++k) to[k] += factor * to_float(from[k * m.column]);
    });
}

// Every thread of a parallel region calls the functions below, except those for one block.

// Packs text [columns, width] in panels, for dI.
inline void pack_text_panels(const SimilarityInputs& in, const GradientLayout& layout) {
    const Tiling blocks = column_tiles(in);
#pragma omp for schedule(static)
    for (i64 block = 0; block < blocks.tiles; ++block)
        pack_panels(in.text, blocks.start(block), blocks.length(block), in.width, 1, layout.text_panels,
                    first_step(blocks, blocks.start(block)), layout.column_steps);
}

// A share of the width of a gradient.
struct PanelGroup {
    i64 first, width;  // panel, columns
    PanelGroup(const SimilarityInputs& in, i64 group)
        : first(group * PANEL_GROUP), width(smaller(PANEL_GROUP * NR, in.width - first * NR)) {}
    static i64 count(const SimilarityInputs& in) { return divide_up(divide_up(in.width, NR), PANEL_GROUP); }
};

// dT of one block of columns, `width` columns from panel `first` on, = or += scale * dSᵀ times the strip of image. With
// the last strip, adds the share of the pairs, from their dS in `diagonal` [rows], unless null, and writes the result.
inline void add_text_gradient(const SimilarityInputs& in, const GradientLayout& layout, i64 block, i64 first, i64 width,
                              const Strip& strip, const float* diagonal, const Gradient& grad_text) {
    const i64 begin = column_tiles(in).start(block), columns = column_tiles(in).length(block);
    const i64 stride = layout.text_sums.stride;
    float* const sums = layout.text_sums.data + begin * stride + first * NR;
    product(columns, width, strip.steps(), layout.ds.columns(block),
            {layout.image_panels + first * layout.strip_steps * NR, layout.strip_steps * NR, 0}, sums, stride,
            product_factor(in.scale), strip.start > 0);
    if (strip.start + strip.rows < in.rows) return;
    for (i64 j = 0; j < columns; ++j) {
        const i64 pair = begin + j - in.pair_offset;
        if (diagonal && 0 <= pair && pair < in.rows)
            add_row(in.image, pair, first * NR, width, in.scale * diagonal[pair], sums + j * stride);
        layout.text_sums.write(sums + j * stride, grad_text, in.width, begin + j, first * NR, width);
    }
}

// Forms dI of a strip, without the factor scale.
inline void sum_image_gradient(const SimilarityInputs& in, const GradientLayout& layout, i64 start, i64 strip) {
    const i64 stride = layout.image_sums.stride, panel_groups = PanelGroup::count(in),
              row_groups = divide_up(strip, ROW_GROUP);
    const Tiling blocks = column_tiles(in);
#pragma omp for schedule(dynamic)
    for (i64 task = 0; task < row_groups * panel_groups; ++task) {
        const i64 row = task / panel_groups * ROW_GROUP, rows = smaller(ROW_GROUP, strip - row);
        const PanelGroup panels(in, task % panel_groups);
        float* to = layout.image_sums.of_strip(start) + row * stride + panels.first * NR;
        for_each_depth(layout.ds, blocks, row, [&](auto left, i64 first, i64 depth) {
            product(rows, panels.width, depth, left,
                    {layout.text_panels + panels.first * layout.column_steps * NR, layout.column_steps * NR, first}, to,
                    stride, 1, first > 0);
        });
    }
}

// Adds the share of the pairs to dI of a strip likewise, multiplies it by scale and writes the result. Before the
// product, as scale may be 0, writes <dI_i, I_i> of each row to `dots`, unless null, for the gradient of scale.
inline void finish_image_gradient(const SimilarityInputs& in, const GradientLayout& layout, i64 start, i64 strip,
                                  const float* diagonal, const Gradient& grad_image, float* dots) {
    const i64 stride = layout.image_sums.stride;
    float* const sums = layout.image_sums.of_strip(start);
#pragma omp for schedule(static)
    for (i64 i = start; i < start + strip; ++i) {
        float* gradient = sums + (i - start) * stride;
        const i64 pair = diagonal_column(in, i, 0);
        if (diagonal && 0 <= pair && pair < in.columns) add_row(in.text, pair, 0, in.width, diagonal[i], gradient);
        if (dots)
            dots[i] =
                static_cast<float>(entry({sums, stride, 1, Dtype::float32}, in.image, in.width, 1, i - start, i));
        for (i64 k = 0; k < in.width; ++k) gradient[k] *= in.scale;
        layout.image_sums.write(gradient, grad_image, in.width, i, 0, in.width);
    }
}

// Runs the whole pass. write_tile(place) writes dS of a tile to layout.ds, if there are gradients; for the first
// `cached_rows` it needs no packed features. diagonal: dS of the pairs [rows] if write_tile leaves it out, else null.
template <typename Wanted, typename WriteTile>
inline void pass_over_strips(const SimilarityInputs& in, const Wanted& wanted, const GradientLayout& layout,
                             i64 cached_rows, const float* diagonal, WriteTile write_tile) {
    const Tiling rows = row_tiles(in), blocks = column_tiles(in);
    const FloatEnvironment callers;
#pragma omp parallel num_threads(in.threads)
    {
        const SharedFloatEnvironment environment(callers);
        const ProductRegisters registers;
        if (wanted.grad_image) pack_text_panels(in, layout);
        for (i64 start = 0; start < in.rows; start += layout.strip) {
            const Strip strip(rows, start, layout.strip);
#pragma omp for schedule(static)
            for (i64 i = 0; i < RowGroup::count_of(strip.tiles); ++i) {
                const RowGroup group(i, strip);
                const i64 row = start + group.row;
                if (row + group.count > cached_rows) layout.operands.pack_rows_of(in, start, group);
                if (wanted.grad_text)
                    pack_panels(in.image, row, group.count, in.width, packed_factor(in.scale), layout.image_panels,
                                group.step, layout.strip_steps);
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
                    add_text_gradient(in, layout, at.block, 0, in.width, strip, diagonal, wanted.grad_text);
            }
            if (wanted.grad_text && !shares.whole_blocks()) {
#pragma omp for schedule(dynamic)
                for (i64 task = 0; task < blocks.tiles * PanelGroup::count(in); ++task) {
                    const PanelGroup panels(in, task % PanelGroup::count(in));
                    add_text_gradient(in, layout, task / PanelGroup::count(in), panels.first, panels.width, strip,
                                      diagonal, wanted.grad_text);
                }
            }
            if (wanted.grad_image) {
                sum_image_gradient(in, layout, start, strip.rows);
                finish_image_gradient(in, layout, start, strip.rows, diagonal, wanted.grad_image,
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
