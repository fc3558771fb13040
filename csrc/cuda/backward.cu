// A block of dL/dS from the products and the terms of the softmaxes, rounded to the dtype of the next products.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "tile.cuh"

namespace cliperase::cuda {
namespace {

constexpr int ROWS = 8, TILE_ROWS = WARPS * ROWS;

struct GradientArguments {
    Block block;
    Backward out;
    std::int64_t column_tiles;
};

__device__ void store(const Backward& out, std::int64_t offset, const float (&values)[VECTOR]) {
    if (out.dtype == Dtype::float32) {
        *reinterpret_cast<float4*>(static_cast<float*>(out.gradient) + offset) =
            make_float4(values[0], values[1], values[2], values[3]);
    } else if (out.dtype == Dtype::bfloat16) {
        alignas(8) __nv_bfloat162 pairs[2];
        pairs[0] = __floats2bfloat162_rn(values[0], values[1]);
        pairs[1] = __floats2bfloat162_rn(values[2], values[3]);
        *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(out.gradient) + offset) =
            *reinterpret_cast<uint2*>(pairs);
    } else {
        alignas(8) __half2 pairs[2];
        pairs[0] = __floats2half2_rn(values[0], values[1]);
        pairs[1] = __floats2half2_rn(values[2], values[3]);
        *reinterpret_cast<uint2*>(static_cast<__half*>(out.gradient) + offset) = *reinterpret_cast<uint2*>(pairs);
    }
}

// The terms of one softmax for a thread's columns; anchors in units of log 2.
struct ColumnTerms {
    float anchor[VECTOR], factor[VECTOR];

    __device__ ColumnTerms(const GradientArguments& a, int term, std::int64_t column) {
        const float* from = a.out.column_terms + 2 * term * a.out.column_stride;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            const bool inside = column + c < a.block.columns;
            anchor[c] = inside ? from[column + c] * LOG2_E : 0.0F;
            factor[c] = inside ? from[a.out.column_stride + column + c] : 0.0F;
        }
    }
};

// Adds one softmax, of the row and of the columns, for the entries of a row.
__device__ void add_softmax(float (&sum)[VECTOR], const float (&entry)[VECTOR], const ColumnTerms& columns,
                            const GradientArguments& a, int term, std::int64_t row, const bool (&counts)[VECTOR]) {
    const float* from = a.out.row_terms + 2 * term * a.out.row_stride + row;
    const float anchor = from[0] * LOG2_E, factor = from[a.out.row_stride];
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        const float both = exp2f(entry[c] - anchor) * factor + exp2f(entry[c] - columns.anchor[c]) * columns.factor[c];
        sum[c] += counts[c] ? both : 0.0F;
    }
}

// Forms a thread's part of dS; with a comparison, returns its part of the sum of dS S, before the pull.
template <typename F>
__device__ float form_gradient(const GradientArguments& a, std::int64_t row, std::int64_t column) {
    const Block& block = a.block;
    const float scale = block.scalars[0] * LOG2_E, teacher_scale = F::teacher ? block.scalars[1] * LOG2_E : 0.0F;
    Piece<ROWS> student, teacher;  // with a comparison the products, else S and S°
    student.load(block.student, block.leading, row, column, block, F::compared ? 1.0F : scale);
    if (F::teacher)
        teacher.load(block.teacher, block.leading, row, column, block, F::compared ? 1.0F : teacher_scale);

    constexpr int masked_term = int(F::plain), teacher_term = F::students;
    const ColumnTerms plain_columns(a, 0, column), masked_columns(a, F::masked ? masked_term : 0, column);
    const ColumnTerms teacher_columns(a, F::teacher ? teacher_term : 0, column);
    const ColumnEdit<F::edited> edit(block, column);
    float dot = 0.0F;  // in units of log 2
    std::int64_t ids[VECTOR];
    if (F::masked) {
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) ids[c] = column + c < block.columns ? block.column_groups[column + c] : 0;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const std::int64_t i = row + r;
        if (i >= block.rows) break;
        float sum[VECTOR] = {0.0F, 0.0F, 0.0F, 0.0F};
        const bool all[VECTOR] = {true, true, true, true};
        float pull[VECTOR] = {0.0F, 0.0F, 0.0F, 0.0F};
        if (F::compared) {
            const RowEdit<F::edited> of_row(block, i);
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) {
                const bool edited = of_row.edit(edit, c, teacher.entry[r][c]);
                const float difference = student.entry[r][c] - teacher.entry[r][c];
                pull[c] = edited ? above(difference) * a.out.pull[0] : difference * a.out.pull[1];
                student.entry[r][c] *= scale, teacher.entry[r][c] *= teacher_scale;
            }
        }
        if (F::plain) add_softmax(sum, student.entry[r], plain_columns, a, 0, i, all);
        if (F::masked) {
            const std::int64_t id = block.row_groups[i];
            const bool others[VECTOR] = {ids[0] != id, ids[1] != id, ids[2] != id, ids[3] != id};
            add_softmax(sum, student.entry[r], masked_columns, a, masked_term, i, others);
        }
        if (F::teacher) add_softmax(sum, teacher.entry[r], teacher_columns, a, teacher_term, i, all);
        const std::int64_t ahead = i + block.pair_offset - column;  // from `column` to the pair of row i
        if (F::compared) {
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) {
                dot += column + c < block.columns && c != ahead ? sum[c] * student.entry[r][c] : 0.0F;
                sum[c] += pull[c];
            }
        }
        if (ahead >= 0 && ahead < VECTOR) {
#pragma unroll
            for (int c = 0; c < VECTOR; ++c)
                if (c == ahead) sum[c] = a.out.diagonal[i];
        }
        store(a.out, i * a.out.gradient_leading + column, sum);
    }
    return dot;
}

template <typename F>
__global__ void __launch_bounds__(THREADS) backward_kernel(const GradientArguments a) {
    extern __shared__ float4 shared_vectors[];
    const std::int64_t row = blockIdx.x / a.column_tiles * TILE_ROWS + (threadIdx.x / WARP) * ROWS;
    const std::int64_t column = blockIdx.x % a.column_tiles * TILE_COLUMNS + (threadIdx.x % WARP) * VECTOR;
    float dot = 0.0F;
    if (row < a.block.rows && column < a.block.columns) dot = form_gradient<F>(a, row, column);
    if (F::compared) store_sum(reinterpret_cast<float*>(shared_vectors), dot * LN_2, a.out.dots + blockIdx.x);
}

}  // namespace

std::int64_t backward_programs(const Block& block) {
    check(block);
    return divide_up(block.rows, TILE_ROWS) * divide_up(block.columns, TILE_COLUMNS);
}

void backward(const Block& block, const Backward& out, std::uintptr_t stream) {
    check(block);
    if (out.row_terms == nullptr || out.column_terms == nullptr || out.diagonal == nullptr || out.gradient == nullptr)
        throw std::invalid_argument("the address of the terms, the diagonal or the gradient is null");
    if (out.row_stride < block.rows || out.column_stride < block.columns)
        throw std::invalid_argument("the terms overlap: their stride must be at least the block's rows or columns");
    const std::uintptr_t vector_bytes = out.dtype == Dtype::float32 ? 16 : 8;
    if (out.gradient_leading % VECTOR != 0 || out.gradient_leading < divide_up(block.columns, VECTOR) * VECTOR ||
        reinterpret_cast<std::uintptr_t>(out.gradient) % vector_bytes != 0)
        throw std::invalid_argument("rows of the gradient must begin at multiples of 4 entries and hold the columns");
    if (block.comparison.wanted && (out.pull == nullptr || out.dots == nullptr))
        throw std::invalid_argument("the address of the pull or of the dots is null");
    const std::int64_t column_tiles = divide_up(block.columns, TILE_COLUMNS);
    const unsigned programs = grid_size(backward_programs(block));
    const GradientArguments arguments{block, out, column_tiles};
    with_form(block, [&](auto form) {
        using F = decltype(form);
        launch(backward_kernel<F>, "backward_kernel", dim3(programs), F::compared ? THREADS * sizeof(float) : 0, stream,
               arguments);
    });
}

}  // namespace cliperase::cuda
