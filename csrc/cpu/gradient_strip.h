// dS of a strip, as the products read it: by rows for dI, and by columns for dT.
#pragma once

#include "strips.h"

namespace cliperase {
namespace CLIPERASE_ISA {

#if defined(CLIPERASE_AMX)

// As below. All blocks are one depth for dI.
class GradientStrip {
  public:
    GradientStrip(i64 blocks, i64 strip, i64 column_steps, int threads, BumpAllocator& allocator)
        : columns_(blocks == 0 ? 0 : column_steps), steps_(steps(strip) + EXTRA_STEPS) {
        by_row_ = allocator.packed(round_up(strip, MR) * columns_);
        by_column_ = allocator.packed(blocks * TILE_COLUMNS * steps_);
        tiles_ = allocator.floats(threads * TILE);
    }

    float* tile(const TilePlace&) const { return tiles_ + thread() * TILE; }

    void finish(const TilePlace& at) const {
        const RowGroups by_row = rows(0), by_column = columns(at.block);
        for (i64 i = 0; i < at.rows; i += 2 * AMX) {
            const float* tile = tiles_ + thread() * TILE + i * TILE_COLUMNS;
            const i64 count = smaller(2 * AMX, at.rows - i);
            Step* to_row[2 * AMX] = {};
            for (i64 r = 0; r < count; ++r) to_row[r] = by_row.at(at.row_in_strip + i + r, at.column_step);
            for (i64 j = 0; j < round_up(at.columns, 2 * AMX); j += W) {
                const i64 in_row = j / (2 * AMX) * AMX * MR + j % (2 * AMX) / 2;
                const auto row = [&](i64 r) {
                    if (r >= count) return Halves{};
                    const Halves found = j < at.width ? rounded(load(tile + r * TILE_COLUMNS + j)) : Halves{};
                    std::memcpy(to_row[r] + in_row, &found, sizeof found);
                    return found;
                };
                Ints both[W];
                for (i64 s = 0; s < W; ++s) {
                    const Halves first = row(2 * s);
                    both[s] = pairs_of(first, row(2 * s + 1));
                }
                transpose(both);
                Step* const to_column = by_column.at(j, at.step_in_strip + i / 2);
                for (i64 r = 0; r < W; ++r) std::memcpy(to_column + r * AMX, &both[r], sizeof both[r]);
            }
        }
    }

    RowGroups rows(i64 row_in_strip) const {
        return {by_row_ + row_in_strip * columns_, MR * columns_};
    }
    RowGroups columns(i64 block) const { return {by_column_ + block * TILE_COLUMNS * steps_, MR * steps_}; }
    i64 column_steps() const { return columns_; }

  private:
    i64 columns_, steps_;
    Step* by_row_;     // [strip, steps of the columns]
    Step* by_column_;  // [blocks * TILE_COLUMNS, steps of the strip]
    float* tiles_;     // for each thread
};

// Calls work(rows, first step, steps) for each part of the depth of dI.
template <typename Work>
inline void for_each_depth(const GradientStrip& ds, const Tiling&, i64 row_in_strip, Work work) {
    work(ds.rows(row_in_strip), i64{0}, ds.column_steps());
}

#else
#if defined(CLIPERASE_BF16)

// Pairs lie along the depth, which is that of the columns for dI and that of the rows for dT: dS is rounded to bfloat16
// and stored twice, as much memory as once in float32.
class GradientStrip {
  public:
    GradientStrip(i64 blocks, i64 strip, i64, int threads, BumpAllocator& allocator)
        : rows_(strip), steps_(steps(strip) + EXTRA_STEPS) {
        by_row_ = allocator.packed((blocks * rows_ + MR) * ROW_STEPS);
        by_column_ = allocator.packed((blocks * steps_ + 1) * TILE_COLUMNS);
        tiles_ = allocator.floats(threads * TILE);
    }

    // Where dS of a tile is written before finish(), for each thread.
    float* tile(const TilePlace&) const { return tiles_ + thread() * TILE; }

    void finish(const TilePlace& at) const {
        const float* tile = tiles_ + thread() * TILE;
        for (i64 i = 0; i < at.rows; i += 2) {
            const bool second = i + 1 < at.rows;
            const float* row = tile + i * TILE_COLUMNS;
            Step* first_to = by_row_ + (at.block * rows_ + at.row_in_strip + i) * ROW_STEPS;
            Step* pair_to = by_column_ + (at.block * steps_ + at.step_in_strip + i / 2) * TILE_COLUMNS;
            for (i64 j = 0; j < at.width; j += W) {
                const Halves first = rounded(load(row + j));
                Halves next{};
                std::memcpy(first_to + j / 2, &first, sizeof first);
                if (second) {
                    next = rounded(load(row + TILE_COLUMNS + j));
                    std::memcpy(first_to + ROW_STEPS + j / 2, &next, sizeof next);
                }
                const Ints pairs = __builtin_convertvector(first, Ints) | __builtin_convertvector(next, Ints) << 16;
                std::memcpy(pair_to + j, &pairs, sizeof pairs);
            }
        }
    }

    Rows rows(i64 block, i64 row_in_strip) const {
        return {by_row_ + (block * rows_ + row_in_strip) * ROW_STEPS, ROW_STEPS};
    }
    Columns<TILE_COLUMNS> columns(i64 block) const { return {by_column_ + block * steps_ * TILE_COLUMNS}; }

  private:
    static constexpr i64 ROW_STEPS = TILE_COLUMNS / 2;
    i64 rows_, steps_;
    Step* by_row_;     // [blocks, strip, ROW_STEPS], and MR rows that products read beyond it
    Step* by_column_;  // [blocks, steps of the strip, TILE_COLUMNS], likewise
    float* tiles_;     // for each thread
};

#else

class GradientStrip {
  public:
    GradientStrip(i64 blocks, i64 strip, i64, int, BumpAllocator& allocator) : rows_(strip) {
        data_ = allocator.floats((blocks * strip + MR) * TILE_COLUMNS);
    }

    float* tile(const TilePlace& at) const { return at_(at.block, at.row_in_strip); }
    void finish(const TilePlace&) const {}
    Rows rows(i64 block, i64 row_in_strip) const { return {at_(block, row_in_strip), TILE_COLUMNS}; }
    Columns<TILE_COLUMNS> columns(i64 block) const { return {at_(block, 0)}; }

  private:
    i64 rows_;
    float* data_;  // [blocks, strip, TILE_COLUMNS], and MR rows that products read beyond it

    float* at_(i64 block, i64 row) const { return data_ + (block * rows_ + row) * TILE_COLUMNS; }
};

#endif

template <typename Work>
inline void for_each_depth(const GradientStrip& ds, const Tiling& blocks, i64 row_in_strip, Work work) {
    for (i64 block = 0; block < blocks.tiles; ++block)
        work(ds.rows(block, row_in_strip), first_step(blocks, blocks.start(block)), steps(blocks.length(block)));
}

#endif

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
