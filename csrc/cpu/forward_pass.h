// The forward pass: the sums of all rows and columns.
#pragma once

#include "strips.h"

namespace cliperase {
namespace CLIPERASE_ISA {

struct ForwardLayout {
    i64 strip, blocks, padded_columns;
    Operands operands;
    float* tiles;         // for each thread a tile of S and one of S°
    float* row_parts;     // [blocks, SCRATCH_PLANES, strip]
    float* column_parts;  // [STRIP_TILES, SCRATCH_PLANES, padded_columns]
    float* column_state;  // [SCRATCH_PLANES, padded_columns]
    std::size_t bytes;

    ForwardLayout(const Problem& p, char* scratch) : ForwardLayout(p, Carver(scratch)) {}

    float* own_tiles() const { return tiles + thread() * 2 * TILE; }
    Sums part(i64 block, const PlaneSet& set) const {
        return sums(row_parts + block * SCRATCH_PLANES * strip, set, strip);
    }
    Sums column_part(i64 tile, const PlaneSet& set) const {
        return sums(column_parts + tile * SCRATCH_PLANES * padded_columns, set, padded_columns);
    }
    Sums columns(const PlaneSet& set) const { return sums(column_state, set, padded_columns); }

  private:
    static Sums sums(float* base, const PlaneSet& set, i64 n) {
        return {base + set.reference * n, base + set.total * n, set.gap < 0 ? nullptr : base + set.gap * n};
    }
    ForwardLayout(const Problem& p, Carver carver)
        : strip(smaller(round_up(p.rows, W), STRIP_TILES * TILE_ROWS)),
          blocks(divide_up(p.columns, TILE_COLUMNS)),
          padded_columns(blocks * TILE_COLUMNS),
          operands(p, strip, carver) {
        tiles = carver.floats(p.threads * 2 * TILE);
        row_parts = carver.floats(blocks * SCRATCH_PLANES * strip);
        column_parts = carver.floats(STRIP_TILES * SCRATCH_PLANES * padded_columns);
        column_state = carver.floats(SCRATCH_PLANES * padded_columns);
        bytes = carver.used();
    }
};

// The sums of one tile, into the parts of its rows and columns.
inline void add_tile(const Problem& p, const Forward& out, const ForwardLayout& layout, i64 strip_start, i64 row, i64 rows,
                     i64 block, i64 columns, Groups groups, float* student, float* teacher, KeptTiles::Head* kept) {
    const i64 in_strip = row - strip_start, column = block * TILE_COLUMNS, tile = in_strip / TILE_ROWS;
    alignas(64) float row_top[TILE_ROWS], column_top[TILE_COLUMNS];
    each_diagonal(p, row, rows, column, columns, [&](i64 i, i64 j) {
        out.diagonal[row + i] = student[i * TILE_COLUMNS + j];
        if (p.has_teacher) out.teacher_diagonal[row + i] = teacher[i * TILE_COLUMNS + j];
    });
    leave_out(p, row, rows, column, columns, p.excludes() ? groups : Groups{nullptr, nullptr}, student);
    if (p.has_teacher) {
        leave_out(p, row, rows, column, columns, {nullptr, nullptr}, teacher);
        find_largest(teacher, rows, row_top, column_top);
        const Reference c = shared_reference(row_top, rows, column_top);
        const Sums of_rows = layout.part(block, teacher_planes(p)).at(in_strip);
        const Sums of_columns = layout.column_part(tile, teacher_planes(p)).at(column);
        if (!c.shared)
            separate_sums<true>(teacher, student, *out.shift, rows, of_rows, of_columns, row_top, column_top);
        else if (kept)
            shared_sums<true, true>(teacher, student, *out.shift, rows, c, of_rows, of_columns, row_top, column_top);
        else
            shared_sums<true, false>(teacher, student, *out.shift, rows, c, of_rows, of_columns, row_top, column_top);
        if (kept) kept->teacher_reference = c.value, kept->teacher_exponentials = c.shared;
    }
    bool masked_within = true;
    find_largest(student, rows, row_top, column_top);
    const Reference c = shared_reference(row_top, rows, column_top);
    if (p.has_masked()) {
        alignas(64) float masked_row_top[TILE_ROWS], masked_column_top[TILE_COLUMNS];
        float* masked = layout.own_tiles() + TILE;  // what held the teacher's tile, now used, or nothing
        std::memcpy(masked, student, static_cast<std::size_t>(rows) * TILE_COLUMNS * sizeof(float));
        leave_out(p, row, rows, column, columns, groups, masked);
        find_largest(masked, rows, masked_row_top, masked_column_top);
        const Reference own = shared_reference(masked_row_top, rows, masked_column_top);
        const Sums of_rows = layout.part(block, masked_planes(p)).at(in_strip);
        const Sums of_columns = layout.column_part(tile, masked_planes(p)).at(column);
        if (own.shared)
            shared_sums<false, false>(masked, nullptr, 0, rows, own, of_rows, of_columns, masked_row_top, masked_column_top);
        else
            separate_sums<false>(masked, nullptr, 0, rows, of_rows, of_columns, masked_row_top, masked_column_top);
        // The backward pass takes the student's exponentials for these rows and columns too.
        for (i64 i = 0; i < rows; ++i)
            masked_within &= masked_row_top[i] == LOWEST || masked_row_top[i] >= c.value - REACH;
        for (i64 j = 0; j < TILE_COLUMNS; ++j)
            masked_within &= masked_column_top[j] == LOWEST || masked_column_top[j] >= c.value - REACH;
    }
    const Sums of_rows = layout.part(block, STUDENT).at(in_strip);
    const Sums of_columns = layout.column_part(tile, STUDENT).at(column);
    const bool exponentials = c.shared && masked_within;
    if (!c.shared)
        separate_sums<false>(student, nullptr, 0, rows, of_rows, of_columns, row_top, column_top);
    else if (kept && exponentials)
        shared_sums<false, true>(student, nullptr, 0, rows, c, of_rows, of_columns, row_top, column_top);
    else
        shared_sums<false, false>(student, nullptr, 0, rows, c, of_rows, of_columns, row_top, column_top);
    if (kept) kept->student_reference = c.value, kept->student_exponentials = exponentials;
}

// A row or column without entries.
inline void finish_sums(Sums sums, i64 count) {
    for (i64 i = 0; i < count; ++i)
        if (sums.reference[i] == LOWEST && sums.total[i] == 0) sums.total[i] = 1;
}

inline void forward(const Problem& p, const Forward& out, char* scratch) {
    const ForwardLayout layout(p, scratch);
    const KeptTiles kept(out.kept, p);
    *out.shift = 0;
    if (p.has_teacher)
        *out.shift = static_cast<float>(entry(p.teacher_image, p.teacher_text, p.teacher_width, p.teacher_scale, 0, 0) -
                                        entry(p.image, p.text, p.width, p.scale, 0, 0));
    const PlaneSet sets[3] = {STUDENT, masked_planes(p), teacher_planes(p)};
    for (const PlaneSet& set : sets)
        if (set.used) clear(layout.columns(set), layout.padded_columns);

#pragma omp parallel num_threads(p.threads)
    for (i64 start = 0; start < p.rows; start += layout.strip) {
        const i64 strip = smaller(layout.strip, p.rows - start);
#pragma omp for schedule(static)
        for (i64 group = 0; group < RowGroup::in_strip(strip); ++group) layout.operands.pack_rows_of(p, start, {group, strip});

        const TileShares shares(strip, layout.blocks, p.threads);
        i64 packed = -1;  // the block whose columns this thread has packed
#pragma omp for schedule(dynamic, shares.chunk)
        for (i64 task = 0; task < shares.count; ++task) {
            const i64 block = task / shares.tiles, i = task % shares.tiles * TILE_ROWS;
            const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
            const i64 row = start + i, rows = smaller(TILE_ROWS, strip - i);
            std::int32_t own_groups[TILE_COLUMNS];
            if (block != packed) layout.operands.pack_columns_of(p, column, columns);
            packed = block;
            float *student = layout.own_tiles(), *teacher = student + TILE;
            KeptTiles::Head* head = nullptr;
            if (row < out.kept_rows) {
                float* tiles = kept.at(row / TILE_ROWS, block);
                head = reinterpret_cast<KeptTiles::Head*>(tiles);
                student = tiles + KeptTiles::HEAD;
                teacher = student + TILE;
            }
            layout.operands.student_tile(p, i, rows, columns, student);
            if (p.has_teacher) layout.operands.teacher_tile(p, i, rows, columns, teacher);
            add_tile(p, out, layout, start, row, rows, block, columns, block_groups(p, row, column, columns, own_groups),
                     student, teacher, head);
        }

#pragma omp for schedule(static) nowait
        for (i64 block = 0; block < layout.blocks; ++block)
            for (i64 tile = 0; tile < shares.tiles; ++tile)
                for (const PlaneSet& set : sets)
                    if (set.used)
                        merge(layout.columns(set).at(block * TILE_COLUMNS), layout.column_part(tile, set).at(block * TILE_COLUMNS),
                              TILE_COLUMNS);

        // A vector of rows each; beyond the strip's rows are parts that nobody wrote, and nobody reads the sums of.
#pragma omp for schedule(static)
        for (i64 i = 0; i < strip; i += W) {
            for (const PlaneSet& set : sets) {
                if (!set.used) continue;
                alignas(64) float reference[W], total[W], gap[W];
                const Sums merged{reference, total, set.gap < 0 ? nullptr : gap};
                clear(merged, W);
                for (i64 block = 0; block < layout.blocks; ++block)
                    merge(merged, layout.part(block, set).at(i), W);
                finish_sums(merged, W);
                float* to = out.row_sums + set.result * p.rows + start + i;
                for (i64 lane = 0; lane < smaller(W, strip - i); ++lane) {
                    to[lane] = reference[lane];
                    to[p.rows + lane] = total[lane];
                    if (merged.gap) to[2 * p.rows + lane] = gap[lane];
                }
            }
        }
    }

    for (const PlaneSet& set : sets) {
        if (!set.used) continue;
        const Sums sums = layout.columns(set);
        finish_sums(sums, p.columns);
        const auto bytes = static_cast<std::size_t>(p.columns) * sizeof(float);
        float* to = out.column_sums + set.result * p.columns;
        std::memcpy(to, sums.reference, bytes);
        std::memcpy(to + p.columns, sums.total, bytes);
        if (sums.gap) std::memcpy(to + 2 * p.columns, sums.gap, bytes);
    }
}

inline std::size_t forward_scratch(const Problem& p) { return ForwardLayout(p, nullptr).bytes; }

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
