// The CPU sweep of every instruction set that runs here against plain loops in double precision.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "checks.h"
#include "expect.h"
#include "sweep.h"
#include "workspace.h"

#if defined(CLIPERASE_X86)
namespace cliperase {
extern const Engine wide_engine;  // wide.cpp
}
#endif

namespace {

using cliperase::Backward;
using cliperase::Forward;
using cliperase::Matrix;
using cliperase::Problem;
using cliperase::Sigmoid;

struct Data {
    std::int64_t n, m, width;
    std::vector<float> image, text;
    Data(std::int64_t rows, std::int64_t columns, std::int64_t wide)
        : n(rows), m(columns), width(wide), image(rows * wide), text(columns * wide) {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        for (float& x : image) x = normal(random);
        for (float& x : text) x = normal(random);
    }
    Problem problem(std::int64_t first, int threads) const {
        Problem p{};
        p.rows = n, p.columns = m, p.first = first, p.width = width, p.scale = 0.5f, p.threads = threads;
        p.image = {image.data(), width, 1, cliperase::Dtype::float32};
        p.text = {text.data(), width, 1, cliperase::Dtype::float32};
        return p;
    }
    double similarity(std::int64_t i, std::int64_t j) const {
        const float *one = image.data() + i * width, *other = text.data() + j * width;
        return 0.5 * std::inner_product(one, one + width, other, 0.0);
    }
};

// Rows n of columns m, the first pair at `first`; sums, and the gradient of sum_i log sum_j exp(S_ij), its own pair left out.
void check_engine(const cliperase::Engine& engine, std::int64_t n, std::int64_t m, std::int64_t first, bool keep) {
    const Data data(n, m, 37);
    const Problem p = data.problem(first, 2);
    cliperase::check(p);
    std::vector<float> diagonal(n), rows(2 * n), columns(2 * m);
    const std::int64_t tiles = (n + 255) / 256 * ((m + 127) / 128);
    std::vector<float> kept(keep ? tiles * (16 + 256 * 128) : 0);
    float shift;
    const Forward out{diagonal.data(), nullptr, rows.data(), columns.data(), &shift, kept.data(), keep ? n : 0};
    cliperase::check(p, out);
    {
        const cliperase::Workspace scratch(engine.forward_scratch(p));
        engine.forward(p, out, scratch.data());
    }
    std::vector<double> row_lse(n), column_total(m);
    for (std::int64_t i = 0; i < n; ++i) {
        double total = 0;
        for (std::int64_t j = 0; j < m; ++j)
            if (j != first + i) {
                total += std::exp(data.similarity(i, j));
                column_total[j] += std::exp(data.similarity(i, j));
            }
        row_lse[i] = std::log(total);
        expect_close("row", engine.name, rows[i] + std::log(rows[n + i]), row_lse[i], 1e-5);
        if (p.paired()) expect_close("diagonal", engine.name, diagonal[i], data.similarity(i, first + i), 1e-5);
    }
    for (std::int64_t j = 0; j < m; ++j)
        if (column_total[j] > 0)
            expect_close("column", engine.name, columns[j] + std::log(columns[m + j]), std::log(column_total[j]), 1e-5);

    std::vector<float> row_anchor(row_lse.begin(), row_lse.end()), row_factor(n), column_anchor(m), column_factor(m, 0.0f);
    for (std::int64_t i = 0; i < n; ++i)
        row_factor[i] = static_cast<float>(std::exp(double(row_anchor[i]) - row_lse[i]));
    for (std::int64_t j = 0; j < m; ++j) column_anchor[j] = static_cast<float>(std::log(column_total[j] + 1e-30));
    const std::vector<float> zeros(n, 0.0f);
    const std::int64_t stride = cliperase::gradient_stride(data.width);
    std::vector<float> grad_image(n * stride), grad_text(m * stride);
    double grad_scale = 0;
    Backward b{};
    b.student = {row_anchor.data(), column_anchor.data(), row_factor.data(), column_factor.data()};
    b.diagonal = zeros.data(), b.kept = kept.data(), b.kept_rows = keep ? n : 0;
    b.grad_image = grad_image.data(), b.grad_text = grad_text.data(), b.grad_scale = &grad_scale;
    cliperase::check(p, b);
    {
        const cliperase::Workspace scratch(engine.backward_scratch(p, b));
        engine.backward(p, b, scratch.data());
    }
    std::vector<double> of_text(m * data.width);
    double of_scale = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        std::vector<double> of_image(data.width);
        for (std::int64_t j = 0; j < m; ++j) {
            const double p_ij = j == first + i ? 0 : std::exp(data.similarity(i, j) - row_lse[i]);
            of_scale += p_ij * data.similarity(i, j) / 0.5;
            for (std::int64_t k = 0; k < data.width; ++k) {
                of_image[k] += p_ij * double(data.text[j * data.width + k]);
                of_text[j * data.width + k] += 0.5 * p_ij * double(data.image[i * data.width + k]);
            }
        }
        for (std::int64_t k = 0; k < data.width; ++k)
            expect_close("gradient of image", engine.name, grad_image[i * stride + k], 0.5 * of_image[k], 1e-5);
    }
    for (std::int64_t j = 0; j < m; ++j)
        for (std::int64_t k = 0; k < data.width; ++k)
            expect_close("gradient of text", engine.name, grad_text[j * stride + k], of_text[j * data.width + k], 2e-5);
    expect_close("gradient of scale", engine.name, grad_scale, of_scale, 1e-4);
}

// The sigmoid loss of n rows and m columns with bias -0.25, and its gradients.
void check_sigmoid(const cliperase::Engine& engine, std::int64_t n, std::int64_t m, std::int64_t first) {
    const Data data(n, m, 37);
    const Problem p = data.problem(first, 2);
    const std::int64_t stride = cliperase::gradient_stride(data.width);
    std::vector<float> grad_image(n * stride), grad_text(m * stride);
    double loss = 0, only_loss = 0, grad_scale = 0, grad_bias = 0;
    const Sigmoid all{-0.25f, &loss, grad_image.data(), grad_text.data(), &grad_scale, &grad_bias};
    const Sigmoid none{-0.25f, &only_loss, nullptr, nullptr, nullptr, nullptr};
    for (const Sigmoid& s : {all, none}) {
        cliperase::check(p, s);
        const cliperase::Workspace scratch(engine.sigmoid_scratch(p, s));
        engine.sigmoid(p, s, scratch.data());
    }
    double total = 0, of_scale = 0, of_bias = 0;
    std::vector<double> of_text(m * data.width);
    for (std::int64_t i = 0; i < n; ++i) {
        std::vector<double> of_image(data.width);
        for (std::int64_t j = 0; j < m; ++j) {
            const double sign = j == first + i ? -1 : 1, y = sign * (data.similarity(i, j) - 0.25);
            const double slope = sign / (1 + std::exp(-y));
            total += y > 0 ? y + std::log1p(std::exp(-y)) : std::log1p(std::exp(y));
            of_bias += slope, of_scale += slope * data.similarity(i, j) / 0.5;
            for (std::int64_t k = 0; k < data.width; ++k) {
                of_image[k] += 0.5 * slope * double(data.text[j * data.width + k]);
                of_text[j * data.width + k] += 0.5 * slope * double(data.image[i * data.width + k]);
            }
        }
        for (std::int64_t k = 0; k < data.width; ++k)
            expect_close("sigmoid gradient of image", engine.name, grad_image[i * stride + k], of_image[k], 2e-5);
    }
    for (std::int64_t j = 0; j < m; ++j)
        for (std::int64_t k = 0; k < data.width; ++k)
            expect_close("sigmoid gradient of text", engine.name, grad_text[j * stride + k], of_text[j * data.width + k], 2e-5);
    expect_close("sigmoid loss", engine.name, loss, total, 1e-6);
    expect_close("sigmoid loss alone", engine.name, only_loss, loss, 0);
    expect_close("sigmoid gradient of scale", engine.name, grad_scale, of_scale, 1e-5);
    expect_close("sigmoid gradient of bias", engine.name, grad_bias, of_bias, 1e-5);
}

}  // namespace

// Of every engine that runs here; of those named, all of which must run.
int main(int count, char** names) {
    const cliperase::Engine *const chosen = cliperase::choose_engine(nullptr), *widest = nullptr;
    std::vector<const cliperase::Engine*> engines;
    for (const char* name : {"portable", "avx2", "avx512"})
        if (const cliperase::Engine* engine = cliperase::choose_engine(name)) engines.push_back(widest = engine);
    std::printf("chosen: %s\n", chosen ? chosen->name : "nothing");
    if (chosen == nullptr || chosen != widest || cliperase::choose_engine("abacus") != nullptr) fail("the choice", "dispatch");
#if defined(CLIPERASE_X86)
    if (cliperase::choose_engine("avx2") && !cliperase::choose_engine("avx512")) engines.push_back(&cliperase::wide_engine);
#endif
    if (count > 1) engines.clear();
    for (int at = 1; at < count; ++at) {
        const cliperase::Engine* const engine = cliperase::choose_engine(names[at]);
        engine ? engines.push_back(engine) : fail("does not run here", names[at]);
    }
    check_buffers();
    for (const cliperase::Engine* engine : engines) {
        for (const bool keep : {false, true}) {
            check_engine(*engine, 300, 300, 0, keep);   // two tiles of rows, three of columns
            check_engine(*engine, 17, 200, 100, keep);  // own rows among other columns
            check_engine(*engine, 5, 130, 130, keep);   // other columns only
        }
        check_sigmoid(*engine, 300, 300, 0);
        check_sigmoid(*engine, 17, 200, 100);
        check_sigmoid(*engine, 5, 130, 130);
    }
    check_losses(engines);
    for (const cliperase::Engine* engine : engines) std::printf("%s ", engine->name);
    std::printf("ran, %d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
