// The calibrated loss on one tile of S and S°: edits S°, and compares the cosines.
#pragma once

#include <initializer_list>

#include "strips.h"

namespace cliperase {
namespace CLIPERASE_ISA {

// Whether all pairs of a tile are to be retained.
inline bool is_retained(const SimilarityInputs& in, const TilePlace& at) {
    return !in.comparison.forgets(at.row) && !in.comparison.forgets(at.column);
}

// Whether the entry of S° is edited, and the entry then.
inline bool is_edited(const Comparison& from, i64 row, i64 column) {
    const bool by_ids = from.row_ids != nullptr;
    if (from.row_levels == nullptr || (by_ids && from.row_ids[row] != from.column_ids[column])) return false;
    return !from.joint || (from.forgets(column) && (by_ids || from.forgets(row)));
}
inline float edited_entry(const SimilarityInputs& in, i64 row, i64 column) {
    return (in.comparison.column_levels[column] + in.comparison.row_levels[row]) * in.teacher_scale;
}

// The ids and levels of a tile, those of columns padded to TILE_COLUMNS; null: no entry is edited.
struct TileEdit {
    const std::int32_t* row_ids = nullptr;
    const float* row_levels = nullptr;
    alignas(64) std::int32_t column_ids[TILE_COLUMNS];
    alignas(64) float column_levels[TILE_COLUMNS];

    TileEdit(const Comparison& from, const TilePlace& at) {
        static const std::int32_t EQUAL[TILE_ROWS] = {};
        const bool by_ids = from.row_ids != nullptr;
        if (from.row_levels == nullptr) return;
        if (from.joint && !(from.forgets(at.column) && (by_ids || from.forgets(at.row)))) return;
        row_ids = by_ids ? from.row_ids + at.row : EQUAL, row_levels = from.row_levels + at.row;
        for (i64 j = 0; j < TILE_COLUMNS; ++j) {
            column_ids[j] = by_ids && j < at.columns ? from.column_ids[at.column + j] : 0;
            column_levels[j] = j < at.columns ? from.column_levels[at.column + j] : 0;
        }
    }
    bool edits() const { return row_ids != nullptr; }
    Ints at(i64 i, i64 j) const { return load(column_ids + j) == row_ids[i]; }
};

inline void edit_teacher(const TileEdit& edit, i64 rows, i64 width, float scale, float* teacher) {
    for (i64 i = 0; i < rows; ++i)
        for (i64 j = 0; j < width; j += W) {
            float* to = teacher + i * TILE_COLUMNS + j;
            const Floats level = (load(edit.column_levels + j) + edit.row_levels[i]) * scale;
            store(to, edit.at(i, j) ? level : load(to));
        }
}

// C - C* from the entries of S and S°.
struct Difference {
    float of_student, of_teacher;
    explicit Difference(const SimilarityInputs& in) : of_student(1 / in.scale), of_teacher(1 / in.teacher_scale) {}
    Floats operator()(Floats student, Floats teacher) const { return student * of_student - teacher * of_teacher; }
};

// Sets the entries of own pairs, and those beyond the last column, to 0: they are not compared here.
inline void clear_uncompared(const SimilarityInputs& in, i64 row, i64 rows, i64 column, i64 columns, float* student,
                             float* teacher) {
    for (float* tile : {student, teacher}) {
        for_each_pair(in, row, rows, column, columns, [&](i64 i, i64 j) { tile[i * TILE_COLUMNS + j] = 0; });
        const i64 width = round_up(columns, W);
        for (i64 i = 0; columns < width && i < rows; ++i)
            for (i64 j = columns; j < width; ++j) tile[i * TILE_COLUMNS + j] = 0;
    }
}

// Writes the squares of a tile to squares [2], see `Forward`. Entries of own pairs and beyond the last column are 0.
template <bool EDITS>
inline void add_squares(const float* student, const float* teacher, i64 rows, i64 width, Difference difference,
                        const TileEdit& edit, double* squares) {
    double forget = 0, anchor = 0;
    for (i64 i = 0; i < rows; ++i) {
        Floats of_forget{}, of_anchor{};
        for (i64 j = 0; j < width; j += W) {
            const i64 at = i * TILE_COLUMNS + j;
            const Floats d = difference(load(student + at), load(teacher + at));
            if constexpr (EDITS) {
                const Ints edited = edit.at(i, j);
                const Floats above = d < 0 ? Floats{} : d;
                of_forget += edited ? above * above : Floats{};
                of_anchor += edited ? Floats{} : d * d;
            } else {
                of_anchor += d * d;
            }
        }
        if constexpr (EDITS) forget += static_cast<double>(sum(of_forget));
        anchor += static_cast<double>(sum(of_anchor));
    }
    squares[0] = forget, squares[1] = anchor;
}

// Adds the pull to dS of a tile, and returns the sum of dS S before that. LOWEST marks excluded entries.
template <bool EDITS>
inline double add_pull(const float* student, const float* teacher, i64 rows, i64 width, Difference difference,
                       const TileEdit& edit, float pull_forget, float pull_anchor, float* ds) {
    double dot = 0;
    for (i64 i = 0; i < rows; ++i) {
        Floats of_row{};
        for (i64 j = 0; j < width; j += W) {
            const i64 at = i * TILE_COLUMNS + j;
            const Floats s = load(student + at), gradient = load(ds + at), d = difference(s, load(teacher + at));
            const Ints excluded = s == LOWEST;
            Floats pull = d * pull_anchor;
            if constexpr (EDITS) pull = edit.at(i, j) ? (d < 0 ? Floats{} : d) * pull_forget : pull;
            of_row += excluded ? Floats{} : gradient * s;
            store(ds + at, excluded ? gradient : gradient + pull);
        }
        dot += static_cast<double>(sum(of_row));
    }
    return dot;
}

// The numbers of all tiles, `each` for one, summed in a fixed order.
struct TileSums {
    double* values;
    i64 blocks, tiles, each;

    TileSums(const SimilarityInputs& in, i64 numbers, BumpAllocator& allocator)
        : blocks(column_tiles(in).tiles),
          tiles(in.comparison.wanted ? row_tiles(in).tiles * blocks : 0),
          each(numbers) {
        values = reinterpret_cast<double*>(allocator.floats(2 * each * tiles));
    }
    double* of(const TilePlace& at) const { return values + each * (at.row_tile * blocks + at.block); }
    double total(i64 number) const {
        double sum = 0;
        for (i64 tile = 0; tile < tiles; ++tile) sum += values[each * tile + number];
        return sum;
    }
};

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
