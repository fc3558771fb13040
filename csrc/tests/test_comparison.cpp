// The comparison of cosines of the calibrated loss, against plain loops in double precision.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "batch.h"
#include "calibrated.h"
#include "expect.h"
#include "sweep.h"
#include "workspace.h"

namespace {

using cliperase::SimilarityInputs;
using Values = std::vector<float>;

constexpr std::int64_t WIDTH = 19, TEACHER_WIDTH = 11;
constexpr float SCALE = 3.0f, TEACHER_SCALE = -2.0f;

struct Block {
    std::int64_t n, m, pair_offset;
    bool edited, bfloat16;
    Values image, text, teacher_image, teacher_text, row_levels, column_levels;
    std::vector<std::uint16_t> halves[4];  // the features as bfloat16
    std::vector<std::int32_t> row_ids, column_ids;

    Block(std::int64_t rows, std::int64_t columns, std::int64_t offset, bool edits, bool half)
        : n(rows), m(columns), pair_offset(offset), edited(edits), bfloat16(half), image(rows * WIDTH), text(columns * WIDTH),
          teacher_image(rows * TEACHER_WIDTH), teacher_text(columns * TEACHER_WIDTH), row_levels(rows),
          column_levels(columns), row_ids(rows), column_ids(columns) {
        std::mt19937 random(3);
        std::normal_distribution<float> normal(0, 0.3f);
        for (Values* values : {&image, &text, &teacher_image, &teacher_text, &row_levels, &column_levels})
            for (float& x : *values) x = normal(random);
        std::vector<std::uint16_t>* to = halves;
        for (Values* values : {&image, &text, &teacher_image, &teacher_text}) {
            for (float& x : *values) {
                to->push_back(static_cast<std::uint16_t>(encode(Dtype::bfloat16, double(x))));
                if (bfloat16) x = static_cast<float>(decode(Dtype::bfloat16, to->back()));
            }
            ++to;
        }
        for (std::size_t i = 0; i < row_ids.size(); ++i) row_ids[i] = static_cast<std::int32_t>(i % 3);
        for (std::size_t j = 0; j < column_ids.size(); ++j) column_ids[j] = static_cast<std::int32_t>(j % 4);
    }
    SimilarityInputs inputs(int threads) const {
        SimilarityInputs in{};
        const auto matrix = [&](const Values& values, int number, std::int64_t width) {
            const void* const data = bfloat16 ? static_cast<const void*>(halves[number].data()) : values.data();
            return cliperase::Matrix{data, width, 1, bfloat16 ? Dtype::bfloat16 : Dtype::float32};
        };
        in.rows = n, in.columns = m, in.pair_offset = pair_offset, in.width = WIDTH, in.scale = SCALE;
        in.has_teacher = true, in.teacher_width = TEACHER_WIDTH, in.teacher_scale = TEACHER_SCALE;
        in.image = matrix(image, 0, WIDTH), in.text = matrix(text, 1, WIDTH), in.threads = threads;
        in.teacher_image = matrix(teacher_image, 2, TEACHER_WIDTH);
        in.teacher_text = matrix(teacher_text, 3, TEACHER_WIDTH);
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

// The gradients of image and text from dS, entry by entry, and what they may be off by.
struct Gradients {
    const Block& block;
    double rounding;
    std::vector<double> image, text, image_mass, text_mass;

    Gradients(const Block& of, const cliperase::IsaKernels& kernels)
        : block(of), rounding(rounding_of_ds(kernels)), image(of.n * WIDTH), text(of.m * WIDTH),
          image_mass(of.n * WIDTH), text_mass(of.m * WIDTH) {}
    void add(std::int64_t i, std::int64_t j, double ds) {
        for (std::int64_t k = 0; k < WIDTH; ++k) {
            const double of_image = double(SCALE) * ds * double(block.text[j * WIDTH + k]);
            const double of_text = double(SCALE) * ds * double(block.image[i * WIDTH + k]);
            image[i * WIDTH + k] += of_image, image_mass[i * WIDTH + k] += std::abs(of_image);
            text[j * WIDTH + k] += of_text, text_mass[j * WIDTH + k] += std::abs(of_text);
        }
    }
    void expect(const char* isa, const Values& grad_image, const Values& grad_text, double tolerance) const {
        compare("gradient of image", isa, grad_image, image, image_mass, tolerance);
        compare("gradient of text", isa, grad_text, text, text_mass, tolerance);
    }

  private:
    void compare(const char* what, const char* isa, const Values& found, const std::vector<double>& exact,
                 const std::vector<double>& mass, double tolerance) const {
        for (std::size_t at = 0; at < exact.size(); ++at)
            expect_within(what, isa, found[at], exact[at],
                          tolerance * (1 + std::abs(exact[at])) + rounding * mass[at]);
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

    std::vector<float> grad_image(n * WIDTH), grad_text(m * WIDTH), diagonal(n, 0.25f);
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
    Gradients gradients(block, kernels);
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
            gradients.add(i, j, gradient);
        }
    expect_close("forget squares", kernels.name, squares[0], forget, 1e-5);
    expect_close("anchor squares", kernels.name, squares[1], anchor, 1e-5);
    expect_close("sum of dS S", kernels.name, dot, of_scale, 1e-5);
    gradients.expect(kernels.name, grad_image, grad_text, 1e-4);
}

// The joint batch of a block's pairs, written entry by entry.
struct Joint {
    const Block& block;
    std::int64_t n, begin, end;
    bool groups;

    bool forgets(std::int64_t i) const { return begin <= i && i < end; }
    bool same(std::int64_t i, std::int64_t j) const {
        return groups ? block.row_ids[i] == block.row_ids[j] : forgets(i) && forgets(j);
    }
    bool edits(std::int64_t i, std::int64_t j) const { return forgets(j) && same(i, j); }
    bool retains(std::int64_t i, std::int64_t j) const {
        return !forgets(i) && !forgets(j) && (i == j || !groups || !same(i, j));
    }
    double target(std::int64_t i, std::int64_t j) const {
        if (edits(i, j)) return double(block.row_levels[i]) + double(block.column_levels[j]);
        return Block::cosine(block.teacher_image, block.teacher_text, TEACHER_WIDTH, i, j);
    }
    SimilarityInputs inputs(int threads) const {
        SimilarityInputs in = block.inputs(threads);
        const std::int32_t* const ids = groups ? block.row_ids.data() : nullptr;
        in.comparison.row_ids = in.comparison.column_ids = in.row_groups = in.column_groups = ids;
        in.comparison.joint = true, in.comparison.forget_begin = begin, in.comparison.forget_end = end;
        return in;
    }
};

// The terms of a joint batch, and the gradients of a weighted sum of them.
void check_joint(const cliperase::IsaKernels& kernels, const Joint& joint, std::int64_t cached_tiles, int threads) {
    const std::int64_t n = joint.n;
    const SimilarityInputs in = joint.inputs(threads);
    cliperase::check(in);
    const cliperase::Tiling tiles = cliperase::row_tiles(in);
    std::vector<float> own(n), teacher_own(n), rows(7 * n), columns(7 * n);
    std::vector<float> cache(tiles.tiles * cliperase::cache_row_bytes(in) / 4);
    float shift = 0, terms[4], factors[4];
    double squares[2] = {-1, -1};
    const cliperase::Forward out{own.data(), teacher_own.data(), rows.data(), columns.data(), &shift, cache.data(),
                                 tiles.start(std::min(cached_tiles, tiles.tiles)), squares};
    cliperase::check(in, out);
    const cliperase::Workspace scratch(kernels.forward_scratch(in));
    kernels.forward(in, out, scratch.data());
    std::vector<float> saved((cliperase::SAVED_STATS + 1) * 2 * n);
    cliperase::calibrated_terms(in, out, terms, factors, saved.data());

    const double weights[4] = {0.5, -1.25, 2, 0.75};
    std::vector<float> grad_image(n * WIDTH), grad_text(n * WIDTH), memory(cliperase::terms_size(in));
    double dot = 0;
    cliperase::Backward b{};
    b.cache = cache.data(), b.cached_rows = out.cached_rows, b.similarity_dot = &dot;
    b.grad_image = grad_image.data(), b.grad_text = grad_text.data();
    const double of_pairs = cliperase::calibrated_gradient_terms(in, saved.data(), weights, memory.data(), b);
    cliperase::check(in, b);
    const cliperase::Workspace more(kernels.backward_scratch(in, b));
    kernels.backward(in, b, more.data());

    std::vector<double> s(n * n), t(n * n);
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j < n; ++j) {
            s[i * n + j] = double(SCALE) * joint.block.student(i, j);
            t[i * n + j] = double(TEACHER_SCALE) * joint.target(i, j);
        }
    double sums[4] = {}, counts[4] = {2, 0, double(n), 0}, of_scale = 0;
    std::vector<double> ds(n * n);
    Gradients gradients(joint.block, kernels);
    for (const bool by_row : {true, false})
        for (std::int64_t i = 0; i < n; ++i) {
            const auto at = [&](std::int64_t j) { return by_row ? i * n + j : j * n + i; };
            double all = 0, of_teacher = 0, retained = 0;
            for (std::int64_t j = 0; j < n; ++j) {
                all += std::exp(s[at(j)]), of_teacher += std::exp(t[at(j)]);
                if (joint.retains(i, j)) retained += std::exp(s[at(j)]);
            }
            if (!joint.forgets(i)) sums[0] += std::log(retained) - s[at(i)], counts[0] += by_row ? 2 : 0;
            for (std::int64_t j = 0; j < n; ++j) {
                const double p = std::exp(s[at(j)]) / all, q = std::exp(t[at(j)]) / of_teacher;
                sums[2] += q * (std::log(q) - std::log(p));
                ds[at(j)] += weights[2] * (p - q);
                if (joint.retains(i, j)) ds[at(j)] += weights[0] * (std::exp(s[at(j)]) / retained - (i == j));
            }
        }
    counts[0] = std::max(2.0, counts[0] - 2);
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j < n; ++j) {
            const int term = joint.edits(i, j) ? 1 : 3;
            double d = joint.block.student(i, j) - joint.target(i, j);
            if (term == 1) d = std::max(d, 0.0);
            sums[term] += d * d, counts[term] += 1;
            of_scale += ds[i * n + j] * s[i * n + j];
            gradients.add(i, j, ds[i * n + j] + 2 * weights[term] * d / double(SCALE));
        }
    for (int term = 0; term < 4; ++term) {
        expect_close("factor", kernels.name, factors[term], counts[term] > 0 ? 1 / counts[term] : 0, 1e-6);
        expect_close("term", kernels.name, terms[term], counts[term] > 0 ? sums[term] / counts[term] : 0, 1e-5);
    }
    expect_close("sum of dS S", kernels.name, of_pairs + dot, of_scale, 1e-4);
    gradients.expect(kernels.name, grad_image, grad_text, 2e-4);
}

}  // namespace

void check_comparison(const cliperase::IsaKernels& kernels) {
    const bool half = kernels.for_any_dtype != nullptr;
    for (const bool keep : {false, true})
        for (const bool edited : {false, true}) {
            check_block(kernels, Block(300, 300, 0, edited, half), keep, 3);  // several tiles
            check_block(kernels, Block(17, 200, 100, edited, half), keep, 1);      // own rows among other columns
            check_block(kernels, Block(5, 130, 130, edited, half), keep, 2);       // other columns only
        }
    const Block several(400, 400, 0, true, half), few(5, 5, 0, true, half);
    for (const bool groups : {false, true}) {
        for (const std::int64_t cached_tiles : {0, 1, 9}) {
            check_joint(kernels, {several, 400, 0, 70, groups}, cached_tiles, 3);     // to forget first
            check_joint(kernels, {several, 400, 300, 400, groups}, cached_tiles, 1);  // last
        }
        check_joint(kernels, {several, 400, 0, 256, groups}, 1, 2);  // whole tiles
        check_joint(kernels, {several, 400, 0, 131, groups}, 0, 2);  // tiles of an odd length, and some after them
        check_joint(kernels, {several, 400, 261, 400, groups}, 1, 3);
        for (const std::int64_t end : {0, 1, 4, 5}) check_joint(kernels, {few, 5, 0, end, groups}, 1, 1);
    }
}
