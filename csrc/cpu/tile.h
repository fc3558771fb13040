// The work on one tile of S and S°: statistics in the forward pass, dS in the backward pass.
//
// One exponential serves row and column: exp(S_ij - c), with one reference c for the tile. That is exact unless a row
// or column of the tile is so far below c that its exponentials vanish (at large scales, or for rows far from any
// match). In that case, rows and columns have separate references and exponentials.
#pragma once

#include "product.h"
#include "sweep.h"

namespace cliperase {
namespace CLIPERASE_ISA {

constexpr i64 TILE_ROWS = CACHE_TILE_ROWS, TILE_COLUMNS = CACHE_TILE_COLUMNS, TILE = TILE_ROWS * TILE_COLUMNS;

// exp(-60) is 1e-26, and 1e-12 of it is still a normal number.
constexpr float REACH = 60.0f;

// The group ids of a tile; entries with row_groups[i] == column_groups[j] are excluded.
struct Groups {
    const std::int32_t *rows, *columns;
};

// The statistics of rows or columns, one array each.
struct Stats {
    float *reference, *total, *gap;
    Stats at(i64 i) const { return {reference + i, total + i, gap ? gap + i : nullptr}; }
};

inline void clear(Stats sums, i64 count) {
    for (i64 i = 0; i < count; ++i) {
        sums.reference[i] = LOWEST;
        sums.total[i] = 0;
        if (sums.gap) sums.gap[i] = 0;
    }
}

inline void copy(Stats from, Stats to, i64 count) {
    const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
    std::memcpy(to.reference, from.reference, bytes);
    std::memcpy(to.total, from.total, bytes);
}

// Merges `part` into `into`, element by element. `count`: a whole number of vectors.
inline void merge(Stats into, Stats part, i64 count) {
    for (i64 i = 0; i < count; i += W) {
        const Floats ours = load(into.reference + i), theirs = load(part.reference + i);
        const Floats reference = larger(ours, theirs);
        const Floats shrink_ours = exp(ours - reference), shrink_theirs = exp(theirs - reference);
        store(into.reference + i, reference);
        store(into.total + i, load(into.total + i) * shrink_ours + load(part.total + i) * shrink_theirs);
        if (into.gap) store(into.gap + i, load(into.gap + i) * shrink_ours + load(part.gap + i) * shrink_theirs);
    }
}

// Here and below, `width` is the number of columns of a tile rounded up to whole vectors; those beyond it are neither
// read nor written.

// Writes the largest entry of each row and column of a tile; LOWEST where all are excluded.
inline void find_largest(const float* tile, i64 rows, i64 width, float* of_rows, float* of_columns) {
    for (i64 j = 0; j < TILE_COLUMNS; j += W) store(of_columns + j, all(LOWEST));
    i64 i = 0;
    for (; i + 4 <= rows; i += 4) {
        const float* row = tile + i * TILE_COLUMNS;
        Floats top[4] = {all(LOWEST), all(LOWEST), all(LOWEST), all(LOWEST)};
        for (i64 j = 0; j < width; j += W) {
            Floats column = load(of_columns + j);
            for (int r = 0; r < 4; ++r) {
                const Floats entry = load(row + r * TILE_COLUMNS + j);
                top[r] = larger(top[r], entry);
                column = larger(column, entry);
            }
            store(of_columns + j, column);
        }
        for (int r = 0; r < 4; ++r) of_rows[i + r] = largest(top[r]);
    }
    for (; i < rows; ++i) {
        Floats top = all(LOWEST);
        for (i64 j = 0; j < width; j += W) {
            const Floats entry = load(tile + i * TILE_COLUMNS + j);
            top = larger(top, entry);
            store(of_columns + j, larger(load(of_columns + j), entry));
        }
        of_rows[i] = largest(top);
    }
}

// The reference of a whole tile; not `shared` where some row or column is out of its reach.
struct Reference {
    float value;
    bool shared;
};

// Finds it from the largest entries, ignoring LOWEST: rows without entries.
inline Reference shared_reference(const float* of_rows, i64 rows, const float* of_columns) {
    float top = LOWEST, bottom = FLT_MAX;
    for (i64 i = 0; i < rows; ++i) {
        top = larger(top, of_rows[i]);
        if (of_rows[i] != LOWEST) bottom = smaller(bottom, of_rows[i]);
    }
    for (i64 j = 0; j < TILE_COLUMNS; ++j)
        if (of_columns[j] != LOWEST) bottom = smaller(bottom, of_columns[j]);
    return {top, bottom >= top - REACH};
}

template <bool GAP>
inline void write_columns(Stats of_columns, const float* total, const float* gap) {
    std::memcpy(of_columns.total, total, TILE_COLUMNS * sizeof *total);
    if constexpr (GAP) std::memcpy(of_columns.gap, gap, TILE_COLUMNS * sizeof *gap);
}

// Writes the statistics of a tile that has a shared reference.
//
// GAP: `other` is S, and the gap is summed; tile and other are equal where entries are excluded. STORE: the
// exponentials are written to the tile `kept`.
template <bool GAP, bool STORE>
inline void write_shared_stats(const float* tile, float* kept, const float* other, float shift, i64 rows, i64 width,
                               Reference c, Stats of_rows, Stats of_columns, const float* row_top,
                               const float* column_top) {
    alignas(64) float total[TILE_COLUMNS] = {}, gap[GAP ? TILE_COLUMNS : W] = {};
    for (i64 i = 0; i < rows; i += 2) {
        const bool second = i + 1 < rows;  // an odd last row is read twice but counted once
        const float* row[2] = {tile + i * TILE_COLUMNS, tile + (i + second) * TILE_COLUMNS};
        Floats sum_of[2] = {}, gap_of[2] = {};
        for (i64 j = 0; j < width; j += W) {
            Floats column_total = load(total + j), column_gap{};
            if constexpr (GAP) column_gap = load(gap + j);
            for (int r = 0; r < 2; ++r) {
                if (r == 1 && !second) break;
                const Floats entry = load(row[r] + j), e = exp(entry - c.value);
                sum_of[r] += e;
                column_total += e;
                if constexpr (GAP) {
                    const Floats weighted = e * ((entry - load(other + (row[r] - tile) + j)) - shift);
                    gap_of[r] += weighted;
                    column_gap += weighted;
                }
                if constexpr (STORE) store(kept + (row[r] - tile) + j, e);
            }
            store(total + j, column_total);
            if constexpr (GAP) store(gap + j, column_gap);
        }
        for (int r = 0; r < 1 + second; ++r) {
            of_rows.reference[i + r] = row_top[i + r] == LOWEST ? LOWEST : c.value;
            of_rows.total[i + r] = sum(sum_of[r]);
            if constexpr (GAP) of_rows.gap[i + r] = sum(gap_of[r]);
        }
    }
    for (i64 j = 0; j < TILE_COLUMNS; ++j) of_columns.reference[j] = column_top[j] == LOWEST ? LOWEST : c.value;
    write_columns<GAP>(of_columns, total, gap);
}

// Writes the statistics of a tile with a reference for each row and column: two exponentials for each entry.
template <bool GAP>
inline void write_separate_stats(const float* tile, const float* other, float shift, i64 rows, i64 width, Stats of_rows,
                                 Stats of_columns, float* row_top, float* column_top) {
    alignas(64) float total[TILE_COLUMNS] = {}, gap[TILE_COLUMNS] = {};
    for (i64 i = 0; i < rows; ++i) {
        Floats row_total{}, row_gap{};
        for (i64 j = 0; j < width; j += W) {
            const Floats entry = load(tile + i * TILE_COLUMNS + j);
            // Relative to its own reference, LOWEST, a row or column without entries would give exp(0).
            const Floats by_row = row_top[i] == LOWEST ? Floats{} : exp(entry - row_top[i]);
            const Floats top = load(column_top + j);
            const Floats by_column = top == LOWEST ? Floats{} : exp(entry - top);
            row_total += by_row;
            store(total + j, load(total + j) + by_column);
            if constexpr (GAP) {
                const Floats difference = (entry - load(other + i * TILE_COLUMNS + j)) - shift;
                row_gap += by_row * difference;
                store(gap + j, load(gap + j) + by_column * difference);
            }
        }
        of_rows.reference[i] = row_top[i];
        of_rows.total[i] = sum(row_total);
        if constexpr (GAP) of_rows.gap[i] = sum(row_gap);
    }
    std::memcpy(of_columns.reference, column_top, sizeof total);
    write_columns<GAP>(of_columns, total, gap);
}

// The terms of one softmax for a tile: anchors and factors of its rows and columns.
struct TileSoftmax {
    const float *row_anchor, *row_factor, *column_anchor, *column_factor;
};

// The reference c for which exp(S - c) times factor exp(c - anchor) serves rows and columns. Every entry is at most the
// anchor of its row and of its column, so that nothing overflows.
inline Reference shared_anchor(const TileSoftmax& softmax, i64 rows, i64 columns) {
    float top_row = LOWEST, top_column = LOWEST, bottom = FLT_MAX;
    for (i64 i = 0; i < rows; ++i) {
        top_row = larger(top_row, softmax.row_anchor[i]);
        bottom = smaller(bottom, softmax.row_anchor[i]);
    }
    for (i64 j = 0; j < columns; ++j) {
        top_column = larger(top_column, softmax.column_anchor[j]);
        bottom = smaller(bottom, softmax.column_anchor[j]);
    }
    const float c = smaller(top_row, top_column);
    return {c, bottom >= c - REACH};
}

inline bool within_reach(const TileSoftmax& softmax, i64 rows, i64 columns, float c) {
    bool within = true;
    for (i64 i = 0; i < rows; ++i) within &= softmax.row_anchor[i] >= c - REACH;
    for (i64 j = 0; j < columns; ++j) within &= softmax.column_anchor[j] >= c - REACH;
    return within;
}

// out = factor exp(c - anchor) for `count` elements, then zeros up to a whole number of vectors.
inline void move_factors(const float* anchor, const float* factor, i64 count, float c, float* out) {
    alignas(64) float difference[W], scaled[W];
    for (i64 i = 0; i < count; i += W) {
        const i64 now = smaller(W, count - i);
        for (i64 lane = 0; lane < W; ++lane) {
            difference[lane] = lane < now ? c - anchor[i + lane] : 0;
            scaled[lane] = lane < now ? factor[i + lane] : 0;
        }
        store(out + i, load(scaled) * exp(load(difference)));
    }
}

struct Factors {
    alignas(64) float row[TILE_ROWS];
    alignas(64) float column[TILE_COLUMNS];

    void move(const TileSoftmax& softmax, i64 rows, i64 columns, float c) {
        move_factors(softmax.row_anchor, softmax.row_factor, rows, c, row);
        for (i64 j = columns / W * W; j < TILE_COLUMNS; ++j) column[j] = 0;
        move_factors(softmax.column_anchor, softmax.column_factor, columns, c, column);
    }
};

// ds (+)= exp(S - c) (row factor + column factor), without entries of equal groups if MASKED. EXPONENTIALS: `tile`
// holds exp(S - c) already.
template <bool EXPONENTIALS, bool MASKED>
inline void add_shared(const float* tile, i64 rows, i64 width, float c, const Factors& factors, Groups groups,
                       float* ds, bool add) {
    for (i64 i = 0; i < rows; ++i) {
        const float* row = tile + i * TILE_COLUMNS;
        float* to = ds + i * TILE_COLUMNS;
        const float factor = factors.row[i];
        for (i64 j = 0; j < width; j += W) {
            const Floats e = EXPONENTIALS ? load(row + j) : exp(load(row + j) - c);
            Floats gradient = e * (load(factors.column + j) + factor);
            if constexpr (MASKED) gradient = load(groups.columns + j) == groups.rows[i] ? Floats{} : gradient;
            store(to + j, add ? load(to + j) + gradient : gradient);
        }
    }
}

// Writes dS of a tile with a teacher and no groups, the common case, in one pass.
template <bool EXPONENTIALS>
inline void write_both(const float* student, const float* teacher, i64 rows, i64 width, float c, float c_teacher,
                       const Factors& f, const Factors& g, float* ds) {
    for (i64 i = 0; i < rows; ++i) {
        const i64 at = i * TILE_COLUMNS;
        const float f_row = f.row[i], g_row = g.row[i];
        for (i64 j = 0; j < width; j += W) {
            Floats e = load(student + at + j), t = load(teacher + at + j);
            if constexpr (!EXPONENTIALS) e = exp(e - c), t = exp(t - c_teacher);
            store(ds + at + j, e * (load(f.column + j) + f_row) + t * (load(g.column + j) + g_row));
        }
    }
}

// Like add_shared, from entries, with two exponentials for each.
template <bool MASKED>
inline void add_separate(const float* tile, i64 rows, i64 columns, const TileSoftmax& softmax, Groups groups, float* ds,
                         bool add) {
    const i64 width = round_up(columns, W);
    alignas(64) float anchor[TILE_COLUMNS] = {}, factor[TILE_COLUMNS] = {};
    for (i64 j = 0; j < columns; ++j) {
        anchor[j] = softmax.column_anchor[j];
        factor[j] = softmax.column_factor[j];
    }
    for (i64 i = 0; i < rows; ++i) {
        float* to = ds + i * TILE_COLUMNS;
        for (i64 j = 0; j < width; j += W) {
            const Floats entry = load(tile + i * TILE_COLUMNS + j);
            // Excluded entries would exceed anchors computed without them.
            Floats by_row = entry - softmax.row_anchor[i], by_column = entry - load(anchor + j);
            if constexpr (MASKED) {
                const Ints same = load(groups.columns + j) == groups.rows[i];
                by_row = same ? all(LOWEST) : by_row;
                by_column = same ? all(LOWEST) : by_column;
            }
            const Floats gradient = exp(by_row) * softmax.row_factor[i] + exp(by_column) * load(factor + j);
            store(to + j, add ? load(to + j) + gradient : gradient);
        }
    }
}

}  // namespace CLIPERASE_ISA
}  // namespace cliperase
