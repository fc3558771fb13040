// The backward pass: dS strip by strip, and the gradients from it.
#pragma once

#include "gradients.h"

namespace cliperase {
namespace CLIPERASE_ISA {

struct BackwardLayout {
    i64 strip, blocks, width;
    Operands operands;
    float* image_panels;  // [strip, width] in panels: the strip of image times scale, for dT
    float* text_panels;   // [columns, width] in panels, for dI
    float* tiles;         // for each thread a tile of S and one of S°
    float* ds;            // [blocks, strip, TILE_COLUMNS]
    float* dots;          // [rows], of dI and I
    std::size_t bytes;

    BackwardLayout(const Problem& p, const Backward& b, char* scratch) : BackwardLayout(p, b, Carver(scratch)) {}

    float* own_tiles() const { return tiles + thread() * 2 * TILE; }
    float* ds_tile(i64 block, i64 row_in_strip) const { return ds + (block * strip + row_in_strip) * TILE_COLUMNS; }

  private:
    static i64 strip_rows(const Problem& p) {
        const i64 fit = STRIP_FLOATS / round_up(p.columns, TILE_COLUMNS) / TILE_ROWS * TILE_ROWS;
        return smaller(p.rows, larger(TILE_ROWS, smaller(fit, STRIP_TILES * TILE_ROWS)));
    }
    BackwardLayout(const Problem& p, const Backward& b, Carver carver)
        : strip(strip_rows(p)),
          blocks(divide_up(p.columns, TILE_COLUMNS)),
          width(round_up(p.width, NR)),
          operands(p, strip, carver) {
        image_panels = carver.floats(b.grad_text ? strip * width : 0);
        text_panels = carver.floats(b.grad_image ? p.columns * width : 0);
        tiles = carver.floats(p.threads * 2 * TILE);
        ds = carver.floats(blocks * strip * TILE_COLUMNS);
        dots = carver.floats(b.grad_scale ? p.rows : 0);
        bytes = carver.used();
    }
};

// A softmax's terms for one tile.
inline TileSoftmax part_of(const Softmax& softmax, i64 row, i64 column) {
    return {softmax.row_anchor + row, softmax.row_factor + row, softmax.column_anchor + column,
            softmax.column_factor + column};
}

// The tile of one similarity in the backward pass: its entries, or their exponentials under a reference.
struct Source {
    const float* tile;
    bool exponentials, shared;
    float reference;
};

inline Source source_of(const float* tile, const TileSoftmax& softmax, i64 rows, i64 columns, bool exponentials,
                        float kept_reference) {
    if (exponentials) return {tile, true, true, kept_reference};
    const Reference c = shared_anchor(softmax, rows, columns);
    return {tile, false, c.shared, c.value};
}

template <bool MASKED>
inline void add_softmax(const Source& from, const TileSoftmax& softmax, i64 rows, i64 columns, Groups groups, float* ds,
                        bool add) {
    if (from.shared && (from.exponentials || !MASKED || within_reach(softmax, rows, columns, from.reference))) {
        Factors factors;
        factors.move(softmax, rows, columns, from.reference);
        if (from.exponentials)
            add_shared<true, MASKED>(from.tile, rows, from.reference, factors, groups, ds, add);
        else
            add_shared<false, MASKED>(from.tile, rows, from.reference, factors, groups, ds, add);
    } else {
        add_separate<MASKED>(from.tile, rows, columns, softmax, groups, ds, add);
    }
}

// dS of one tile.
inline void write_gradient(const Problem& p, const Backward& b, i64 row, i64 rows, i64 column, i64 columns, Groups groups,
                           float* student, float* teacher, const KeptTiles::Head* kept, float* ds) {
    const TileSoftmax terms = part_of(b.student, row, column);
    const Source from = source_of(student, terms, rows, columns, kept && kept->student_exponentials,
                                  kept ? kept->student_reference : 0);
    if (p.has_teacher) {
        const TileSoftmax teacher_terms = part_of(b.teacher, row, column);
        const Source other = source_of(teacher, teacher_terms, rows, columns, kept && kept->teacher_exponentials,
                                       kept ? kept->teacher_reference : 0);
        if (from.shared && other.shared && from.exponentials == other.exponentials) {
            Factors factors, teacher_factors;
            factors.move(terms, rows, columns, from.reference);
            teacher_factors.move(teacher_terms, rows, columns, other.reference);
            if (from.exponentials)
                write_both<true>(student, teacher, rows, 0, 0, factors, teacher_factors, ds);
            else
                write_both<false>(student, teacher, rows, from.reference, other.reference, factors, teacher_factors, ds);
        } else {
            add_softmax<false>(from, terms, rows, columns, groups, ds, false);
            add_softmax<false>(other, teacher_terms, rows, columns, groups, ds, true);
        }
        if (p.has_masked()) add_softmax<true>(from, part_of(b.masked, row, column), rows, columns, groups, ds, true);
    } else {
        add_softmax<false>(from, terms, rows, columns, groups, ds, false);
    }
    each_diagonal(p, row, rows, column, columns, [&](i64 i, i64 j) { ds[i * TILE_COLUMNS + j] = b.diagonal[row + i]; });
}

inline void backward(const Problem& p, const Backward& b, char* scratch) {
    const BackwardLayout layout(p, b, scratch);
    const KeptTiles kept(b.kept, p);

#pragma omp parallel num_threads(p.threads)
    {
        if (b.grad_image) pack_text_panels(p, layout.text_panels);
        for (i64 start = 0; start < p.rows; start += layout.strip) {
            const i64 strip = smaller(layout.strip, p.rows - start);
#pragma omp for schedule(static)
            for (i64 i = 0; i < strip; i += MR) {
                const i64 count = smaller(MR, strip - i);
                if (start + i + count > b.kept_rows) layout.operands.pack_rows_of(p, start, start + i, count);
                if (b.grad_text)
                    pack_panels(p.image, start + i, count, p.width, p.scale, layout.image_panels, i, layout.strip);
            }

#pragma omp for schedule(dynamic)
            for (i64 block = 0; block < layout.blocks; ++block) {
                const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
                std::int32_t own_groups[TILE_COLUMNS];
                if (start + strip > b.kept_rows) layout.operands.pack_columns_of(p, column, columns);
                for (i64 i = 0; i < strip; i += TILE_ROWS) {
                    const i64 row = start + i, rows = smaller(TILE_ROWS, strip - i);
                    const Groups groups = block_groups(p, row, column, columns, own_groups);
                    const Groups excluded = p.excludes() ? groups : Groups{nullptr, nullptr};
                    float *student = layout.own_tiles(), *teacher = student + TILE;
                    const KeptTiles::Head* head = nullptr;
                    if (row < b.kept_rows) {
                        float* tiles = kept.at(row / TILE_ROWS, block);
                        head = reinterpret_cast<const KeptTiles::Head*>(tiles);
                        student = tiles + KeptTiles::HEAD;
                        teacher = student + TILE;
                    } else {
                        layout.operands.student_tile(p, i, rows, columns, student);
                        leave_out(p, row, rows, column, columns, excluded, student);
                        if (p.has_teacher) {
                            layout.operands.teacher_tile(p, i, rows, columns, teacher);
                            leave_out(p, row, rows, column, columns, {nullptr, nullptr}, teacher);
                        }
                    }
                    write_gradient(p, b, row, rows, column, columns, groups, student, teacher, head, layout.ds_tile(block, i));
                }
                if (b.grad_text) add_text_gradient(p, layout, block, strip, b.grad_text, start > 0);
            }
            if (b.grad_image) write_image_gradient(p, layout, start, strip, b.grad_image);
            if (b.grad_image) scale_image_gradient(p, start, strip, b.grad_image, b.grad_scale ? layout.dots : nullptr);
        }
    }
    if (b.grad_scale) {
        double total = 0;
        for (i64 i = 0; i < p.rows; ++i) total += static_cast<double>(layout.dots[i]);
        *b.grad_scale = total;
    }
}

inline std::size_t backward_scratch(const Problem& p, const Backward& b) { return BackwardLayout(p, b, nullptr).bytes; }

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
