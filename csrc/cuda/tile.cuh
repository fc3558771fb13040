// Shared by the kernels. A block of threads processes a tile of 128 columns; each of its 8 warps some rows of it, and
// each thread 4 adjacent columns of these.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace cliperase::cuda {

constexpr int TILE_COLUMNS = WARP * VECTOR;

// Stands for log 0: finite, so that no difference is NaN, and far below every logit.
constexpr float LOWEST = -1.0e30F;
constexpr float LOG2_E = 1.4426950408889634F, LN_2 = 0.6931471805599453F;

__host__ __device__ constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

__device__ inline float at(const float4& v, int k) { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }

// A thread's part of a tile, in units of log 2.
template <int ROWS>
struct Piece {
    float entry[ROWS][VECTOR];

    __device__ void load(const float* from, std::int64_t leading, std::int64_t row, std::int64_t column,
                         const Block& block, float scale) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float4 read = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
            if (row + r < block.rows && column < block.columns)
                read = *reinterpret_cast<const float4*>(from + (row + r) * leading + column);
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) entry[r][c] = at(read, c) * scale;
        }
    }

    // Excluded entries stay so.
    __device__ void multiply(float scale) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) entry[r][c] *= entry[r][c] == LOWEST ? 1.0F : scale;
        }
    }
};

// The ids and levels of a thread's columns, see `Comparison`; 0 outside of the block and where no entry is edited.
template <bool Edited>
struct ColumnEdit {
    std::int64_t id[VECTOR];
    float level[VECTOR];

    __device__ ColumnEdit(const Block& block, std::int64_t column) {
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            const bool inside = Edited && column + c < block.columns;
            id[c] = inside ? block.comparison.column_ids[column + c] : 0;
            level[c] = inside ? block.comparison.column_levels[column + c] : 0.0F;
        }
    }
};

template <bool Edited>
struct RowEdit {
    std::int64_t id = 0;
    float level = 0.0F;

    __device__ RowEdit(const Block& block, std::int64_t row) {
        if (Edited && row < block.rows) id = block.comparison.row_ids[row], level = block.comparison.row_levels[row];
    }
    // Whether the entry in column c is edited, which is done first; excluded entries are not.
    __device__ bool edit(const ColumnEdit<Edited>& columns, int c, float& teacher) const {
        const bool edited = Edited && id == columns.id[c] && teacher != LOWEST;
        teacher = edited ? level + columns.level[c] : teacher;
        return edited;
    }
};

__device__ inline float above(float difference) { return difference < 0.0F ? 0.0F : difference; }  // NaN stays NaN

// Writes the sum of `value` over the threads, always added in the same order. All threads call it. shared: THREADS
// floats.
__device__ inline void store_sum(float* shared, float value, float* to) {
    __syncthreads();  // shared memory is no longer in use
    shared[threadIdx.x] = value;
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *to = shared[0];
}

// (maximum, total, gap), see `Stats`.
struct Partial {
    float maximum = LOWEST, total = 0.0F, gap = 0.0F;

    __device__ void add(const Partial& more) {
        const float common = fmaxf(maximum, more.maximum);
        const float keep = exp2f(maximum - common), take = exp2f(more.maximum - common);
        maximum = common;
        total = total * keep + more.total * take;
        gap = gap * keep + more.gap * take;
    }
};

}  // namespace cliperase::cuda
