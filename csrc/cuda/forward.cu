// Statistics of the rows and columns of a block, from one read of it, and their merging: no atomics, always in the same
// order.
#include <algorithm>
#include <stdexcept>

#include "tile.cuh"

namespace cliperase::cuda {
namespace {

constexpr int ROWS = 4, TILE_ROWS = WARPS * ROWS;
using Tile = Piece<ROWS>;
constexpr int PADDED_WARP = WARP + 1;   // keeps the threads that read a column of lanes in different banks
constexpr std::int64_t PROGRAMS = 528;  // four blocks of threads for each multiprocessor of an H100 or H200

struct Tiling {
    std::int64_t row_tiles, column_tiles, tiles_per_chunk, chunks;

    explicit Tiling(const Block& block)
        : row_tiles(divide_up(block.rows, TILE_ROWS)), column_tiles(divide_up(block.columns, TILE_COLUMNS)) {
        tiles_per_chunk = divide_up(column_tiles, std::min(column_tiles, divide_up(PROGRAMS, row_tiles)));
        chunks = divide_up(column_tiles, tiles_per_chunk);
    }
};

struct TileArguments {
    Block block;
    float *diagonal, *teacher_diagonal;
    float* row_partials;     // [chunks, stat_count, rows]
    float* column_partials;  // [row tiles, stat_count, columns]
    int chunks, tiles_per_chunk, column_tiles;
    float* squares;  // [2, programs]
    int programs;
};

// Shared memory: the warps' partials of columns, [kinds, 3, WARPS, TILE_COLUMNS]; then, one kind at a time, the lanes'
// partials of rows, [3, TILE_ROWS, PADDED_WARP]. Behind both, with a comparison: the threads' sums of squares, [2,
// THREADS], which would take registers that are short.
template <typename F>
struct SharedFloats {
    static constexpr int of_columns = F::kinds * 3 * WARPS * TILE_COLUMNS, of_rows = 3 * TILE_ROWS * PADDED_WARP;
    static constexpr int partials = of_columns > of_rows ? of_columns : of_rows;
    static constexpr int all = partials + (F::compared ? 2 * THREADS : 0);
};
static_assert(THREADS <= 3 * TILE_ROWS * PADDED_WARP, "store_sum uses the same memory");

__device__ void store(float* partials, std::int64_t part, int stats, std::int64_t positions, std::int64_t position,
                      int kind, bool has_gap, const Partial& partial) {
    float* to = partials + (part * stats + 2 * kind) * positions + position;
    to[0] = partial.maximum;
    to[positions] = partial.total;
    if (has_gap) to[2 * positions] = partial.gap;
}

// Merges partials in shared memory, whose maxima, totals and gaps are `stride` floats apart.
template <int Parts, int Stride>
__device__ Partial gather(const float* from, int stride, bool has_gap) {
    Partial merged;
#pragma unroll
    for (int part = 0; part < Parts; ++part) merged.maximum = fmaxf(merged.maximum, from[part * Stride]);
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
        const float take = exp2f(from[part * Stride] - merged.maximum);
        merged.total += from[stride + part * Stride] * take;
        if (has_gap) merged.gap += from[2 * stride + part * Stride] * take;
    }
    return merged;
}

// A thread's running statistics of its rows, over its own columns.
template <bool HasGap>
struct RowStats {
    float maximum[ROWS], total[ROWS], gap[HasGap ? ROWS : 1];

    __device__ RowStats() {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            maximum[r] = LOWEST, total[r] = 0.0F;
            if (HasGap) gap[r] = 0.0F;
        }
    }

    // `student` and `shift` are used for the gaps only.
    __device__ void add(const Tile& piece, const Tile& student, float shift) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const auto& e = piece.entry[r];
            const float common = fmaxf(maximum[r], fmaxf(fmaxf(e[0], e[1]), fmaxf(e[2], e[3])));
            const float keep = exp2f(maximum[r] - common);
            maximum[r] = common;
            total[r] *= keep;
            if (HasGap) gap[r] *= keep;
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) {
                const float exponential = exp2f(e[c] - common);
                total[r] += exponential;
                if (HasGap) gap[r] += exponential * (e[c] - student.entry[r][c] - shift);
            }
        }
    }
};

// Writes a thread's statistics of its columns, over its own rows, to shared memory.
template <bool HasGap>
__device__ void share_columns(float* shared, int kind, const Tile& piece, const Tile& student, float shift) {
    float maximum[VECTOR], total[VECTOR], gap[VECTOR];
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        maximum[c] = piece.entry[0][c], total[c] = 0.0F, gap[c] = 0.0F;
#pragma unroll
        for (int r = 1; r < ROWS; ++r) maximum[c] = fmaxf(maximum[c], piece.entry[r][c]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float exponential = exp2f(piece.entry[r][c] - maximum[c]);
            total[c] += exponential;
            if (HasGap) gap[c] += exponential * (piece.entry[r][c] - student.entry[r][c] - shift);
        }
    }
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float4* to = reinterpret_cast<float4*>(shared + (kind * 3 * WARPS + warp) * TILE_COLUMNS) + lane;
    constexpr int stride = WARPS * TILE_COLUMNS / VECTOR;
    to[0] = make_float4(maximum[0], maximum[1], maximum[2], maximum[3]);
    to[stride] = make_float4(total[0], total[1], total[2], total[3]);
    if (HasGap) to[2 * stride] = make_float4(gap[0], gap[1], gap[2], gap[3]);
}

// Merges the warps' column statistics in shared memory into the partials of this tile of rows.
template <typename F>
__device__ void store_columns(const float* shared, const TileArguments& a, int row_tile, int tile) {
    for (int task = threadIdx.x; task < F::kinds * TILE_COLUMNS; task += THREADS) {
        const int kind = task / TILE_COLUMNS, place = task % TILE_COLUMNS;
        const std::int64_t column = std::int64_t{tile} * TILE_COLUMNS + place;
        if (column >= a.block.columns) continue;
        const bool has_gap = kind == F::students;
        const float* from = shared + kind * 3 * WARPS * TILE_COLUMNS + place;
        const Partial merged = gather<WARPS, TILE_COLUMNS>(from, WARPS * TILE_COLUMNS, has_gap);
        store(a.column_partials, row_tile, 2 * F::kinds + int(F::teacher), a.block.columns, column, kind, has_gap,
              merged);
    }
}

// Merges the lanes' row statistics into the partials of this chunk of columns.
template <typename F, bool HasGap>
__device__ void store_rows(float* shared, const RowStats<HasGap>& rows, const TileArguments& a, int row_tile, int chunk,
                           int kind) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    constexpr int stride = TILE_ROWS * PADDED_WARP;
    __syncthreads();  // shared memory is no longer in use
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float* to = shared + (warp * ROWS + r) * PADDED_WARP + lane;
        to[0] = rows.maximum[r];
        to[stride] = rows.total[r];
        if (HasGap) to[2 * stride] = rows.gap[r];
    }
    __syncthreads();
    const std::int64_t row = std::int64_t{row_tile} * TILE_ROWS + threadIdx.x;
    if (threadIdx.x >= TILE_ROWS || row >= a.block.rows) return;
    const Partial merged = gather<WARP, 1>(shared + threadIdx.x * PADDED_WARP, stride, HasGap);
    store(a.row_partials, chunk, 2 * F::kinds + int(F::teacher), a.block.rows, row, kind, HasGap, merged);
}

// Edits the teacher's products, and adds the squares of C - C* to the thread's sums: of edited entries, where it is
// positive, to sums[0], and of the others to sums[THREADS]. Excluded entries are LOWEST in both.
template <bool Edited>
__device__ void add_squares(float* sums, const Tile& student, Tile& teacher, const Block& block, std::int64_t row,
                            std::int64_t column) {
    const ColumnEdit<Edited> columns(block, column);
    float forget = 0.0F, anchor = 0.0F;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const RowEdit<Edited> of_row(block, row + r);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            const bool edited = of_row.edit(columns, c, teacher.entry[r][c]);
            const float difference = student.entry[r][c] - teacher.entry[r][c];
            if (edited)
                forget += above(difference) * above(difference);
            else
                anchor += difference * difference;
        }
    }
    if (Edited) sums[0] += forget;
    sums[THREADS] += anchor;
}

// Distances between rows or columns matter up to the size of a tile's piece.
__device__ int clamped(std::int64_t distance) {
    constexpr int far = ROWS + VECTOR;
    return distance < -far ? -far : distance > far ? far : static_cast<int>(distance);
}

// Excludes entries outside of the block, and the diagonal, which is written first. ahead: from the pair of the first
// row to the first column.
template <typename F>
__device__ void exclude(Tile& student, Tile& teacher, const TileArguments& a, std::int64_t row, std::int64_t column,
                        int ahead) {
    const Block& block = a.block;
    const int rows = clamped(block.rows - row), columns = clamped(block.columns - column);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            const bool inside = r < rows && c < columns, paired = ahead + c == r;
            if (inside && paired) {
                const std::int64_t i = row + r, j = column + c;
                a.diagonal[i] = block.student[i * block.leading + j] * block.scalars[0];
                if (F::teacher) a.teacher_diagonal[i] = block.teacher[i * block.leading + j] * block.scalars[1];
                if (F::edited && block.comparison.row_ids[i] == block.comparison.column_ids[j])
                    a.teacher_diagonal[i] =
                        (block.comparison.row_levels[i] + block.comparison.column_levels[j]) * block.scalars[1];
            }
            if (!inside || paired) {
                student.entry[r][c] = LOWEST;
                if (F::teacher) teacher.entry[r][c] = LOWEST;
            }
        }
    }
}

// In place: what follows uses only the entries of different groups.
__device__ void exclude_groups(Tile& student, const Block& block, std::int64_t row, std::int64_t column) {
    std::int64_t ids[VECTOR];
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) ids[c] = column + c < block.columns ? block.column_groups[column + c] : 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const std::int64_t id = row + r < block.rows ? block.row_groups[row + r] : 0;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c)
            if (ids[c] == id) student.entry[r][c] = LOWEST;
    }
}

template <typename F>
__global__ void __launch_bounds__(THREADS, F::kinds == 3 ? 1 : 2) forward_kernel(const TileArguments a) {
    extern __shared__ float4 shared_vectors[];
    float* const shared = reinterpret_cast<float*>(shared_vectors);
    const Block& block = a.block;
    const int row_tile = static_cast<int>(blockIdx.x) / a.chunks, chunk = static_cast<int>(blockIdx.x) % a.chunks;
    const std::int64_t row = std::int64_t{row_tile} * TILE_ROWS + (threadIdx.x / WARP) * ROWS;
    RowStats<false> plain, masked;
    RowStats<true> with_gap;
    float* const squares = shared + SharedFloats<F>::partials + threadIdx.x;
    if (F::compared) squares[0] = 0.0F, squares[THREADS] = 0.0F;
    const int first = chunk * a.tiles_per_chunk;
    const int last = min(first + a.tiles_per_chunk, a.column_tiles);
    for (int tile = first; tile < last; ++tile) {
        const std::int64_t column = std::int64_t{tile} * TILE_COLUMNS + (threadIdx.x % WARP) * VECTOR;
        // Read again for each tile: they would take registers that are short.
        const float scale = block.scalars[0] * LOG2_E;
        const float teacher_scale = F::teacher ? block.scalars[1] * LOG2_E : 0.0F;
        // C - C* is formed before the scales, so that it is 0 for a student that equals its teacher.
        Tile student, teacher;
        student.load(block.student, block.leading, row, column, block, F::compared ? 1.0F : scale);
        if (F::teacher)
            teacher.load(block.teacher, block.leading, row, column, block, F::compared ? 1.0F : teacher_scale);
        const int ahead = clamped(column - (row + block.pair_offset));
        const bool crossed = ahead > -VECTOR && ahead < ROWS;
        if (crossed || row + ROWS > block.rows || column + VECTOR > block.columns)
            exclude<F>(student, teacher, a, row, column, ahead);
        if (F::compared) {
            add_squares<F::edited>(squares, student, teacher, block, row, column);
            student.multiply(scale);
            teacher.multiply(teacher_scale);
        }
        __syncthreads();  // the columns of the previous tile have been stored
        if (F::teacher) {
            const float shift = block.scalars[2] * LOG2_E;
            with_gap.add(teacher, student, shift);
            share_columns<true>(shared, F::students, teacher, student, shift);
        }
        if (F::plain) {
            plain.add(student, student, 0.0F);
            share_columns<false>(shared, 0, student, student, 0.0F);
        }
        if (F::masked) {
            exclude_groups(student, block, row, column);
            masked.add(student, student, 0.0F);
            share_columns<false>(shared, int(F::plain), student, student, 0.0F);
        }
        __syncthreads();
        store_columns<F>(shared, a, row_tile, tile);
    }
    if (F::plain) store_rows<F>(shared, plain, a, row_tile, chunk, 0);
    if (F::masked) store_rows<F>(shared, masked, a, row_tile, chunk, int(F::plain));
    if (F::teacher) store_rows<F>(shared, with_gap, a, row_tile, chunk, F::students);
    if (F::compared) {
        store_sum(shared, squares[0], a.squares + blockIdx.x);
        store_sum(shared, squares[THREADS], a.squares + a.programs + blockIdx.x);
    }
}

// Merges partials [parts, stat_count, positions] into statistics, of the rows and of the columns.
struct MergeSide {
    const float* partials;
    std::int64_t parts, positions;
    Stats stats;
};

struct MergeArguments {
    MergeSide rows, columns;
    int students;  // kinds before the teacher's, which has a gap
    int stat_count;
};

__global__ void __launch_bounds__(THREADS) merge_kernel(const MergeArguments a) {
    const bool of_rows = blockIdx.y == 0;
    const std::int64_t position = static_cast<std::int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    const std::int64_t positions = of_rows ? a.rows.positions : a.columns.positions;
    if (position >= positions) return;
    const std::int64_t parts = of_rows ? a.rows.parts : a.columns.parts;
    const std::int64_t stride = of_rows ? a.rows.stats.stride : a.columns.stats.stride;
    const bool fresh = of_rows ? a.rows.stats.fresh : a.columns.stats.fresh;
    const int kind = blockIdx.z;
    const bool has_gap = kind == a.students;
    float* const to = (of_rows ? a.rows.stats.data : a.columns.stats.data) + 2 * kind * stride + position;
    Partial merged;
    if (!fresh) {
        merged.maximum = to[0];
        merged.total = to[stride];
        if (has_gap) merged.gap = to[2 * stride];
    }
    const float* from = (of_rows ? a.rows.partials : a.columns.partials) + 2 * kind * positions + position;
    for (std::int64_t part = 0; part < parts; ++part, from += a.stat_count * positions) {
        Partial more;
        more.maximum = from[0];
        more.total = from[positions];
        if (has_gap) more.gap = from[2 * positions];
        merged.add(more);
    }
    to[0] = merged.maximum;
    to[stride] = merged.total;
    if (has_gap) to[2 * stride] = merged.gap;
}

}  // namespace

std::int64_t forward_workspace(const Block& block) {
    check(block);
    const Tiling tiling(block);
    return stat_count(block) * (tiling.chunks * block.rows + tiling.row_tiles * block.columns);
}

std::int64_t forward_programs(const Block& block) {
    check(block);
    const Tiling tiling(block);
    return tiling.row_tiles * tiling.chunks;
}

void forward(const Block& block, const Forward& out, std::uintptr_t stream) {
    check(block);
    const bool teacher = block.teacher != nullptr;
    if (out.workspace == nullptr || out.workspace_size < forward_workspace(block))
        throw std::invalid_argument("workspace is too small for this block; see forward_workspace");
    if (out.rows.data == nullptr || out.columns.data == nullptr || out.diagonal == nullptr ||
        (teacher && out.teacher_diagonal == nullptr))
        throw std::invalid_argument("the address of the statistics or of a diagonal is null");
    if (block.comparison.wanted && out.squares == nullptr)
        throw std::invalid_argument("the address of the squares is null");
    if (out.rows.stride < block.rows || out.columns.stride < block.columns)
        throw std::invalid_argument(
            "the statistics overlap: their stride must be at least the block's rows or columns");
    const Tiling tiling(block);
    const int stats = stat_count(block);
    float* const row_partials = out.workspace;
    float* const column_partials = row_partials + stats * tiling.chunks * block.rows;
    grid_size(tiling.column_tiles + tiling.tiles_per_chunk);  // must fit 32 bits
    const unsigned programs = grid_size(forward_programs(block));
    const TileArguments tile{block,
                             out.diagonal,
                             out.teacher_diagonal,
                             row_partials,
                             column_partials,
                             static_cast<int>(tiling.chunks),
                             static_cast<int>(tiling.tiles_per_chunk),
                             static_cast<int>(tiling.column_tiles),
                             out.squares,
                             static_cast<int>(programs)};
    with_form(block, [&](auto form) {
        using F = decltype(form);
        launch(forward_kernel<F>, "forward_kernel", dim3(programs),
               SharedFloats<F>::all * sizeof(float), stream, tile);
    });
    const MergeArguments merge{{row_partials, tiling.chunks, block.rows, out.rows},
                               {column_partials, tiling.row_tiles, block.columns, out.columns},
                               int(block.plain()) + int(block.masked()),
                               stats};
    const unsigned blocks = grid_size(divide_up(std::max(block.rows, block.columns), THREADS));
    launch(merge_kernel, "merge_kernel", dim3(blocks, 2, static_cast<unsigned>(stats / 2)), 0, stream, merge);
}

}  // namespace cliperase::cuda
