// dS of a strip, as the products read it: by rows for dI, and by columns for dT.
#pragma once

#include "strips.h"

namespace cliperase {
namespace CLIPERASE_ISA {

#if defined(CLIPERASE_BF16)

// Pairs lie along the depth, which is that of the columns for dI and that of the rows for dT: dS is rounded to bfloat16
// and stored twice, as much memory as once in float32.
class GradientStrip {
  public:
    GradientStrip(i64 blocks, i64 strip, int threads, BumpAllocator& allocator)
        : rows_(strip), steps_(steps(strip) + 1) {
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
    GradientStrip(i64 blocks, i64 strip, int, BumpAllocator& allocator) : rows_(strip) {
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

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
