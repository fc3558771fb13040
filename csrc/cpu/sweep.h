// The similarity sweep on CPUs, in plain C++: pointers, sizes and strides.
//
// S = scale * image textᵀ, [rows, columns]. Row i and column i + pair_offset are a pair. The entries of pairs, the
// diagonal, are excluded from all statistics. pair_offset = columns: the columns hold no row's pair.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "buffer.h"

namespace cliperase {

struct Matrix {
    const void* data;
    std::int64_t row, column;  // strides, in elements
    Dtype dtype;               // float16, bfloat16 or float32
};

// What the calibrated loss adds to a sweep with a teacher: it compares cosines, C = S / scale and
// C* = S° / teacher_scale, where S° is edited first: entries with row_ids[i] == column_ids[j] become
// teacher_scale (row_level + column_level). The ids and levels are null where no entry is edited. Neither scale is 0.
struct Comparison {
    bool wanted = false;
    const std::int32_t *row_ids = nullptr, *column_ids = nullptr;
    const float *row_levels = nullptr, *column_levels = nullptr;
    // A joint batch: rows and columns are the same pairs, of which [forget_begin, forget_end), at the beginning or the
    // end, are to forget and the others to retain. Only columns to forget are edited; without ids all their entries in
    // rows to forget. The student's masked statistics are those of the pairs to retain alone.
    bool joint = false;
    std::int64_t forget_begin = 0, forget_end = 0;

    bool forgets(std::int64_t pair) const { return forget_begin <= pair && pair < forget_end; }
    std::int64_t cut() const { return forget_begin > 0 ? forget_begin : forget_end; }  // between the kinds
};

struct SimilarityInputs {
    std::int64_t rows, columns, pair_offset;
    std::int64_t width;
    Matrix image, text;  // [rows, width], [columns, width]
    float scale;
    bool has_teacher;
    std::int64_t teacher_width;
    Matrix teacher_image, teacher_text;  // [rows, teacher_width], [columns, teacher_width]
    float teacher_scale;
    // Group ids, or null. Without a teacher, entries of equal ids are excluded from the student's statistics. With a
    // teacher, they are excluded from separate "masked" statistics of the student.
    const std::int32_t* row_groups;     // [rows]
    const std::int32_t* column_groups;  // [columns]
    int threads;
    Comparison comparison;

    bool paired() const { return pair_offset < columns; }
    bool all_bfloat16() const {
        const auto both = [](const Matrix& a, const Matrix& b) {
            return a.dtype == Dtype::bfloat16 && b.dtype == Dtype::bfloat16;
        };
        return both(image, text) && (!has_teacher || both(teacher_image, teacher_text));
    }
    bool excludes() const { return row_groups != nullptr && !has_teacher; }
    bool has_masked() const { return (row_groups != nullptr || comparison.joint) && has_teacher; }
};

// The number of statistics of a row or column, in this order and where present: of the student, its reference (near the
// largest entry) and the total of exp(entry - reference); the same, masked; of the teacher, reference, total and gap,
// the sum of exp(S° - reference) (S° - S - shift). A row without entries has reference -FLT_MAX and total 1.
inline int stat_count(const SimilarityInputs& in) { return 2 + 2 * in.has_masked() + 3 * in.has_teacher; }

struct Forward {
    float* diagonal;          // [rows], of S; unused without pairs
    float* teacher_diagonal;  // [rows], of S°; unused without pairs
    float* row_stats;         // [stat_count, rows]
    float* column_stats;      // [stat_count, columns]
    float* shift;  // [], S° - S of an entry: any constant near S° - S would do; 0 without a teacher
    void* cache;   // tiles for the backward pass
    std::int64_t cached_rows;  // the first rows, whose tiles are cached: whole tiles
    // With a comparison [2]: the sum of max(C - C*, 0)² over edited entries, and of (C - C*)² over the others.
    double* squares = nullptr;
};

// A weighted softmax: w P_ij = exp(S_ij - anchor) * factor, summed over the softmax of the row and that of the column;
// null: absent.
struct Softmax {
    const float *row_anchor, *column_anchor, *row_factor, *column_factor;
};

// Where a gradient [rows, width] is written, contiguous; null: not needed. It is summed in float32 and rounded once, to
// nearest even.
struct Gradient {
    void* data;
    Dtype dtype;  // one of FEATURE_DTYPES
    Gradient(float* to = nullptr) : Gradient(to, Dtype::float32) {}
    Gradient(void* to, Dtype of) : data(to), dtype(of) {}
    explicit operator bool() const { return data != nullptr; }
};

struct Backward {
    Softmax student, masked, teacher;
    Softmax retained;  // of a joint batch without groups: student and masked in one, for tiles of pairs to retain
    const float* diagonal;  // [rows], dS of the pairs; unused without pairs
    const void* cache;
    std::int64_t cached_rows;
    Gradient grad_image, grad_text;
    double* grad_scale;  // null where not needed
    // With a comparison: the factors of max(C - C*, 0) and of C - C*, which are added to dS where it is edited and
    // elsewhere, and the sum of dS S without them, null where not needed. `diagonal` contains them already.
    float pull_forget = 0, pull_anchor = 0;
    double* similarity_dot = nullptr;
};

// The sigmoid loss: the sum of log(1 + exp(Y)) and its gradients, where Y = S + bias, negated for pairs. Takes neither
// a teacher nor groups.
struct Sigmoid {
    float bias;
    double* loss;
    Gradient grad_image, grad_text;
    double *grad_scale, *grad_bias;

    bool gradients() const { return grad_image || grad_text || grad_bias != nullptr; }
};

// Each throws std::invalid_argument, with the name of the argument, for what would make a sweep read or write out of
// bounds.
void check(const SimilarityInputs& inputs);
void check(const SimilarityInputs& inputs, const Forward& forward);
void check(const SimilarityInputs& inputs, const Backward& backward);
void check(const SimilarityInputs& inputs, const Sigmoid& sigmoid);

// The cache holds, for each tile of this size, a header, the tile of S and, with a teacher, that of S°.
constexpr std::int64_t CACHE_TILE_ROWS = 256, CACHE_TILE_COLUMNS = 128,
                       CACHE_TILE_HEADER = 16;  // in elements of 4 bytes

// The tiles of rows or of columns, `size` long or shorter. The tile with `cut` inside is cut in two, so that no tile of
// a joint batch has pairs of both kinds.
struct Tiling {
    std::int64_t count, size, cut, tiles;

    Tiling(std::int64_t items, std::int64_t tile, std::int64_t cut_at)
        : count(items),
          size(tile),
          cut(cut_at % tile != 0 && cut_at < items ? cut_at : items),
          tiles((items + tile - 1) / tile + (cut < items)) {}
    // The first item of a tile.
    std::int64_t start(std::int64_t tile) const {
        const std::int64_t at = tile <= cut / size ? tile * size : std::max(cut, (tile - 1) * size);
        return std::min(at, count);
    }
    std::int64_t length(std::int64_t tile) const { return start(tile + 1) - start(tile); }
    // The tile that starts at `item`, a multiple of `size`, or the number of tiles for all items.
    std::int64_t at(std::int64_t item) const { return (item + size - 1) / size + (item > cut); }
};

inline Tiling row_tiles(const SimilarityInputs& in) { return {in.rows, CACHE_TILE_ROWS, in.comparison.cut()}; }
inline Tiling column_tiles(const SimilarityInputs& in) {
    return {in.columns, CACHE_TILE_COLUMNS, in.comparison.cut()};
}

// Bytes of the cache for each tile of rows.
inline std::int64_t cache_row_bytes(const SimilarityInputs& in) {
    const std::int64_t tile = CACHE_TILE_HEADER + (1 + in.has_teacher) * CACHE_TILE_ROWS * CACHE_TILE_COLUMNS;
    return 4 * column_tiles(in).tiles * tile;
}

// The kernels compiled for one instruction set. Scratch memory: the bytes that the function above returns, aligned to
// 64.
struct IsaKernels {
    const char* name;
    std::size_t (*forward_scratch)(const SimilarityInputs&);
    void (*forward)(const SimilarityInputs&, const Forward&, char* scratch);
    std::size_t (*backward_scratch)(const SimilarityInputs&, const Backward&);
    void (*backward)(const SimilarityInputs&, const Backward&, char* scratch);
    std::size_t (*sigmoid_scratch)(const SimilarityInputs&, const Sigmoid&);
    void (*sigmoid)(const SimilarityInputs&, const Sigmoid&, char* scratch);
    // Of kernels that take only bfloat16 features: those that take any in their place. Null: these do.
    const IsaKernels* for_any_dtype = nullptr;

    const IsaKernels& taking(const SimilarityInputs& in) const {
        return for_any_dtype == nullptr || in.all_bfloat16() ? *this : *for_any_dtype;
    }
};

extern const IsaKernels portable_kernels;
extern const IsaKernels amx_emulated_kernels;  // for tests, slow
#if defined(CLIPERASE_X86)
extern const IsaKernels avx2_kernels;
extern const IsaKernels avx512_kernels;
extern const IsaKernels avx512_bf16_kernels;  // with CLIPERASE_AVX512_BF16, where the compiler knows the instructions
extern const IsaKernels amx_kernels;           // with CLIPERASE_AMX_BF16, likewise
#endif

// The kernels of the widest instruction set that this processor runs, or of the named one; null where it is unknown or
// does not run here. Emulated ones are chosen by name only.
const IsaKernels* choose_kernels(const char* name);

}  // namespace cliperase
