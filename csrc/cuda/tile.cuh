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
constexpr float LOG2_E = 1.4426950408889634F;

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
};

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
