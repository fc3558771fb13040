// The two passes over the tiles, for one instruction set: included by a source file that names it.
//
// Both go strip by strip. Threads own column blocks of a strip, so that a column's sums and its row of dT are added up in
// one order whatever the number of threads; what they find of the rows is merged, block after block, when the strip is
// done. That makes the results the same bits for any number of threads.
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

// What both passes need of a strip of rows and of a block of columns.
struct Operands {
    float *image, *teacher_image;  // [strip, width], times the scale
    float *text, *teacher_text;    // panels [width, TILE_COLUMNS] for each thread
    i64 text_floats, teacher_text_floats;

    Operands(const Problem& p, i64 strip, Carver& carver) {
        const i64 teacher_width = p.has_teacher ? p.teacher_width : 0;
        image = carver.floats(strip * p.width);
        teacher_image = carver.floats(strip * teacher_width);
        text_floats = p.width * round_up(TILE_COLUMNS, NR);
        teacher_text_floats = teacher_width * round_up(TILE_COLUMNS, NR);
        text = carver.floats(p.threads * text_floats);
        teacher_text = carver.floats(p.threads * teacher_text_floats);
    }
    float* own_text() const { return text + thread() * text_floats; }
    float* own_teacher_text() const { return teacher_text + thread() * teacher_text_floats; }

    void pack_rows_of(const Problem& p, i64 strip_start, i64 row, i64 count) const {
        pack_rows(p.image, row, count, p.width, p.scale, image + (row - strip_start) * p.width);
        if (p.has_teacher)
            pack_rows(p.teacher_image, row, count, p.teacher_width, p.teacher_scale,
                      teacher_image + (row - strip_start) * p.teacher_width);
    }
    void pack_columns_of(const Problem& p, i64 column, i64 columns) const {
        pack_transposed(p.text, column, columns, p.width, own_text());
        if (p.has_teacher) pack_transposed(p.teacher_text, column, columns, p.teacher_width, own_teacher_text());
    }
    // A tile of S: rows of the strip from `row` on.
    void student_tile(const Problem& p, i64 row, i64 rows, i64 columns, float* out) const {
        product(rows, columns, p.width, {image + row * p.width, p.width, 1}, {own_text(), p.width * NR, 0}, out,
                TILE_COLUMNS, false);
    }
    void teacher_tile(const Problem& p, i64 row, i64 rows, i64 columns, float* out) const {
        product(rows, columns, p.teacher_width, {teacher_image + row * p.teacher_width, p.teacher_width, 1},
                {own_teacher_text(), p.teacher_width * NR, 0}, out, TILE_COLUMNS, false);
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

// -- forward ----------------------------------------------------------------------------------------------------------

struct ForwardLayout {
    i64 strip, blocks, padded_columns;
    Operands operands;
    float* tiles;         // for each thread a tile of S and one of S°
    float* row_parts;     // [blocks, SCRATCH_PLANES, strip]
    float* column_state;  // [SCRATCH_PLANES, padded_columns]
    std::size_t bytes;

    ForwardLayout(const Problem& p, char* scratch) : ForwardLayout(p, Carver(scratch)) {}

    float* own_tiles() const { return tiles + thread() * 2 * TILE; }
    Sums part(i64 block, const PlaneSet& set) const {
        return sums(row_parts + block * SCRATCH_PLANES * strip, set, strip);
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
        column_state = carver.floats(SCRATCH_PLANES * padded_columns);
        bytes = carver.used();
    }
};

// The sums of one tile, into the row parts of its block and the state of its columns.
inline void add_tile(const Problem& p, const Forward& out, const ForwardLayout& layout, i64 strip_start, i64 row, i64 rows,
                     i64 block, i64 columns, Groups groups, float* student, float* teacher, KeptTiles::Head* kept) {
    const i64 in_strip = row - strip_start, column = block * TILE_COLUMNS;
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
        const Sums of_columns = layout.columns(teacher_planes(p)).at(column);
        if (!c.shared)
            separate_sums<true>(teacher, student, out.shift, rows, of_rows, of_columns, row_top, column_top);
        else if (kept)
            shared_sums<true, true>(teacher, student, out.shift, rows, c, of_rows, of_columns, row_top, column_top);
        else
            shared_sums<true, false>(teacher, student, out.shift, rows, c, of_rows, of_columns, row_top, column_top);
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
        const Sums of_columns = layout.columns(masked_planes(p)).at(column);
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
    const Sums of_columns = layout.columns(STUDENT).at(column);
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
    const PlaneSet sets[3] = {STUDENT, masked_planes(p), teacher_planes(p)};
    for (const PlaneSet& set : sets)
        if (set.used) clear(layout.columns(set), layout.padded_columns);

#pragma omp parallel num_threads(p.threads)
    for (i64 start = 0; start < p.rows; start += layout.strip) {
        const i64 strip = smaller(layout.strip, p.rows - start);
#pragma omp for schedule(static)
        for (i64 i = 0; i < strip; i += MR) layout.operands.pack_rows_of(p, start, start + i, smaller(MR, strip - i));

#pragma omp for schedule(dynamic)
        for (i64 block = 0; block < layout.blocks; ++block) {
            const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
            std::int32_t own_groups[TILE_COLUMNS];
            layout.operands.pack_columns_of(p, column, columns);
            for (i64 i = 0; i < strip; i += TILE_ROWS) {
                const i64 row = start + i, rows = smaller(TILE_ROWS, strip - i);
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
        }

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

// -- backward ---------------------------------------------------------------------------------------------------------

struct BackwardLayout {
    i64 strip, blocks, width;
    Operands operands;
    float* image_panels;  // [strip, width] in panels: the strip of image times scale, for dT
    float* text_panels;   // [columns, width] in panels, for dI
    float* tiles;         // for each thread a tile of S and one of S°
    float* ds;            // [blocks, strip, TILE_COLUMNS]
    float* dots;          // [rows], of dI and I
    std::size_t bytes;

    BackwardLayout(const Problem& p, const Backward& b, char* scratch) : BackwardLayout(p, b, Carver(scratch)) {}

    float* own_tiles() const { return tiles + thread() * 2 * TILE; }
    float* ds_tile(i64 block, i64 row_in_strip) const { return ds + (block * strip + row_in_strip) * TILE_COLUMNS; }

  private:
    static i64 strip_rows(const Problem& p) {
        const i64 fit = STRIP_FLOATS / round_up(p.columns, TILE_COLUMNS) / TILE_ROWS * TILE_ROWS;
        return smaller(p.rows, larger(TILE_ROWS, smaller(fit, STRIP_TILES * TILE_ROWS)));
    }
    BackwardLayout(const Problem& p, const Backward& b, Carver carver)
        : strip(strip_rows(p)),
          blocks(divide_up(p.columns, TILE_COLUMNS)),
          width(round_up(p.width, NR)),
          operands(p, strip, carver) {
        image_panels = carver.floats(b.grad_text ? strip * width : 0);
        text_panels = carver.floats(b.grad_image ? p.columns * width : 0);
        tiles = carver.floats(p.threads * 2 * TILE);
        ds = carver.floats(blocks * strip * TILE_COLUMNS);
        dots = carver.floats(b.grad_scale ? p.rows : 0);
        bytes = carver.used();
    }
};

// A softmax's terms for one tile.
inline TileSoftmax part_of(const Softmax& softmax, i64 row, i64 column) {
    return {softmax.row_anchor + row, softmax.row_factor + row, softmax.column_anchor + column,
            softmax.column_factor + column};
}

// The tile of one similarity in the backward pass: its entries, or their exponentials under a reference.
struct Source {
    const float* tile;
    bool exponentials, shared;
    float reference;
};

inline Source source_of(const float* tile, const TileSoftmax& softmax, i64 rows, i64 columns, bool exponentials,
                        float kept_reference) {
    if (exponentials) return {tile, true, true, kept_reference};
    const Reference c = shared_anchor(softmax, rows, columns);
    return {tile, false, c.shared, c.value};
}

template <bool MASKED>
inline void add_softmax(const Source& from, const TileSoftmax& softmax, i64 rows, i64 columns, Groups groups, float* ds,
                        bool add) {
    if (from.shared && (from.exponentials || !MASKED || within_reach(softmax, rows, columns, from.reference))) {
        Factors factors;
        factors.move(softmax, rows, columns, from.reference);
        if (from.exponentials)
            add_shared<true, MASKED>(from.tile, rows, from.reference, factors, groups, ds, add);
        else
            add_shared<false, MASKED>(from.tile, rows, from.reference, factors, groups, ds, add);
    } else {
        add_separate<MASKED>(from.tile, rows, columns, softmax, groups, ds, add);
    }
}

// dS of one tile.
inline void write_gradient(const Problem& p, const Backward& b, i64 row, i64 rows, i64 column, i64 columns, Groups groups,
                           float* student, float* teacher, const KeptTiles::Head* kept, float* ds) {
    const TileSoftmax terms = part_of(b.student, row, column);
    const Source from = source_of(student, terms, rows, columns, kept && kept->student_exponentials,
                                  kept ? kept->student_reference : 0);
    if (p.has_teacher) {
        const TileSoftmax teacher_terms = part_of(b.teacher, row, column);
        const Source other = source_of(teacher, teacher_terms, rows, columns, kept && kept->teacher_exponentials,
                                       kept ? kept->teacher_reference : 0);
        if (from.shared && other.shared && from.exponentials == other.exponentials) {
            Factors factors, teacher_factors;
            factors.move(terms, rows, columns, from.reference);
            teacher_factors.move(teacher_terms, rows, columns, other.reference);
            if (from.exponentials)
                write_both<true>(student, teacher, rows, 0, 0, factors, teacher_factors, ds);
            else
                write_both<false>(student, teacher, rows, from.reference, other.reference, factors, teacher_factors, ds);
        } else {
            add_softmax<false>(from, terms, rows, columns, groups, ds, false);
            add_softmax<false>(other, teacher_terms, rows, columns, groups, ds, true);
        }
        if (p.has_masked()) add_softmax<true>(from, part_of(b.masked, row, column), rows, columns, groups, ds, true);
    } else {
        add_softmax<false>(from, terms, rows, columns, groups, ds, false);
    }
    each_diagonal(p, row, rows, column, columns, [&](i64 i, i64 j) { ds[i * TILE_COLUMNS + j] = b.diagonal[row + i]; });
}

inline void backward(const Problem& p, const Backward& b, char* scratch) {
    const BackwardLayout layout(p, b, scratch);
    const KeptTiles kept(b.kept, p);
    const i64 stride = gradient_stride(p.width), panels = divide_up(p.width, NR);
    const i64 panel_groups = divide_up(panels, PANEL_GROUP);

#pragma omp parallel num_threads(p.threads)
    {
        if (b.grad_image) {
#pragma omp for schedule(static)
            for (i64 block = 0; block < layout.blocks; ++block) {
                const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
                pack_panels(p.text, column, columns, p.width, 1, layout.text_panels, column, p.columns);
            }
        }
        for (i64 start = 0; start < p.rows; start += layout.strip) {
            const i64 strip = smaller(layout.strip, p.rows - start);
#pragma omp for schedule(static)
            for (i64 i = 0; i < strip; i += MR) {
                const i64 count = smaller(MR, strip - i);
                if (start + i + count > b.kept_rows) layout.operands.pack_rows_of(p, start, start + i, count);
                if (b.grad_text)
                    pack_panels(p.image, start + i, count, p.width, p.scale, layout.image_panels, i, layout.strip);
            }

#pragma omp for schedule(dynamic)
            for (i64 block = 0; block < layout.blocks; ++block) {
                const i64 column = block * TILE_COLUMNS, columns = smaller(TILE_COLUMNS, p.columns - column);
                std::int32_t own_groups[TILE_COLUMNS];
                if (start + strip > b.kept_rows) layout.operands.pack_columns_of(p, column, columns);
                for (i64 i = 0; i < strip; i += TILE_ROWS) {
                    const i64 row = start + i, rows = smaller(TILE_ROWS, strip - i);
                    const Groups groups = block_groups(p, row, column, columns, own_groups);
                    const Groups excluded = p.excludes() ? groups : Groups{nullptr, nullptr};
                    float *student = layout.own_tiles(), *teacher = student + TILE;
                    const KeptTiles::Head* head = nullptr;
                    if (row < b.kept_rows) {
                        float* tiles = kept.at(row / TILE_ROWS, block);
                        head = reinterpret_cast<const KeptTiles::Head*>(tiles);
                        student = tiles + KeptTiles::HEAD;
                        teacher = student + TILE;
                    } else {
                        layout.operands.student_tile(p, i, rows, columns, student);
                        leave_out(p, row, rows, column, columns, excluded, student);
                        if (p.has_teacher) {
                            layout.operands.teacher_tile(p, i, rows, columns, teacher);
                            leave_out(p, row, rows, column, columns, {nullptr, nullptr}, teacher);
                        }
                    }
                    write_gradient(p, b, row, rows, column, columns, groups, student, teacher, head, layout.ds_tile(block, i));
                }
                if (b.grad_text)
                    product(columns, p.width, strip, {layout.ds_tile(block, 0), 1, TILE_COLUMNS},
                            {layout.image_panels, layout.strip * NR, 0}, b.grad_text + column * stride, stride, start > 0);
            }

            if (b.grad_image) {
                const i64 row_groups = divide_up(strip, ROW_GROUP);
#pragma omp for schedule(dynamic)
                for (i64 task = 0; task < row_groups * panel_groups; ++task) {
                    const i64 row = task / panel_groups * ROW_GROUP, rows = smaller(ROW_GROUP, strip - row);
                    const i64 panel = task % panel_groups * PANEL_GROUP;
                    const i64 width = smaller(PANEL_GROUP * NR, p.width - panel * NR);
                    float* to = b.grad_image + (start + row) * stride + panel * NR;
                    for (i64 block = 0; block < layout.blocks; ++block) {
                        const i64 column = block * TILE_COLUMNS, depth = smaller(TILE_COLUMNS, p.columns - column);
                        product(rows, width, depth, {layout.ds_tile(block, row), TILE_COLUMNS, 1},
                                {layout.text_panels + panel * p.columns * NR, p.columns * NR, column}, to, stride, block > 0);
                    }
                }
            }
            if (b.grad_scale) {
#pragma omp for schedule(static)
                for (i64 i = start; i < start + strip; ++i) {
                    double dot = 0;
                    with_dtype(p.image.dtype, [&](auto* type) {
                        using T = std::remove_pointer_t<decltype(type)>;
                        for (i64 k = 0; k < p.width; ++k)
                            dot += static_cast<double>(b.grad_image[i * stride + k]) * static_cast<double>(element<T>(p.image, i, k));
                    });
                    layout.dots[i] = static_cast<float>(dot);
                }
            }
        }
    }
    if (b.grad_scale) {
        double total = 0;
        for (i64 i = 0; i < p.rows; ++i) total += static_cast<double>(layout.dots[i]);
        *b.grad_scale = total;
    }
}

inline std::size_t backward_scratch(const Problem& p, const Backward& b) { return BackwardLayout(p, b, nullptr).bytes; }

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
