// The similarity sweep on GPUs, without its matrix products, which the caller computes one block of S (and S°) at a
// time. Takes device addresses. Everything is asynchronous on the caller's stream; nothing is allocated, and nothing
// waits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "buffer.h"

namespace cliperase::cuda {

// What the calibrated loss adds to a block with a teacher: it compares cosines, C and C*, which are the products of
// student and teacher, those of the teacher edited: entries with row_ids[i] == column_ids[j] become row_levels[i] +
// column_levels[j]. The ids and levels are null where no entry is edited. A block is not edited and masked at once.
struct Comparison {
    bool wanted;
    const std::int64_t *row_ids, *column_ids;
    const float *row_levels, *column_levels;

    bool edits() const { return row_ids != nullptr; }
};

// A block of the products I Tᵀ, and of the teacher's, in float32, before they are scaled. Rows begin at multiples of 16
// bytes; entries between `columns` and `leading` are not used.
struct Block {
    const float* student;  // [rows, leading]
    const float* teacher;  // [rows, leading], or null
    std::int64_t rows, columns, leading;
    std::int64_t pair_offset;  // row i and column i + pair_offset are a pair, where the block has that column
    const float* scalars;      // s, s° and the shift of the gaps
    // Group ids of the rows and columns, or null. Entries of equal ids are excluded from the masked statistics.
    const std::int64_t *row_groups, *column_groups;
    Comparison comparison;

    bool masked() const { return row_groups != nullptr; }
    bool plain() const { return teacher != nullptr || !masked(); }
};

// The number of softmaxes of a block: of S, of S masked, of S°.
inline int kinds(const Block& block) {
    return int(block.plain()) + int(block.masked()) + int(block.teacher != nullptr);
}
inline int stat_count(const Block& block) { return 2 * kinds(block) + int(block.teacher != nullptr); }

// Statistics of the entries of rows or columns, without those of pairs; each is `stride` floats after the previous one.
// Of S, where the block is plain, and of S masked, where it is masked: the maximum and the total of exp(entry -
// maximum). Of S°, the same and the gap, the total of exp(S° - maximum) (S° - S - shift). Maxima and gaps are in units
// of log 2.
struct Stats {
    float* data;
    std::int64_t stride;
    bool fresh;  // uninitialised: written, not merged into
};

struct Forward {
    Stats rows, columns;
    float *diagonal, *teacher_diagonal;  // [rows], written where the block has the pair; natural units
    float* workspace;
    std::int64_t workspace_size;  // in floats, at least `forward_workspace`
    // With a comparison [2, forward_programs]: parts of the sum of max(C - C*, 0)² over edited entries, and of the sum
    // of (C - C*)² over the others. Entries of pairs are not in the sums.
    float* squares = nullptr;
};

std::int64_t forward_workspace(const Block& block);
std::int64_t forward_programs(const Block& block);  // blocks of threads
void forward(const Block& block, const Forward& forward, std::uintptr_t stream);

// Weighted softmaxes w P = exp(entry - anchor) * factor of the rows and of the columns: (anchor, factor) of S, of S
// masked, of S°, where the block has them. Anchors are in natural units.
struct Backward {
    const float *row_terms, *column_terms;
    std::int64_t row_stride, column_stride;  // floats from one anchor or factor array to the next
    const float* diagonal;                   // [rows], dS of the pairs
    void* gradient;                          // dS, [rows, gradient_leading]; rows begin at multiples of 4 entries
    std::int64_t gradient_leading;
    Dtype dtype;  // of `gradient`
    // With a comparison: the factors by which max(C - C*, 0) of edited entries and C - C* of the others are added to
    // dS, except for pairs [2]; and parts of the sum of dS S, before that and without pairs [backward_programs].
    const float* pull = nullptr;
    float* dots = nullptr;
};

std::int64_t backward_programs(const Block& block);
void backward(const Block& block, const Backward& backward, std::uintptr_t stream);

}  // namespace cliperase::cuda
