// The comparison of cosines of the calibrated loss, against plain loops in double precision.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "expect.h"
#include "sweep.h"
#include "workspace.h"

namespace {

using cliperase::SimilarityInputs;

constexpr std::int64_t WIDTH = 19, TEACHER_WIDTH = 11;
constexpr float SCALE = 3.0f, TEACHER_SCALE = -2.0f;

struct Block {
    std::int64_t n, m, pair_offset;
    bool edited;
    std::vector<float> image, text, teacher_image, teacher_text, row_levels, column_levels;
    std::vector<std::int32_t> row_ids, column_ids;

    Block(std::int64_t rows, std::int64_t columns, std::int64_t offset, bool edits)
        : n(rows), m(columns), pair_offset(offset), edited(edits), image(rows * WIDTH), text(columns * WIDTH),
          teacher_image(rows * TEACHER_WIDTH), teacher_text(columns * TEACHER_WIDTH), row_levels(rows),
          column_levels(columns), row_ids(rows), column_ids(columns) {
        std::mt19937 random(3);
        std::normal_distribution<float> normal(0, 0.3f);
        for (std::vector<float>* values : {&image, &text, &teacher_image, &teacher_text, &row_levels, &column_levels})
            for (float& x : *values) x = normal(random);
        for (std::size_t i = 0; i < row_ids.size(); ++i) row_ids[i] = static_cast<std::int32_t>(i % 3);
        for (std::size_t j = 0; j < column_ids.size(); ++j) column_ids[j] = static_cast<std::int32_t>(j % 4);
    }
    SimilarityInputs inputs(int threads) const {
        SimilarityInputs in{};
        const auto matrix = [](const std::vector<float>& values, std::int64_t width) {
            return cliperase::Matrix{values.data(), width, 1, cliperase::Dtype::float32};
        };
        in.rows = n, in.columns = m, in.pair_offset = pair_offset, in.width = WIDTH, in.scale = SCALE;
        in.has_teacher = true, in.teacher_width = TEACHER_WIDTH, in.teacher_scale = TEACHER_SCALE;
        in.image = matrix(image, WIDTH), in.text = matrix(text, WIDTH), in.threads = threads;
        in.teacher_image = matrix(teacher_image, TEACHER_WIDTH), in.teacher_text = matrix(teacher_text, TEACHER_WIDTH);
        in.comparison.wanted = true;
        if (edited) {
            in.comparison.row_ids = row_ids.data(), in.comparison.column_ids = column_ids.data();
            in.comparison.row_levels = row_levels.data(), in.comparison.column_levels = column_levels.data();
        }
        return in;
    }
    static double cosine(const std::vector<float>& rows, const std::vector<float>& columns, std::int64_t width,
                         std::int64_t i, std::int64_t j) {
        return std::inner_product(rows.begin() + i * width, rows.begin() + (i + 1) * width, columns.begin() + j * width,
                                  0.0);
    }
    double student(std::int64_t i, std::int64_t j) const { return cosine(image, text, WIDTH, i, j); }
    bool edits(std::int64_t i, std::int64_t j) const { return edited && row_ids[i] == column_ids[j]; }
    double target(std::int64_t i, std::int64_t j) const {
        if (edits(i, j)) return double(row_levels[i]) + double(column_levels[j]);
        return cosine(teacher_image, teacher_text, TEACHER_WIDTH, i, j);
    }
};

// The squares, then the gradients of the pull alone, and the sum of dS S for dS_ij = exp(S_ij - 4) / 8.
void check_block(const cliperase::IsaKernels& kernels, const Block& block, bool keep, int threads) {
    const std::int64_t n = block.n, m = block.m;
    const SimilarityInputs in = block.inputs(threads);
    cliperase::check(in);
    std::vector<float> own(n), teacher_own(n), rows(5 * n), columns(5 * m);
    std::vector<float> cache(keep ? (n + 255) / 256 * cliperase::cache_row_bytes(in) / 4 : 0);
    float shift = 0;
    double squares[2] = {-1, -1};
    const cliperase::Forward out{own.data(), teacher_own.data(), rows.data(), columns.data(), &shift, cache.data(),
                                 keep ? n : 0, squares};
    cliperase::check(in, out);
    const cliperase::Workspace scratch(kernels.forward_scratch(in));
    kernels.forward(in, out, scratch.data());

    const std::int64_t stride = cliperase::gradient_stride(WIDTH);
    std::vector<float> grad_image(n * stride), grad_text(m * stride), diagonal(n, 0.25f);
    const std::vector<float> row_anchor(n, 4), column_anchor(m, 4), factor(n, 0.125f), none(std::max(n, m), 0.0f);
    double dot = 0;
    cliperase::Backward b{};
    b.student = {row_anchor.data(), column_anchor.data(), factor.data(), none.data()};
    b.teacher = {row_anchor.data(), column_anchor.data(), none.data(), none.data()};
    b.diagonal = diagonal.data(), b.cache = cache.data(), b.cached_rows = out.cached_rows;
    b.grad_image = grad_image.data(), b.grad_text = grad_text.data();
    b.pull_forget = 0.5f, b.pull_anchor = -0.75f, b.similarity_dot = &dot;
    cliperase::check(in, b);
    const cliperase::Workspace more(kernels.backward_scratch(in, b));
    kernels.backward(in, b, more.data());

    double forget = 0, anchor = 0, of_scale = 0;
    std::vector<double> of_image(n * WIDTH), of_text(m * WIDTH);
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j < m; ++j) {
            const double difference = block.student(i, j) - block.target(i, j), above = std::max(difference, 0.0);
            const double s = double(SCALE) * block.student(i, j);
            double gradient = 0.25;
            if (j == block.pair_offset + i) {
                expect_close("own teacher", kernels.name, teacher_own[i], double(TEACHER_SCALE) * block.target(i, j),
                             1e-5);
            } else {
                (block.edits(i, j) ? forget : anchor) += block.edits(i, j) ? above * above : difference * difference;
                gradient = 0.125 * std::exp(s - 4);
                of_scale += gradient * s;
                gradient += block.edits(i, j) ? 0.5 * above : -0.75 * difference;
            }
            for (std::int64_t k = 0; k < WIDTH; ++k) {
                of_image[i * WIDTH + k] += double(SCALE) * gradient * double(block.text[j * WIDTH + k]);
                of_text[j * WIDTH + k] += double(SCALE) * gradient * double(block.image[i * WIDTH + k]);
            }
        }
    expect_close("forget squares", kernels.name, squares[0], forget, 1e-5);
    expect_close("anchor squares", kernels.name, squares[1], anchor, 1e-5);
    expect_close("sum of dS S", kernels.name, dot, of_scale, 1e-5);
    for (std::int64_t k = 0; k < WIDTH; ++k) {
        for (std::int64_t i = 0; i < n; ++i)
            expect_close("pulled image", kernels.name, grad_image[i * stride + k], of_image[i * WIDTH + k], 1e-4);
        for (std::int64_t j = 0; j < m; ++j)
            expect_close("pulled text", kernels.name, grad_text[j * stride + k], of_text[j * WIDTH + k], 1e-4);
    }
}

}  // namespace

void check_comparison(const cliperase::IsaKernels& kernels) {
    for (const bool keep : {false, true})
        for (const bool edited : {false, true}) {
            check_block(kernels, Block(300, 300, 0, edited), keep, 3);  // several tiles
            check_block(kernels, Block(17, 200, 100, edited), keep, 1);      // own rows among other columns
            check_block(kernels, Block(5, 130, 130, edited), keep, 2);       // other columns only
        }
}
