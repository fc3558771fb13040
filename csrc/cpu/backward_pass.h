// The backward pass: dS, one strip at a time, and the gradients from it.
#pragma once

#include "comparison.h"
#include "gradients.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// The terms of a softmax for one tile.
inline TileSoftmax part_of(const Softmax& softmax, i64 row, i64 column) {
    return {softmax.row_anchor + row, softmax.row_factor + row, softmax.column_anchor + column,
            softmax.column_factor + column};
}

// A tile of S or S° in the backward pass: its entries, or their exponentials relative to a reference.
struct Source {
    const float* tile;
    bool exponentials, shared;
    float reference;
};

inline Source source_of(const float* tile, const TileSoftmax& softmax, i64 rows, i64 columns, bool exponentials,
                        float cached_reference) {
    if (exponentials) return {tile, true, true, cached_reference};
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
            add_shared<true, MASKED>(from.tile, rows, round_up(columns, W), from.reference, factors, groups, ds, add);
        else
            add_shared<false, MASKED>(from.tile, rows, round_up(columns, W), from.reference, factors, groups, ds, add);
    } else {
        add_separate<MASKED>(from.tile, rows, columns, softmax, groups, ds, add);
    }
}

// Writes dS of one tile.
inline void write_gradient(const SimilarityInputs& in, const Backward& b, const TilePlace& at, Groups groups,
                           float* student, float* teacher, const TileCache::Header* head, const TileSums& dots,
                           float* ds) {
    const i64 row = at.row, rows = at.rows, column = at.column, columns = at.columns, width = at.width;
    const bool retained = in.has_masked() && is_retained(in, at), masked = retained && in.row_groups != nullptr;
    const TileSoftmax terms = part_of(retained && !masked ? b.retained : b.student, row, column);
    const Source from = source_of(student, terms, rows, columns, head && head->student_exponentials,
                                  head ? head->student_reference : 0);
    if (in.has_teacher) {
        const TileSoftmax teacher_terms = part_of(b.teacher, row, column);
        const Source other = source_of(teacher, teacher_terms, rows, columns, head && head->teacher_exponentials,
                                       head ? head->teacher_reference : 0);
        if (from.shared && other.shared && from.exponentials == other.exponentials) {
            Factors factors, teacher_factors;
            factors.move(terms, rows, columns, from.reference);
            teacher_factors.move(teacher_terms, rows, columns, other.reference);
            if (from.exponentials)
                write_both<true>(student, teacher, rows, width, 0, 0, factors, teacher_factors, ds);
            else
                write_both<false>(student, teacher, rows, width, from.reference, other.reference, factors,
                                  teacher_factors, ds);
        } else {
            add_softmax<false>(from, terms, rows, columns, groups, ds, false);
            add_softmax<false>(other, teacher_terms, rows, columns, groups, ds, true);
        }
        if (masked) add_softmax<true>(from, part_of(b.masked, row, column), rows, columns, groups, ds, true);
    } else {
        add_softmax<false>(from, terms, rows, columns, groups, ds, false);
    }
    if (in.comparison.wanted) {
        const TileEdit edit(in.comparison, at);
        const auto add = edit.edits() ? add_pull<true> : add_pull<false>;
        *dots.of(at) =
            add(student, teacher, rows, width, Difference(in), edit, b.pull_forget, b.pull_anchor, ds);
    }
    for_each_pair(in, row, rows, column, columns,
                  [&](i64 i, i64 j) { ds[i * TILE_COLUMNS + j] = ROUNDS_DS ? 0 : b.diagonal[row + i]; });
}

inline void backward(const SimilarityInputs& in, const Backward& b, char* scratch) {
    BumpAllocator allocator(scratch);
    const GradientLayout layout(in, b, true, allocator);
    const TileSums dots(in, 1, allocator);
    const TileCache cache(b.cache, in);
    const float* const apart = ROUNDS_DS && in.paired() ? b.diagonal : nullptr;
    pass_over_strips(in, b, layout, b.cached_rows, apart, [&](const TilePlace& at) {
        std::int32_t own_groups[TILE_COLUMNS];
        const Groups groups = block_groups(in, at, own_groups);
        const Groups excluded = in.excludes() ? groups : Groups{nullptr, nullptr};
        float *student = layout.own_tiles(), *teacher = student + TILE;
        const TileCache::Header* head = nullptr;
        if (at.row < b.cached_rows) {
            const TileCache::Tile kept = cache.at(at.row_tile, at.block);
            head = kept.head, student = kept.student, teacher = kept.teacher;
        } else {
            layout.operands.student_tile(in, at, student);
            exclude(in, at.row, at.rows, at.column, at.columns, excluded, student);
            if (in.has_teacher) {
                layout.operands.teacher_tile(in, at, teacher);
                const TileEdit edit(in.comparison, at);
                if (edit.edits()) edit_teacher(edit, at.rows, at.width, in.teacher_scale, teacher);
                exclude(in, at.row, at.rows, at.column, at.columns, {nullptr, nullptr}, teacher);
            }
        }
        write_gradient(in, b, at, groups, student, teacher, head, dots, layout.ds.tile(at));
        layout.ds.finish(at);
    });
    if (b.similarity_dot != nullptr) *b.similarity_dot = dots.total(0);
}

inline std::size_t backward_scratch(const SimilarityInputs& in, const Backward& b) {
    BumpAllocator allocator(nullptr);
    const GradientLayout layout(in, b, true, allocator);
    const TileSums dots(in, 1, allocator);
    return allocator.used();
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
