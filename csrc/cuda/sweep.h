// The similarity sweep on GPUs, without its matrix products: those are made by the caller, a block of S (and S°) at a time.
// Device addresses in, everything asynchronous on the caller's stream; nothing is allocated here and nothing waits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cliperase::cuda {

// A block of the products I Tᵀ, and of the teacher's, in float32 and still without their scales. Rows begin at multiples of
// 16 bytes; entries between `columns` and `leading` are never used.
struct Block {
    const float* student;  // [rows, leading]
    const float* teacher;  // likewise, or null
    std::int64_t rows, columns, leading;
    std::int64_t diagonal;  // row i has its pair in column i + diagonal, where that is one of the block's
    const float* scalars;   // s, s° and the shift of the gaps
    // Ids of the rows and columns, or null. Pairs of equal id leave the masked sums.
    const std::int64_t *row_groups, *column_groups;

    bool masked() const { return row_groups != nullptr; }
    bool plain() const { return teacher != nullptr || !masked(); }
};

// Softmaxes of a block: of S, of S without the masked pairs, of S°.
inline int kinds(const Block& block) { return int(block.plain()) + int(block.masked()) + int(block.teacher != nullptr); }
inline int planes(const Block& block) { return 2 * kinds(block) + int(block.teacher != nullptr); }

// Sums off the diagonal of rows or columns, planes of `stride` floats: (maximum, total of exp(entry - maximum)) of S where
// the block is plain, the same of S without the masked pairs where it is masked, and of S° with a third, the total of
// exp(S° - maximum) (S° - S - shift). Maxima and gaps are in units of log 2.
struct Sums {
    float* data;
    std::int64_t stride;
    bool fresh;  // holds nothing yet: it is written, not merged into
};

struct Forward {
    Sums rows, columns;
    float *diagonal, *teacher_diagonal;  // [rows], written where the block has the entry; natural units
    float* workspace;
    std::int64_t workspace_size;  // in floats, at least `forward_workspace`
};

std::int64_t forward_workspace(const Block& block);
void forward(const Block& block, const Forward& forward, std::uintptr_t stream);

enum class Format : int { float32, bfloat16, float16 };

// Weighted softmaxes w P = exp(entry - anchor) factor of the rows and of the columns: planes (anchor, factor) of S, of S
// without the masked pairs, of S°, as far as the block has them; anchors in natural units.
struct Backward {
    const float *row_terms, *column_terms;
    std::int64_t row_stride, column_stride;  // floats from plane to plane
    const float* diagonal;                   // [rows], dS there
    void* gradient;                          // dS, [rows, gradient_leading]; rows begin at multiples of 4 entries
    std::int64_t gradient_leading;
    Format format;
};

void backward(const Block& block, const Backward& backward, std::uintptr_t stream);

}  // namespace cliperase::cuda
