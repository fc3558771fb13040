// The similarity sweep on CPUs. S = scale * image textᵀ [rows, columns]; the pair of row i is column first + i, and that
// entry, the diagonal, stays out of all sums; first = columns: the rows' pairs are not among the columns. Everything is plain
// C++: pointers, sizes, strides.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cliperase {

enum class Dtype : int { float32, bfloat16, float16 };  // of features

struct Matrix {
    const void* data;
    std::int64_t row, column;  // strides, in elements
    Dtype dtype;
};

struct Problem {
    std::int64_t rows, columns, first;
    std::int64_t width;
    Matrix image, text;  // [rows, width], [columns, width]
    float scale;
    bool has_teacher;
    std::int64_t teacher_width;
    Matrix teacher_image, teacher_text;  // [rows, teacher_width], [columns, teacher_width]
    float teacher_scale;
    // Ids, or null. Pairs of equal id leave the student's sums; with a teacher they leave sums of their own, "masked".
    const std::int32_t* row_groups;     // [rows]
    const std::int32_t* column_groups;  // [columns]
    int threads;

    bool paired() const { return first < columns; }
    bool excludes() const { return row_groups != nullptr && !has_teacher; }
    bool has_masked() const { return row_groups != nullptr && has_teacher; }
};

// The sums of a row or column, as far as there are any: the student's reference, near its largest entry, and the total of
// exp(entry - reference); the same masked; of the teacher reference, total and gap, the sum of
// exp(S° - reference) (S° - S - shift). A row without entries has reference -FLT_MAX and total 1.
inline int planes(const Problem& p) { return 2 + 2 * p.has_masked() + 3 * p.has_teacher; }

struct Forward {
    float* diagonal;          // [rows], of S; unused without pairs, like the next
    float* teacher_diagonal;  // [rows], of S°
    float* row_sums;          // [planes, rows]
    float* column_sums;       // [planes, columns]
    float* shift;             // one, any constant near S° - S: the gap of the first row and column; 0 without a teacher
    void* kept;             // tiles for the backward pass, `kept_bytes` of them
    std::int64_t kept_rows;  // the first rows; a whole number of tiles, or all
};

// w P_ij = exp(S_ij - anchor) * factor, summed over the softmax of the row and that of the column; null: not there.
struct Softmax {
    const float *row_anchor, *column_anchor, *row_factor, *column_factor;
};

struct Backward {
    Softmax student, masked, teacher;
    const float* diagonal;  // [rows], dS there; unused without pairs
    const void* kept;
    std::int64_t kept_rows;
    // Each may be null where it is not needed. Rows of `gradient_stride` floats, the width rounded up to 16.
    float* grad_image;  // [rows, width]
    float* grad_text;   // [columns, width]
    double* grad_scale;
};

// The sigmoid loss: with X = S + bias and Y = X, but -X at the pairs, the sum of log(1 + exp(Y)) and its gradients. Neither a
// teacher nor groups.
struct Sigmoid {
    float bias;
    double* loss;
    // As those of Backward.
    float *grad_image, *grad_text;
    double *grad_scale, *grad_bias;

    bool gradients() const { return grad_image != nullptr || grad_text != nullptr || grad_bias != nullptr; }
};

// What a forward pass keeps is, for each tile of this size, a head and a tile of S and, with a teacher, one of S°.
constexpr std::int64_t KEPT_TILE_ROWS = 256, KEPT_TILE_COLUMNS = 128, KEPT_TILE_HEAD = 16;  // in elements of 4 bytes

// Bytes that are kept of each KEPT_TILE_ROWS rows.
inline std::int64_t kept_row_bytes(const Problem& p) {
    const std::int64_t blocks = (p.columns + KEPT_TILE_COLUMNS - 1) / KEPT_TILE_COLUMNS;
    return 4 * blocks * (KEPT_TILE_HEAD + (1 + p.has_teacher) * KEPT_TILE_ROWS * KEPT_TILE_COLUMNS);
}

std::int64_t gradient_stride(std::int64_t width);

// One instruction set's code. Scratch: as many bytes as the function beside says, aligned to 64.
struct Engine {
    const char* name;
    std::size_t (*forward_scratch)(const Problem&);
    void (*forward)(const Problem&, const Forward&, char* scratch);
    std::size_t (*backward_scratch)(const Problem&, const Backward&);
    void (*backward)(const Problem&, const Backward&, char* scratch);
    std::size_t (*sigmoid_scratch)(const Problem&, const Sigmoid&);
    void (*sigmoid)(const Problem&, const Sigmoid&, char* scratch);
};

extern const Engine portable_engine;
#if defined(CLIPERASE_X86)
extern const Engine avx2_engine;
extern const Engine avx512_engine;
#endif

// The widest this processor runs, or the one named; null when that is unknown or does not run here.
const Engine* choose_engine(const char* name);

}  // namespace cliperase
