// Shared by the two passes over the tiles: memory layout, operands of a strip and a block, and excluded entries.
//
// Both passes process one strip at a time, whose tiles the threads share. The statistics of a tile's rows and columns
// are stored as a part. When the strip is done, the parts are merged in a fixed order, and every entry of dT and dI is
// summed by one thread. The results are therefore bitwise equal for any number of threads.
#pragma once

#include <type_traits>

#include "float_environment.h"
#include "packing.h"
#include "tile.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace cliperase {
namespace CLIPERASE_ISA {

constexpr i64 STRIP_TILES = 4;                                // of a forward strip
constexpr i64 STRIP_FLOATS = 4 << 20;                         // of a backward strip of dS
#if defined(CLIPERASE_AMX)
constexpr i64 ROW_GROUP = 128, PANEL_GROUP = 4;  // a thread's share of dI: rows, and panels of its width
#else
constexpr i64 ROW_GROUP = 48, PANEL_GROUP = W == 16 ? 3 : 8;
#endif
constexpr i64 ALIGNED = 16;                                   // floats

inline i64 divide_up(i64 value, i64 by) { return (value + by - 1) / by; }

// Hands out consecutive parts of the scratch memory. With a null base it only counts.
class BumpAllocator {
  public:
    explicit BumpAllocator(char* base) : base_(base) {}
    float* floats(i64 count) {
        const i64 at = used_;
        used_ += round_up(count, ALIGNED) * static_cast<i64>(sizeof(float));
        return base_ ? reinterpret_cast<float*>(base_ + at) : nullptr;
    }
    Step* packed(i64 count) { return reinterpret_cast<Step*>(floats(count)); }
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

// The tiles that the forward pass caches: a header and one or two tiles for each (row tile, column block).
struct TileCache {
    struct Header {
        float student_reference, teacher_reference;
        std::int32_t student_exponentials, teacher_exponentials;  // otherwise the entries themselves
    };
    static constexpr i64 HEADER = CACHE_TILE_HEADER;
    static_assert(sizeof(Header) <= HEADER * sizeof(float));
    char* data;
    i64 blocks, tiles;

    TileCache(const void* cache, const SimilarityInputs& in)
        : data(static_cast<char*>(const_cast<void*>(cache))),
          blocks(column_tiles(in).tiles),
          tiles(in.has_teacher ? 2 : 1) {}
    // What is kept of a tile.
    struct Tile {
        Header* head;
        float *student, *teacher;
    };
    Tile at(i64 row_tile, i64 block) const {
        float* const first = reinterpret_cast<float*>(data) + (row_tile * blocks + block) * (HEADER + tiles * TILE);
        return {reinterpret_cast<Header*>(first), first + HEADER, first + HEADER + TILE};
    }
};

// The column, within a tile that starts at `column`, of the pair of `row`; may be outside of the tile.
inline i64 diagonal_column(const SimilarityInputs& in, i64 row, i64 column) { return in.pair_offset + row - column; }

template <typename Visit>
inline void for_each_pair(const SimilarityInputs& in, i64 row, i64 rows, i64 column, i64 columns, Visit visit) {
    const i64 begin = larger(i64{0}, column - in.pair_offset - row),
              end = smaller(rows, column + columns - in.pair_offset - row);
    for (i64 i = begin; i < end; ++i) visit(i, diagonal_column(in, row + i, column));
}

// Excludes entries from all statistics: pairs, those beyond the last column and, where given, those of equal groups.
inline void exclude(const SimilarityInputs& in, i64 row, i64 rows, i64 column, i64 columns, Groups groups,
                    float* tile) {
    for_each_pair(in, row, rows, column, columns, [&](i64 i, i64 j) { tile[i * TILE_COLUMNS + j] = LOWEST; });
    const i64 width = round_up(columns, W);
    for (i64 i = 0; columns < width && i < rows; ++i)
        for (i64 j = columns; j < width; ++j) tile[i * TILE_COLUMNS + j] = LOWEST;
    if (groups.rows == nullptr) return;
    for (i64 i = 0; i < rows; ++i)
        for (i64 j = 0; j < width; j += W) {
            float* at = tile + i * TILE_COLUMNS + j;
            const Ints same = load(groups.columns + j) == groups.rows[i];
            store(at, same ? all(LOWEST) : load(at));
        }
}

using Doubles = double __attribute__((vector_size(8 * W)));

inline Floats floats_at(const float* from) { return load(from); }
inline Floats floats_at(const Bfloat16* from) {
    std::uint16_t __attribute__((vector_size(2 * W))) bits;
    std::memcpy(&bits, from, sizeof bits);
    const Ints high = __builtin_convertvector(bits, Ints) << 16;
    Floats out;
    std::memcpy(&out, &high, sizeof out);
    return out;
}
inline Floats floats_at(const Float16* from) {
    Floats out;
    for (int lane = 0; lane < W; ++lane) out[lane] = to_float(from[lane]);
    return out;
}

// An entry of left rightᵀ, summed in double in W parts: one chain of additions would take longer than the rest of the
// work on a row of dI.
template <typename L, typename R, bool PLAIN>
inline double dot(const L* left, i64 left_stride, const R* right, i64 right_stride, i64 width) {
    Doubles parts{};
    i64 k = 0;
    if constexpr (PLAIN)
        for (; k + W <= width; k += W)
            parts += __builtin_convertvector(floats_at(left + k), Doubles) *
                     __builtin_convertvector(floats_at(right + k), Doubles);
    const i64 a = PLAIN ? 1 : left_stride, b = PLAIN ? 1 : right_stride;
    for (; k < width; ++k)
        parts[k % W] += static_cast<double>(to_float(left[k * a])) * static_cast<double>(to_float(right[k * b]));
    for (int half = W / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    return parts[0];
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

// The first step of a tile where all items in steps, tile by tile, are the depth of a product; `start`: its first item.
// No step has items of two tiles, and the tiles into which one is cut may have more steps than it.
inline i64 first_step(const Tiling& tiling, i64 start) {
    if (start < tiling.cut) return start / PER_STEP;
    if (start == tiling.cut) return steps(start);
    const i64 before = tiling.cut % tiling.size;
    return start / PER_STEP + steps(before) + steps(tiling.size - before) - steps(tiling.size);
}
inline i64 total_steps(const Tiling& tiling) {
    const i64 last = tiling.tiles - 1;
    return first_step(tiling, tiling.start(last)) + steps(tiling.length(last));
}

// The rows [start, start + rows) of a strip, and its tiles, from `first_tile` of all on.
struct Strip {
    Tiling all;
    i64 start, rows, first_tile, tiles;

    Strip(const Tiling& tiling, i64 from, i64 most)
        : all(tiling),
          start(from),
          rows(smaller(most, tiling.count - from)),
          first_tile(tiling.at(from)),
          tiles(tiling.at(from + rows) - first_tile) {}
    // The first row of a tile, counted from the start of the strip.
    i64 row_of(i64 tile) const { return all.start(first_tile + tile) - start; }
    // The first step of a tile, counted likewise.
    i64 step_of(i64 tile) const { return first_step(all, start + row_of(tile)) - first_step(all, start); }
    i64 steps() const { return step_of(tiles - 1) + CLIPERASE_ISA::steps(all.length(first_tile + tiles - 1)); }
};

// A tile of a strip: rows [row, row + rows), at row_in_strip and step_in_strip of the strip, and columns
// [column, column + columns). tile: its number in the strip; row_tile: among all tiles of rows; block: among all tiles
// of columns; width: columns rounded up to whole vectors; column_step: the first step of the columns.
struct TilePlace {
    i64 tile, row_tile, row_in_strip, step_in_strip, row, rows, block, column, columns, width, column_step;

    TilePlace(const Strip& strip, i64 tile_in_strip, const Tiling& blocks, i64 block_of_columns)
        : tile(tile_in_strip),
          row_tile(strip.first_tile + tile),
          row_in_strip(strip.row_of(tile)),
          step_in_strip(strip.step_of(tile)),
          row(strip.start + row_in_strip),
          rows(strip.all.length(row_tile)),
          block(block_of_columns),
          column(blocks.start(block)),
          columns(blocks.length(block)),
          width(round_up(columns, W)),
          column_step(first_step(blocks, column)) {}
};

// A strip is packed in groups of MR rows; the last group of a tile may be smaller. count < 1: the group is beyond the
// tile.
constexpr i64 TILE_GROUPS = (TILE_ROWS + MR - 1) / MR;
static_assert(MR % PER_STEP == 0);

struct RowGroup {
    i64 index, row, step, count;  // row, step: in the strip
    RowGroup(i64 group, const Strip& strip)
        : index(group),
          row(strip.row_of(group / TILE_GROUPS) + group % TILE_GROUPS * MR),
          step(strip.step_of(group / TILE_GROUPS) + group % TILE_GROUPS * MR / PER_STEP),
          count(smaller(MR, strip.row_of(group / TILE_GROUPS + 1) - row)) {}
    static i64 count_of(i64 tiles) { return tiles * TILE_GROUPS; }
};

// How threads share the tiles of a strip, in order of column blocks: a whole block at a time, whose columns are then
// packed once, or less where that would leave a thread without work.
struct TileShares {
    i64 tiles, count, chunk;  // in a block, in total, taken at a time

    TileShares(const Strip& strip, i64 blocks, int threads)
        : tiles(strip.tiles),
          count(blocks * tiles),
          chunk(smaller(tiles, larger(i64{1}, count / (2 * threads)))) {}
    bool whole_blocks() const { return chunk == tiles; }
};

// The most tiles of a strip of so many rows.
inline i64 tiles_of_strip(const SimilarityInputs& in, i64 strip) {
    return divide_up(strip, TILE_ROWS) + (row_tiles(in).cut < in.rows);
}

// The packed features of a strip of rows and of a block of columns.
struct Operands {
    Step *image, *teacher_image;  // TILE_GROUPS groups of rows for each tile of the strip
    Step *text, *teacher_text;    // panels [width, TILE_COLUMNS] for each thread
    i64 width, teacher_width;     // in steps

    Operands(const SimilarityInputs& in, i64 strip, BumpAllocator& allocator) {
        const i64 groups = RowGroup::count_of(tiles_of_strip(in, strip));
        width = steps(in.width), teacher_width = in.has_teacher ? steps(in.teacher_width) : 0;
        image = allocator.packed(groups * MR * width);
        teacher_image = allocator.packed(groups * MR * teacher_width);
        text = allocator.packed(in.threads * width * TEXT_COLUMNS);
        teacher_text = allocator.packed(in.threads * teacher_width * TEXT_COLUMNS);
    }
    Step* own_text() const { return text + thread() * width * TEXT_COLUMNS; }
    Step* own_teacher_text() const { return teacher_text + thread() * teacher_width * TEXT_COLUMNS; }

    void pack_rows_of(const SimilarityInputs& in, i64 strip_start, const RowGroup& group) const {
        if (group.count < 1) return;
        const i64 row = strip_start + group.row;
        pack_group(in.image, row, group.count, in.width, packed_factor(in.scale), image + group.index * MR * width);
        if (in.has_teacher)
            pack_group(in.teacher_image, row, group.count, in.teacher_width, packed_factor(in.teacher_scale),
                       teacher_image + group.index * MR * teacher_width);
    }
    void pack_columns_of(const SimilarityInputs& in, i64 column, i64 columns) const {
        pack_transposed(in.text, column, columns, in.width, own_text());
        if (in.has_teacher) pack_transposed(in.teacher_text, column, columns, in.teacher_width, own_teacher_text());
    }
    // A tile of S.
    void student_tile(const SimilarityInputs& in, const TilePlace& at, float* out) const {
        product(at.rows, at.columns, width, groups_of(image, at.tile, width), {own_text(), width * NR, 0}, out,
                TILE_COLUMNS, product_factor(in.scale), false);
    }
    void teacher_tile(const SimilarityInputs& in, const TilePlace& at, float* out) const {
        product(at.rows, at.columns, teacher_width, groups_of(teacher_image, at.tile, teacher_width),
                {own_teacher_text(), teacher_width * NR, 0}, out, TILE_COLUMNS, product_factor(in.teacher_scale),
                false);
    }

  private:
    static constexpr i64 TEXT_COLUMNS = (TILE_COLUMNS + NR - 1) / NR * NR;
    static RowGroups groups_of(Step* packed, i64 tile, i64 depth) {
        return {packed + tile * TILE_GROUPS * MR * depth, MR * depth};
    }
};

// The groups of a tile, padded to TILE_COLUMNS columns in `own` where the block is narrower.
inline Groups block_groups(const SimilarityInputs& in, const TilePlace& at, std::int32_t* own) {
    if (in.row_groups == nullptr) return {nullptr, nullptr};
    if (at.columns == TILE_COLUMNS) return {in.row_groups + at.row, in.column_groups + at.column};
    for (i64 j = 0; j < TILE_COLUMNS; ++j) own[j] = j < at.columns ? in.column_groups[at.column + j] : 0;
    return {in.row_groups + at.row, own};
}

// The indices of the statistics of one softmax in the scratch memory, and of the first one in the results.
struct StatSet {
    int reference, total, gap, result;  // gap -1: none
    bool used;
};

constexpr int SCRATCH_STATS = 7;
constexpr StatSet STUDENT_SET{0, 1, -1, 0, true};

inline StatSet masked_set(const SimilarityInputs& in) { return {2, 3, -1, 2, in.has_masked()}; }
inline StatSet teacher_set(const SimilarityInputs& in) { return {4, 5, 6, in.has_masked() ? 4 : 2, in.has_teacher}; }

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
