// The CPU sweep of every instruction set that runs here, compared with plain loops in double precision.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "expect.h"
#include "sweep.h"
#include "workspace.h"

namespace cliperase {
extern const IsaKernels emulated_bf16_kernels;  // emulated_bf16.cpp
#if defined(CLIPERASE_X86)
extern const IsaKernels wide_kernels;  // wide.cpp
#endif
}  // namespace cliperase

namespace {

using cliperase::Backward;
using cliperase::Forward;
using cliperase::Matrix;
using cliperase::Sigmoid;
using cliperase::SimilarityInputs;

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
    SimilarityInputs inputs(std::int64_t pair_offset, int threads) const {
        SimilarityInputs in{};
        in.rows = n, in.columns = m, in.pair_offset = pair_offset, in.width = width, in.scale = 0.5f,
        in.threads = threads;
        in.image = {image.data(), width, 1, cliperase::Dtype::float32};
        in.text = {text.data(), width, 1, cliperase::Dtype::float32};
        return in;
    }
    double similarity(std::int64_t i, std::int64_t j) const {
        const float *one = image.data() + i * width, *other = text.data() + j * width;
        return 0.5 * std::inner_product(one, one + width, other, 0.0);
    }
};

// The statistics of n rows and m columns, and the gradients of sum_i log sum_j exp(S_ij), without the pair of row i.
void check_kernels(const cliperase::IsaKernels& kernels, std::int64_t n, std::int64_t m, std::int64_t pair_offset,
                   bool keep) {
    const Data data(n, m, 37);
    const SimilarityInputs in = data.inputs(pair_offset, 2);
    cliperase::check(in);
    std::vector<float> diagonal(n), rows(2 * n), columns(2 * m);
    const std::int64_t tiles = (n + 255) / 256 * ((m + 127) / 128);
    std::vector<float> cache(keep ? tiles * (16 + 256 * 128) : 0);
    float shift;
    const Forward out{diagonal.data(), nullptr, rows.data(), columns.data(), &shift, cache.data(), keep ? n : 0};
    cliperase::check(in, out);
    {
        const cliperase::Workspace scratch(kernels.forward_scratch(in));
        kernels.forward(in, out, scratch.data());
    }
    std::vector<double> row_lse(n), column_total(m);
    for (std::int64_t i = 0; i < n; ++i) {
        double total = 0;
        for (std::int64_t j = 0; j < m; ++j)
            if (j != pair_offset + i) {
                total += std::exp(data.similarity(i, j));
                column_total[j] += std::exp(data.similarity(i, j));
            }
        row_lse[i] = std::log(total);
        expect_close("row", kernels.name, rows[i] + std::log(rows[n + i]), row_lse[i], 1e-5);
        if (in.paired()) expect_close("diagonal", kernels.name, diagonal[i], data.similarity(i, pair_offset + i), 1e-5);
    }
    for (std::int64_t j = 0; j < m; ++j)
        if (column_total[j] > 0)
            expect_close("column", kernels.name, columns[j] + std::log(columns[m + j]), std::log(column_total[j]),
                         1e-5);

    std::vector<float> row_anchor(row_lse.begin(), row_lse.end()), row_factor(n), column_anchor(m),
        column_factor(m, 0.0f);
    for (std::int64_t i = 0; i < n; ++i)
        row_factor[i] = static_cast<float>(std::exp(double(row_anchor[i]) - row_lse[i]));
    for (std::int64_t j = 0; j < m; ++j) column_anchor[j] = static_cast<float>(std::log(column_total[j] + 1e-30));
    const std::vector<float> zeros(n, 0.0f);
    std::vector<float> grad_image(n * data.width), grad_text(m * data.width);
    double grad_scale = 0;
    Backward b{};
    b.student = {row_anchor.data(), column_anchor.data(), row_factor.data(), column_factor.data()};
    b.diagonal = zeros.data(), b.cache = cache.data(), b.cached_rows = keep ? n : 0;
    b.grad_image = grad_image.data(), b.grad_text = grad_text.data(), b.grad_scale = &grad_scale;
    cliperase::check(in, b);
    {
        const cliperase::Workspace scratch(kernels.backward_scratch(in, b));
        kernels.backward(in, b, scratch.data());
    }
    std::vector<double> of_text(m * data.width);
    double of_scale = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        std::vector<double> of_image(data.width);
        for (std::int64_t j = 0; j < m; ++j) {
            const double p_ij = j == pair_offset + i ? 0 : std::exp(data.similarity(i, j) - row_lse[i]);
            of_scale += p_ij * data.similarity(i, j) / 0.5;
            for (std::int64_t k = 0; k < data.width; ++k) {
                of_image[k] += p_ij * double(data.text[j * data.width + k]);
                of_text[j * data.width + k] += 0.5 * p_ij * double(data.image[i * data.width + k]);
            }
        }
        for (std::int64_t k = 0; k < data.width; ++k)
            expect_close("gradient of image", kernels.name, grad_image[i * data.width + k], 0.5 * of_image[k], 1e-5);
    }
    for (std::int64_t j = 0; j < m; ++j)
        for (std::int64_t k = 0; k < data.width; ++k)
            expect_close("gradient of text", kernels.name, grad_text[j * data.width + k], of_text[j * data.width + k],
                         2e-5);
    expect_close("gradient of scale", kernels.name, grad_scale, of_scale, 1e-4);
}

// The sigmoid loss of n rows and m columns with bias -0.25, and its gradients.
void check_sigmoid(const cliperase::IsaKernels& kernels, std::int64_t n, std::int64_t m, std::int64_t pair_offset) {
    const Data data(n, m, 37);
    const SimilarityInputs in = data.inputs(pair_offset, 2);
    std::vector<float> grad_image(n * data.width), grad_text(m * data.width);
    double loss = 0, only_loss = 0, grad_scale = 0, grad_bias = 0;
    const Sigmoid all{-0.25f, &loss, grad_image.data(), grad_text.data(), &grad_scale, &grad_bias};
    const Sigmoid none{-0.25f, &only_loss, nullptr, nullptr, nullptr, nullptr};
    for (const Sigmoid& s : {all, none}) {
        cliperase::check(in, s);
        const cliperase::Workspace scratch(kernels.sigmoid_scratch(in, s));
        kernels.sigmoid(in, s, scratch.data());
    }
    double total = 0, of_scale = 0, of_bias = 0;
    std::vector<double> of_text(m * data.width);
    for (std::int64_t i = 0; i < n; ++i) {
        std::vector<double> of_image(data.width);
        for (std::int64_t j = 0; j < m; ++j) {
            const double sign = j == pair_offset + i ? -1 : 1, y = sign * (data.similarity(i, j) - 0.25);
            const double slope = sign / (1 + std::exp(-y));
            total += y > 0 ? y + std::log1p(std::exp(-y)) : std::log1p(std::exp(y));
            of_bias += slope, of_scale += slope * data.similarity(i, j) / 0.5;
            for (std::int64_t k = 0; k < data.width; ++k) {
                of_image[k] += 0.5 * slope * double(data.text[j * data.width + k]);
                of_text[j * data.width + k] += 0.5 * slope * double(data.image[i * data.width + k]);
            }
        }
        for (std::int64_t k = 0; k < data.width; ++k)
            expect_close("sigmoid gradient of image", kernels.name, grad_image[i * data.width + k], of_image[k], 2e-5);
    }
    for (std::int64_t j = 0; j < m; ++j)
        for (std::int64_t k = 0; k < data.width; ++k)
            expect_close("sigmoid gradient of text", kernels.name, grad_text[j * data.width + k],
                         of_text[j * data.width + k], 2e-5);
    expect_close("sigmoid loss", kernels.name, loss, total, 1e-6);
    expect_close("sigmoid loss alone", kernels.name, only_loss, loss, 0);
    expect_close("sigmoid gradient of scale", kernels.name, grad_scale, of_scale, 1e-5);
    expect_close("sigmoid gradient of bias", kernels.name, grad_bias, of_bias, 1e-5);
}

}  // namespace

// Kernels that take only bfloat16 hand other features, and mixed ones, to those for any dtype.
void check_choice_by_dtype() {
    const cliperase::IsaKernels& kernels = cliperase::emulated_bf16_kernels;
    const Data data(3, 3, 5);
    SimilarityInputs in = data.inputs(0, 1);
    const auto expect = [&](const cliperase::IsaKernels& expected) {
        if (&kernels.taking(in) != &expected || &expected.taking(in) != &expected)
            fail("wrong choice for the dtypes", kernels.name);
    };
    expect(cliperase::portable_kernels);
    in.image.dtype = cliperase::Dtype::bfloat16;
    expect(cliperase::portable_kernels);
    in.text.dtype = cliperase::Dtype::bfloat16;
    expect(kernels);
    in.has_teacher = true, in.teacher_image = in.image, in.teacher_text = data.inputs(0, 1).text;
    expect(cliperase::portable_kernels);
    in.teacher_text = in.text;
    expect(kernels);
}

bool made_by_amd() {
#if defined(CLIPERASE_X86)
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

// Tests every instruction set that runs here, or those that are named, which must all run here.
int main(int count, char** names) {
    const cliperase::IsaKernels *const chosen = cliperase::choose_kernels(nullptr), *widest = nullptr;
    std::vector<const cliperase::IsaKernels*> all_kernels;
    for (const char* name : {"portable", "avx2", "avx512", "avx512_bf16", "amx"})
        if (const cliperase::IsaKernels* kernels = cliperase::choose_kernels(name)) {
            all_kernels.push_back(kernels);
            if (std::strcmp(name, "avx512_bf16") != 0 || made_by_amd()) widest = kernels;  // slower than avx512 elsewhere
        }
    std::printf("chosen: %s\n", chosen ? chosen->name : "nothing");
    if (chosen == nullptr || chosen != widest || cliperase::choose_kernels("abacus") != nullptr)
        fail("wrong choice", "dispatch");
#if defined(CLIPERASE_X86)
    if (cliperase::choose_kernels("avx2") && !cliperase::choose_kernels("avx512"))
        all_kernels.push_back(&cliperase::wide_kernels);
#endif
    all_kernels.push_back(&cliperase::emulated_bf16_kernels);
    all_kernels.push_back(cliperase::choose_kernels("amx_emulated"));
    if (count > 1) all_kernels.clear();
    for (int at = 1; at < count; ++at) {
        const cliperase::IsaKernels* const kernels = cliperase::choose_kernels(names[at]);
        kernels ? all_kernels.push_back(kernels) : fail("does not run here", names[at]);
    }
    check_buffers();
    check_amx();
    check_choice_by_dtype();
    for (const cliperase::IsaKernels* kernels : all_kernels) {
        check_comparison(*kernels);
        if (kernels->for_any_dtype != nullptr) continue;  // the features below are float32
        for (const bool keep : {false, true}) {
            check_kernels(*kernels, 300, 300, 0, keep);   // two tiles of rows, three of columns
            check_kernels(*kernels, 17, 200, 100, keep);  // own rows among other columns
            check_kernels(*kernels, 5, 130, 130, keep);   // other columns only
        }
        check_sigmoid(*kernels, 300, 300, 0);
        check_sigmoid(*kernels, 17, 200, 100);
        check_sigmoid(*kernels, 5, 130, 130);
    }
    check_losses(all_kernels);
    for (const cliperase::IsaKernels* kernels : all_kernels) std::printf("%s ", kernels->name);
    std::printf("ran, %d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
