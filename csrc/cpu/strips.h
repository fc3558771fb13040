// What the two passes over the tiles share: how memory is laid out, what a strip and a block need, which entries are left
// out of all sums.
//
// Both passes go strip by strip, and threads take tiles of it. What is found of a tile's rows and columns is a part by itself;
// the parts are merged, block after block and tile after tile, when the strip is done, and every entry of dT and dI is summed
// by one thread. That makes the results the same bits for any number of threads.
#pragma once

#include <type_traits>

#include "packing.h"
#include "tile.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace cliperase {
namespace CLIPERASE_ISA {

constexpr i64 STRIP_TILES = 4;               // of a forward strip
constexpr i64 STRIP_FLOATS = 4 << 20;        // of a backward strip of dS
constexpr i64 ROW_GROUP = 48, PANEL_GROUP = W == 16 ? 3 : 8;  // a thread's share of dI: rows, and panels of its width
constexpr i64 ALIGNED = 16;                  // floats

inline i64 divide_up(i64 value, i64 by) { return (value + by - 1) / by; }

// Hands out consecutive parts of the scratch memory; with a null base it only counts.
class Carver {
  public:
    explicit Carver(char* base) : base_(base) {}
    float* floats(i64 count) {
        const i64 at = used_;
        used_ += round_up(count, ALIGNED) * static_cast<i64>(sizeof(float));
        return base_ ? reinterpret_cast<float*>(base_ + at) : nullptr;
    }
    std::size_t used() const { return static_cast<std::size_t>(used_); }

  private:
    char* base_;
    i64 used_ = 0;
};

inline int thread() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Where the tiles that the forward pass keeps lie: a head and one or two tiles for each (row tile, column block).
struct KeptTiles {
    struct Head {
        float student_reference, teacher_reference;
        std::int32_t student_exponentials, teacher_exponentials;  // else the entries themselves
    };
    static constexpr i64 HEAD = KEPT_TILE_HEAD;
    static_assert(sizeof(Head) <= HEAD * sizeof(float));
    char* data;
    i64 blocks, tiles;

    KeptTiles(const void* kept, const Problem& p)
        : data(static_cast<char*>(const_cast<void*>(kept))),
          blocks(divide_up(p.columns, TILE_COLUMNS)),
          tiles(p.has_teacher ? 2 : 1) {}
    i64 floats_each() const { return HEAD + tiles * TILE; }
    float* at(i64 row_tile, i64 block) const {
        return reinterpret_cast<float*>(data) + (row_tile * blocks + block) * floats_each();
    }
};

// Row `i` of a tile that starts at column `column` has its diagonal entry at this column of the tile, if within it.
inline i64 diagonal_column(const Problem& p, i64 row, i64 column) { return p.first + row - column; }

template <typename Visit>
inline void each_diagonal(const Problem& p, i64 row, i64 rows, i64 column, i64 columns, Visit visit) {
    const i64 begin = larger(i64{0}, column - p.first - row), end = smaller(rows, column + columns - p.first - row);
    for (i64 i = begin; i < end; ++i) visit(i, diagonal_column(p, row + i, column));
}

// Entries that are left out of all sums: the diagonal, what lies beyond the columns and, if EXCLUDES, equal groups.
inline void leave_out(const Problem& p, i64 row, i64 rows, i64 column, i64 columns, Groups groups, float* tile) {
    each_diagonal(p, row, rows, column, columns, [&](i64 i, i64 j) { tile[i * TILE_COLUMNS + j] = LOWEST; });
    if (columns < TILE_COLUMNS)
        for (i64 i = 0; i < rows; ++i)
            for (i64 j = columns; j < TILE_COLUMNS; ++j) tile[i * TILE_COLUMNS + j] = LOWEST;
    if (groups.rows == nullptr) return;
    for (i64 i = 0; i < rows; ++i)
        for (i64 j = 0; j < TILE_COLUMNS; j += W) {
            float* at = tile + i * TILE_COLUMNS + j;
            const Ints same = load(groups.columns + j) == groups.rows[i];
            store(at, same ? all(LOWEST) : load(at));
        }
}

// An entry of scale * left rightᵀ, summed in double in eight parts: a chain of single additions would take longer than all
// else that is done to a row of dI.
template <typename L, typename R, bool PLAIN>
inline double dot(const L* left, i64 left_stride, const R* right, i64 right_stride, i64 width) {
    constexpr i64 PARTS = 8;
    const i64 a = PLAIN ? 1 : left_stride, b = PLAIN ? 1 : right_stride;
    double part[PARTS] = {};
    i64 k = 0;
    for (; k + PARTS <= width; k += PARTS)
        for (i64 lane = 0; lane < PARTS; ++lane)
            part[lane] += static_cast<double>(to_float(left[(k + lane) * a])) * static_cast<double>(to_float(right[(k + lane) * b]));
    for (; k < width; ++k) part[k % PARTS] += static_cast<double>(to_float(left[k * a])) * static_cast<double>(to_float(right[k * b]));
    return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

inline double entry(const Matrix& left, const Matrix& right, i64 width, float scale, i64 i, i64 j) {
    double found = 0;
    with_dtype(left.dtype, [&](auto* left_type) {
        with_dtype(right.dtype, [&](auto* right_type) {
            using L = std::remove_pointer_t<decltype(left_type)>;
            using R = std::remove_pointer_t<decltype(right_type)>;
            const L* l = static_cast<const L*>(left.data) + i * left.row;
            const R* r = static_cast<const R*>(right.data) + j * right.row;
            found = left.column == 1 && right.column == 1 ? dot<L, R, true>(l, 1, r, 1, width)
                                                          : dot<L, R, false>(l, left.column, r, right.column, width);
        });
    });
    return static_cast<double>(scale) * found;
}

// The groups of MR rows that a strip is packed in; a tile's last one has what is left of the tile. count < 1: none of them are
// in the strip.
constexpr i64 TILE_GROUPS = (TILE_ROWS + MR - 1) / MR;

struct RowGroup {
    i64 index, row, count;
    RowGroup(i64 group, i64 strip)
        : index(group),
          row(group / TILE_GROUPS * TILE_ROWS + group % TILE_GROUPS * MR),
          count(smaller(smaller(MR, TILE_ROWS - group % TILE_GROUPS * MR), strip - row)) {}
    static i64 in_strip(i64 strip) { return divide_up(strip, TILE_ROWS) * TILE_GROUPS; }
};

// The tiles of a strip, one block of columns after the other, as threads share them: whole blocks, whose columns are then packed
// once, or less where that would leave a thread without work.
struct TileShares {
    i64 tiles, count, chunk;  // in a block, in all, at a time

    TileShares(i64 strip, i64 blocks, int threads)
        : tiles(divide_up(strip, TILE_ROWS)),
          count(blocks * tiles),
          chunk(smaller(tiles, larger(i64{1}, count / (2 * threads)))) {}
    bool whole_blocks() const { return chunk == tiles; }
};

// What both passes need of a strip of rows and of a block of columns.
struct Operands {
    float *image, *teacher_image;  // for each tile of the strip TILE_GROUPS of its rows, times the scale
    float *text, *teacher_text;    // panels [width, TILE_COLUMNS] for each thread
    i64 text_floats, teacher_text_floats;

    Operands(const Problem& p, i64 strip, Carver& carver) {
        const i64 teacher_width = p.has_teacher ? p.teacher_width : 0;
        const i64 groups = RowGroup::in_strip(strip);
        image = carver.floats(groups * MR * p.width);
        teacher_image = carver.floats(groups * MR * teacher_width);
        text_floats = p.width * round_up(TILE_COLUMNS, NR);
        teacher_text_floats = teacher_width * round_up(TILE_COLUMNS, NR);
        text = carver.floats(p.threads * text_floats);
        teacher_text = carver.floats(p.threads * teacher_text_floats);
    }
    float* own_text() const { return text + thread() * text_floats; }
    float* own_teacher_text() const { return teacher_text + thread() * teacher_text_floats; }

    void pack_rows_of(const Problem& p, i64 strip_start, const RowGroup& group) const {
        if (group.count < 1) return;
        const i64 row = strip_start + group.row;
        pack_group(p.image, row, group.count, p.width, p.scale, image + group.index * MR * p.width);
        if (p.has_teacher)
            pack_group(p.teacher_image, row, group.count, p.teacher_width, p.teacher_scale,
                       teacher_image + group.index * MR * p.teacher_width);
    }
    void pack_columns_of(const Problem& p, i64 column, i64 columns) const {
        pack_transposed(p.text, column, columns, p.width, own_text());
        if (p.has_teacher) pack_transposed(p.teacher_text, column, columns, p.teacher_width, own_teacher_text());
    }
    // A tile of S: rows of the strip from `row` on.
    void student_tile(const Problem& p, i64 row, i64 rows, i64 columns, float* out) const {
        product(rows, columns, p.width, groups_at(image, row, p.width), {own_text(), p.width * NR, 0}, out, TILE_COLUMNS, false);
    }
    void teacher_tile(const Problem& p, i64 row, i64 rows, i64 columns, float* out) const {
        product(rows, columns, p.teacher_width, groups_at(teacher_image, row, p.teacher_width),
                {own_teacher_text(), p.teacher_width * NR, 0}, out, TILE_COLUMNS, false);
    }

  private:
    static RowGroups groups_at(const float* packed, i64 row, i64 width) {
        return {packed + row / TILE_ROWS * TILE_GROUPS * MR * width, MR * width};
    }
};

// The column groups of a block, a whole tile wide; `own` is the thread's room for the last block, which is narrower.
inline Groups block_groups(const Problem& p, i64 row, i64 column, i64 columns, std::int32_t* own) {
    if (p.row_groups == nullptr) return {nullptr, nullptr};
    if (columns == TILE_COLUMNS) return {p.row_groups + row, p.column_groups + column};
    for (i64 j = 0; j < TILE_COLUMNS; ++j) own[j] = j < columns ? p.column_groups[column + j] : 0;
    return {p.row_groups + row, own};
}

// Where the sums of one kind are in the scratch memory, and their first plane in the results.
struct PlaneSet {
    int reference, total, gap, result;  // gap -1: none
    bool used;
};

constexpr int SCRATCH_PLANES = 7;
constexpr PlaneSet STUDENT{0, 1, -1, 0, true};

inline PlaneSet masked_planes(const Problem& p) { return {2, 3, -1, 2, p.has_masked()}; }
inline PlaneSet teacher_planes(const Problem& p) { return {4, 5, 6, p.has_masked() ? 4 : 2, p.has_teacher}; }

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
