// The forward pass: the statistics of all rows and columns.
#pragma once

#include "comparison.h"

namespace cliperase {
namespace CLIPERASE_ISA {

struct ForwardLayout {
    i64 strip, blocks, padded_columns;
    Operands operands;
    float* tiles;         // for each thread a tile of S and one of S°
    float* row_parts;     // [blocks, SCRATCH_STATS, strip]
    float* column_parts;  // [tiles of a strip, SCRATCH_STATS, padded_columns]
    float* column_stats;  // [SCRATCH_STATS, padded_columns]
    TileSums squares;     // of the comparison, [2] for each tile
    std::size_t bytes;

    ForwardLayout(const SimilarityInputs& in, char* scratch) : ForwardLayout(in, BumpAllocator(scratch)) {}

    float* own_tiles() const { return tiles + thread() * 2 * TILE; }
    Stats part(i64 block, const StatSet& set) const {
        return sums(row_parts + block * SCRATCH_STATS * strip, set, strip);
    }
    Stats column_part(i64 tile, const StatSet& set) const {
        return sums(column_parts + tile * SCRATCH_STATS * padded_columns, set, padded_columns);
    }
    // The parts of a tile's rows and columns.
    Stats rows_of(const TilePlace& at, const StatSet& set) const { return part(at.block, set).at(at.row_in_strip); }
    Stats columns_of(const TilePlace& at, const StatSet& set) const {
        return column_part(at.tile, set).at(at.block * TILE_COLUMNS);
    }
    Stats columns(const StatSet& set) const { return sums(column_stats, set, padded_columns); }

  private:
    static Stats sums(float* base, const StatSet& set, i64 n) {
        return {base + set.reference * n, base + set.total * n, set.gap < 0 ? nullptr : base + set.gap * n};
    }
    ForwardLayout(const SimilarityInputs& in, BumpAllocator allocator)
        : strip(smaller(round_up(in.rows, W), STRIP_TILES * TILE_ROWS)),
          blocks(column_tiles(in).tiles),
          padded_columns(blocks * TILE_COLUMNS),
          operands(in, strip, allocator),
          squares(in, 2, allocator) {
        tiles = allocator.floats(in.threads * 2 * TILE);
        row_parts = allocator.floats(blocks * SCRATCH_STATS * strip);
        column_parts = allocator.floats(tiles_of_strip(in, strip) * SCRATCH_STATS * padded_columns);
        column_stats = allocator.floats(SCRATCH_STATS * padded_columns);
        bytes = allocator.used();
    }
};

// Copies the entries of a tile to the cache.
inline void keep_entries(const float* tile, i64 rows, float* kept) {
    std::memcpy(kept, tile, static_cast<std::size_t>(rows * TILE_COLUMNS) * sizeof *tile);
}

// Writes the statistics of one tile to the parts of its rows and columns.
//
// With a comparison the cache keeps the entries, which the backward pass needs, and never their exponentials. Tiles are
// worked on in memory of the thread, which stays in its cache, and written to `kept`, unless null, once.
inline void add_tile(const SimilarityInputs& in, const Forward& out, const ForwardLayout& layout, const TilePlace& at,
                     Groups groups, float* student, float* teacher, const TileCache::Tile* kept) {
    const i64 row = at.row, rows = at.rows, column = at.column, columns = at.columns, width = at.width;
    alignas(64) float row_top[TILE_ROWS], column_top[TILE_COLUMNS];
    const bool stores = kept && !in.comparison.wanted;
    const TileEdit edit(in.comparison, at);
    if (edit.edits()) edit_teacher(edit, rows, width, in.teacher_scale, teacher);
    for_each_pair(in, row, rows, column, columns, [&](i64 i, i64 j) {
        out.diagonal[row + i] = student[i * TILE_COLUMNS + j];
        if (in.has_teacher) out.teacher_diagonal[row + i] = teacher[i * TILE_COLUMNS + j];
    });
    if (in.comparison.wanted) {
        clear_uncompared(in, row, rows, column, columns, student, teacher);
        const auto add = edit.edits() ? add_squares<true> : add_squares<false>;
        add(student, teacher, rows, width, Difference(in), edit, layout.squares.of(at));
    }
    exclude(in, row, rows, column, columns, in.excludes() ? groups : Groups{nullptr, nullptr}, student);
    if (in.has_teacher) {
        exclude(in, row, rows, column, columns, {nullptr, nullptr}, teacher);
        find_largest(teacher, rows, width, row_top, column_top);
        const Reference c = shared_reference(row_top, rows, column_top);
        const Stats of_rows = layout.rows_of(at, teacher_set(in));
        const Stats of_columns = layout.columns_of(at, teacher_set(in));
        const bool exponentials = stores && c.shared;
        if (!c.shared)
            write_separate_stats<true>(teacher, student, *out.shift, rows, width, of_rows, of_columns, row_top,
                                       column_top);
        else if (exponentials)
            write_shared_stats<true, true>(teacher, kept->teacher, student, *out.shift, rows, width, c, of_rows,
                                           of_columns, row_top, column_top);
        else
            write_shared_stats<true, false>(teacher, nullptr, student, *out.shift, rows, width, c, of_rows, of_columns,
                                            row_top, column_top);
        if (kept) {
            kept->head->teacher_reference = c.value, kept->head->teacher_exponentials = exponentials;
            if (!exponentials) keep_entries(teacher, rows, kept->teacher);
        }
    }
    bool masked_within = true;
    const bool retained = is_retained(in, at), masked_apart = in.row_groups != nullptr && retained;
    find_largest(student, rows, width, row_top, column_top);
    const Reference c = shared_reference(row_top, rows, column_top);
    if (in.has_masked() && masked_apart) {
        alignas(64) float masked_row_top[TILE_ROWS], masked_column_top[TILE_COLUMNS];
        float* masked = layout.own_tiles() + TILE;  // the teacher's tile is no longer needed, if there was one
        std::memcpy(masked, student, static_cast<std::size_t>(rows) * TILE_COLUMNS * sizeof(float));
        exclude(in, row, rows, column, columns, groups, masked);
        find_largest(masked, rows, width, masked_row_top, masked_column_top);
        const Reference own = shared_reference(masked_row_top, rows, masked_column_top);
        const Stats of_rows = layout.rows_of(at, masked_set(in));
        const Stats of_columns = layout.columns_of(at, masked_set(in));
        if (own.shared)
            write_shared_stats<false, false>(masked, nullptr, nullptr, 0, rows, width, own, of_rows, of_columns,
                                             masked_row_top, masked_column_top);
        else
            write_separate_stats<false>(masked, nullptr, 0, rows, width, of_rows, of_columns, masked_row_top,
                                        masked_column_top);
        // The backward pass uses the student's exponentials for these rows and columns too.
        for (i64 i = 0; i < rows; ++i)
            masked_within &= masked_row_top[i] == LOWEST || masked_row_top[i] >= c.value - REACH;
        for (i64 j = 0; j < TILE_COLUMNS; ++j)
            masked_within &= masked_column_top[j] == LOWEST || masked_column_top[j] >= c.value - REACH;
    }
    const Stats of_rows = layout.rows_of(at, STUDENT_SET);
    const Stats of_columns = layout.columns_of(at, STUDENT_SET);
    const bool exponentials = stores && c.shared && masked_within;
    if (!c.shared)
        write_separate_stats<false>(student, nullptr, 0, rows, width, of_rows, of_columns, row_top, column_top);
    else if (exponentials)
        write_shared_stats<false, true>(student, kept->student, nullptr, 0, rows, width, c, of_rows, of_columns, row_top,
                                        column_top);
    else
        write_shared_stats<false, false>(student, nullptr, nullptr, 0, rows, width, c, of_rows, of_columns, row_top,
                                         column_top);
    if (in.has_masked() && !masked_apart) {
        const Stats own_rows = layout.rows_of(at, masked_set(in)), own_columns = layout.columns_of(at, masked_set(in));
        if (retained)
            copy(of_rows, own_rows, rows), copy(of_columns, own_columns, TILE_COLUMNS);
        else
            clear(own_rows, rows), clear(own_columns, TILE_COLUMNS);
    }
    if (kept) {
        kept->head->student_reference = c.value, kept->head->student_exponentials = exponentials;
        if (!exponentials) keep_entries(student, rows, kept->student);
    }
}

// Sets the total of rows or columns without entries.
inline void finish_stats(Stats sums, i64 count) {
    for (i64 i = 0; i < count; ++i)
        if (sums.reference[i] == LOWEST && sums.total[i] == 0) sums.total[i] = 1;
}

// S° - S of one entry. With a comparison it is not that of a pair, which may be edited where most entries are not.
inline float shift_of(const SimilarityInputs& in) {
    const i64 column = in.comparison.wanted ? in.columns - 1 : 0;
    double teacher;
    if (is_edited(in.comparison, 0, column))
        teacher = static_cast<double>(edited_entry(in, 0, column));
    else
        teacher = entry(in.teacher_image, in.teacher_text, in.teacher_width, in.teacher_scale, 0, column);
    return static_cast<float>(teacher - entry(in.image, in.text, in.width, in.scale, 0, column));
}

inline void forward(const SimilarityInputs& in, const Forward& out, char* scratch) {
    const ForwardLayout layout(in, scratch);
    const TileCache cache(out.cache, in);
    *out.shift = in.has_teacher ? shift_of(in) : 0;
    const StatSet sets[3] = {STUDENT_SET, masked_set(in), teacher_set(in)};
    for (const StatSet& set : sets)
        if (set.used) clear(layout.columns(set), layout.padded_columns);

    const Tiling rows = row_tiles(in), blocks = column_tiles(in);
    const FloatEnvironment callers;
#pragma omp parallel num_threads(in.threads)
    {
        const SharedFloatEnvironment environment(callers);
        const ProductRegisters registers;
        for (i64 start = 0; start < in.rows; start += layout.strip) {
            const Strip strip(rows, start, layout.strip);
#pragma omp for schedule(static)
            for (i64 group = 0; group < RowGroup::count_of(strip.tiles); ++group)
                layout.operands.pack_rows_of(in, start, {group, strip});

            const TileShares shares(strip, blocks.tiles, in.threads);
            i64 packed = -1;  // the block whose columns this thread has packed
#pragma omp for schedule(dynamic, shares.chunk)
            for (i64 task = 0; task < shares.count; ++task) {
                const TilePlace at(strip, task % shares.tiles, blocks, task / shares.tiles);
                std::int32_t own_groups[TILE_COLUMNS];
                if (at.block != packed) layout.operands.pack_columns_of(in, at.column, at.columns);
                packed = at.block;
                float *student = layout.own_tiles(), *teacher = student + TILE;
                const bool keeps = at.row < out.cached_rows;
                const TileCache::Tile kept = keeps ? cache.at(at.row_tile, at.block) : TileCache::Tile{};
                layout.operands.student_tile(in, at, student);
                if (in.has_teacher) layout.operands.teacher_tile(in, at, teacher);
                add_tile(in, out, layout, at, block_groups(in, at, own_groups), student, teacher,
                         keeps ? &kept : nullptr);
            }

#pragma omp for schedule(static) nowait
            for (i64 block = 0; block < layout.blocks; ++block)
                for (i64 tile = 0; tile < shares.tiles; ++tile)
                    for (const StatSet& set : sets)
                        if (set.used)
                            merge(layout.columns(set).at(block * TILE_COLUMNS),
                                  layout.column_part(tile, set).at(block * TILE_COLUMNS), TILE_COLUMNS);

            // One vector of rows at a time. Parts beyond the last row of the strip are uninitialised; their statistics are
            // not used.
#pragma omp for schedule(static)
            for (i64 i = 0; i < strip.rows; i += W) {
                for (const StatSet& set : sets) {
                    if (!set.used) continue;
                    alignas(64) float reference[W], total[W], gap[W];
                    const Stats merged{reference, total, set.gap < 0 ? nullptr : gap};
                    clear(merged, W);
                    for (i64 block = 0; block < layout.blocks; ++block) merge(merged, layout.part(block, set).at(i), W);
                    finish_stats(merged, W);
                    float* to = out.row_stats + set.result * in.rows + start + i;
                    for (i64 lane = 0; lane < smaller(W, strip.rows - i); ++lane) {
                        to[lane] = reference[lane];
                        to[in.rows + lane] = total[lane];
                        if (merged.gap) to[2 * in.rows + lane] = gap[lane];
                    }
                }
            }
        }
    }

    if (in.comparison.wanted)
        for (i64 number = 0; number < 2; ++number) out.squares[number] = layout.squares.total(number);
    for (const StatSet& set : sets) {
        if (!set.used) continue;
        const Stats sums = layout.columns(set);
        finish_stats(sums, layout.padded_columns);
        for (i64 block = 0; block < blocks.tiles; ++block) {
            const Stats from = sums.at(block * TILE_COLUMNS);
            const auto bytes = static_cast<std::size_t>(blocks.length(block)) * sizeof(float);
            float* to = out.column_stats + set.result * in.columns + blocks.start(block);
            std::memcpy(to, from.reference, bytes);
            std::memcpy(to + in.columns, from.total, bytes);
            if (from.gap) std::memcpy(to + 2 * in.columns, from.gap, bytes);
        }
    }
}

inline std::size_t forward_scratch(const SimilarityInputs& in) { return ForwardLayout(in, nullptr).bytes; }

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
