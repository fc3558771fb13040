// The losses of whole batches, including the sigmoid loss, and their gradients, compared with the formulas in double
// precision, for every instruction set.
//
// The unit of the allowed error is that of tests/ops/accuracy_cases.py: what one rounding of the similarities can do.
#include <algorithm>
#include <cstring>
#include <vector>

#include "batch.h"
#include "expect.h"
#include "softmax_stats.h"
#include "workspace.h"

namespace {

using cliperase::Backward;
using cliperase::Forward;
using cliperase::IsaKernels;
using cliperase::SimilarityInputs;
using Doubles = std::vector<double>;

constexpr double GRAD_RETENTION = 0.7, GRAD_CONSISTENCY = 1.3;
constexpr double EPS = 1.0 / (1 << 23), UNDERFLOW = 1e-36;  // float32 has no normal numbers below 1e-38

struct Outcome {
    double retention = 0, consistency = 0, scale = 0;
    Doubles image, text;  // [n, width], the gradients
};

double log1p_exp(double x) { return x > 40 ? x : std::log1p(std::exp(x)); }

// The softmax of each row of a matrix [n, n], without the entries of equal groups: the log-odds of all other entries to
// that of the pair, and the probabilities off the diagonal.
struct Softmax {
    Doubles odds, off_diagonal;  // [n], [n, n]

    Softmax(const Doubles& s, int64_t n, const std::vector<std::int32_t>& groups)
        : odds(n, -INFINITY), off_diagonal(n * n) {
        for (int64_t i = 0; i < n; ++i) {
            const auto included = [&](int64_t j) { return i != j && (groups.empty() || groups[i] != groups[j]); };
            const double *row = s.data() + i * n, own = row[i];
            double top = -INFINITY, total = 0;
            for (int64_t j = 0; j < n; ++j)
                if (included(j)) top = std::max(top, row[j] - own);
            for (int64_t j = 0; j < n; ++j)
                if (included(j)) total += off_diagonal[i * n + j] = std::exp(row[j] - own - top);
            if (total == 0) continue;
            odds[i] = top + std::log(total);
            const double shrink = std::exp(top - log1p_exp(odds[i]));
            for (int64_t j = 0; j < n; ++j) off_diagonal[i * n + j] *= shrink;
        }
    }
};

Doubles similarity(const Features& left, const Features& right, double scale) {
    Doubles s(left.n * right.n);
    for (int64_t i = 0; i < left.n; ++i)
        for (int64_t j = 0; j < right.n; ++j) {
            double sum = 0;
            for (int64_t k = 0; k < left.width; ++k)
                sum += left.values[i * left.width + k] * right.values[j * left.width + k];
            s[i * right.n + j] = scale * sum;
        }
    return s;
}

Doubles transposed(const Doubles& s, int64_t n) {
    Doubles out(n * n);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) out[j * n + i] = s[i * n + j];
    return out;
}

// The exact values, and the allowed errors of float32.
struct Truth : Outcome {
    double allowed_loss = 0, allowed_gradient = 0, allowed_scale = 0;
    double mass_of_gradient = 0, mass_of_scale = 0;  // the largest sums of |dS| times what it is multiplied by

    explicit Truth(const Batch& batch) {
        const Case& c = batch.of;
        const int64_t n = c.n;
        const double of_retention = c.retention * 0.5 * GRAD_RETENTION / static_cast<double>(n);
        const double of_consistency = c.consistency * GRAD_CONSISTENCY / static_cast<double>(n);
        const std::vector<std::int32_t> nobody;
        Doubles s = similarity(batch.image, batch.text, c.scale), ds(n * n), mass(n * n), teacher;
        if (c.consistency) teacher = similarity(batch.teacher_image, batch.teacher_text, c.teacher_scale);
        for (const bool columns : {false, true}) {
            const auto add = [&](double weight, const Softmax& softmax) {
                for (int64_t i = 0; i < n; ++i) {
                    for (int64_t j = 0; j < n; ++j) {
                        const int64_t at = columns ? j * n + i : i * n + j;
                        ds[at] += weight * softmax.off_diagonal[i * n + j],
                            mass[at] += std::abs(weight) * softmax.off_diagonal[i * n + j];
                    }
                    const double one_minus_p = 1 / (1 + std::exp(-softmax.odds[i]));
                    ds[i * n + i] -= weight * one_minus_p, mass[i * n + i] += std::abs(weight) * one_minus_p;
                }
            };
            if (c.retention) {
                const Softmax student(s, n, c.groups ? batch.groups : nobody);
                for (const double odds : student.odds) retention += 0.5 * log1p_exp(odds) / static_cast<double>(n);
                add(of_retention, student);
            }
            if (c.consistency) {
                const Softmax student(s, n, nobody), other(teacher, n, nobody);
                for (int64_t i = 0; i < n; ++i) {
                    double kl = log1p_exp(student.odds[i]) - log1p_exp(other.odds[i]);
                    for (int64_t j = i * n; j < (i + 1) * n; ++j)
                        kl += other.off_diagonal[j] * ((teacher[j] - teacher[i * n + i]) - (s[j] - s[i * n + i]));
                    consistency += kl / static_cast<double>(n);
                }
                add(of_consistency, student), add(-of_consistency, other);
            }
            s = transposed(s, n);  // twice: itself
            if (c.consistency) teacher = transposed(teacher, n);
        }
        image.assign(n * c.width, 0), text.assign(n * c.width, 0);
        Doubles row_mass(n), column_mass(n);
        double total_mass = 0;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) {
                const double entry = ds[i * n + j], weight = mass[i * n + j];
                for (int64_t k = 0; k < c.width; ++k) {
                    image[i * c.width + k] += c.scale * entry * batch.text.values[j * c.width + k];
                    text[j * c.width + k] += c.scale * entry * batch.image.values[i * c.width + k];
                }
                scale += entry * s[i * n + j] / c.scale;
                mass_of_scale += weight * std::abs(s[i * n + j]) / c.scale;
                row_mass[i] += weight, column_mass[j] += weight, total_mass += weight;
            }
        const double unit = 4 * EPS * (1 + c.scale + (c.consistency ? c.teacher_scale : 0.0f));
        const double worst = std::max(*std::max_element(row_mass.begin(), row_mass.end()),
                                      *std::max_element(column_mass.begin(), column_mass.end()));
        allowed_loss = unit * total_mass + EPS * (std::abs(retention) + std::abs(consistency)) + UNDERFLOW;
        mass_of_gradient = c.scale * worst;
        allowed_gradient = unit * mass_of_gradient + UNDERFLOW;
        allowed_scale = unit * mass_of_scale + UNDERFLOW;
    }
};

// A gradient that the kernels write as `dtype`, between numbers that they must leave alone.
struct Written {
    Dtype dtype;
    std::vector<std::uint16_t> memory;
    explicit Written(Dtype of, int64_t count) : dtype(of), memory(count * halves() + 2, 0xffff) {}
    int64_t halves() const { return dtype == Dtype::float32 ? 2 : 1; }
    cliperase::Gradient to() { return {memory.data(), dtype}; }
    Doubles values(const char* isa) const {
        Doubles found((memory.size() - 2) / halves());
        for (std::size_t k = 0; k < found.size(); ++k) {
            std::uint32_t bits = 0;
            std::memcpy(&bits, &memory[k * halves()], 2 * halves());
            found[k] = decode(dtype, bits);
        }
        if (memory[memory.size() - 2] != 0xffff || memory.back() != 0xffff) fail("written beyond the gradient", isa);
        return found;
    }
};

// Runs both passes; the similarities of the first `cached_rows` rows are cached in between.
Outcome run(const IsaKernels& kernels, const Batch& batch, int64_t cached_rows, int threads,
            Dtype of_gradients = Dtype::float32) {
    const Case& c = batch.of;
    const int64_t n = c.n;
    const SimilarityInputs in = batch.inputs(threads);
    cliperase::check(in);
    std::vector<float> sums(2 * cliperase::stat_count(in) * n, NAN), diagonals(2 * n, NAN);
    std::vector<float> saved_stats(cliperase::SAVED_STATS * 2 * n, NAN);
    const int64_t tiles = (cached_rows + 255) / 256 * ((n + 127) / 128);
    std::vector<float> cache(tiles * (16 + (c.consistency ? 2 : 1) * 256 * 128), NAN);
    float shift;
    const Forward found{diagonals.data(), diagonals.data() + n, sums.data(), sums.data() + sums.size() / 2,
                        &shift,           cache.data(),         cached_rows};
    cliperase::check(in, found);
    {
        const cliperase::Workspace scratch(kernels.forward_scratch(in));
        kernels.forward(in, found, scratch.data());
    }
    const cliperase::Losses losses = cliperase::compute_losses(in, c.retention, found, saved_stats.data());

    Outcome out;
    std::vector<float> terms(cliperase::terms_size(in), NAN);
    Written grad_image(of_gradients, n * c.width), grad_text(of_gradients, n * c.width);
    Backward b{};
    cliperase::gradient_terms(in, saved_stats.data(), c.retention, 0.5 * GRAD_RETENTION / static_cast<double>(n),
                              GRAD_CONSISTENCY / static_cast<double>(n), terms.data(), b);
    b.cache = cache.data(), b.cached_rows = cached_rows;
    b.grad_image = grad_image.to(), b.grad_text = grad_text.to(), b.grad_scale = &out.scale;
    cliperase::check(in, b);
    {
        const cliperase::Workspace scratch(kernels.backward_scratch(in, b));
        kernels.backward(in, b, scratch.data());
    }
    out.retention = 0.5 * losses.retention / static_cast<double>(n);
    out.consistency = losses.consistency / static_cast<double>(n);
    out.image = grad_image.values(kernels.name), out.text = grad_text.values(kernels.name);
    return out;
}

// The same with its gradients rounded.
Outcome rounded(Outcome of, Dtype dtype) {
    for (Doubles* gradient : {&of.image, &of.text})
        for (double& value : *gradient) value = decode(dtype, encode(dtype, value));
    return of;
}

bool same_bits(const Outcome& a, const Outcome& b) {
    return a.retention == b.retention && a.consistency == b.consistency && a.scale == b.scale && a.image == b.image &&
           a.text == b.text;
}

// The kernels that take any dtype, or those that take only bfloat16.
std::vector<const IsaKernels*> kernels_for(const std::vector<const IsaKernels*>& all_kernels, bool only_bfloat16) {
    std::vector<const IsaKernels*> found;
    for (const IsaKernels* kernels : all_kernels)
        if ((kernels->for_any_dtype != nullptr) == only_bfloat16) found.push_back(kernels);
    return found;
}

// Calls run(kernels, c), with those that take only bfloat16 on the same case in bfloat16.
template <typename Run>
void in_its_dtype(const std::vector<const IsaKernels*>& all_kernels, const Case& c, Run run) {
    run(kernels_for(all_kernels, false), c);
    if (c.dtype == Dtype::float16) return;
    Case rounded = c;
    rounded.dtype = Dtype::bfloat16;
    run(kernels_for(all_kernels, true), rounded);
}

void check_in(const std::vector<const IsaKernels*>& all_kernels, const Case& c,
              const std::vector<int64_t>& cached_rows) {
    const Batch batch(c);
    const Truth truth(batch);
    for (const IsaKernels* kernels : all_kernels)
        for (const int64_t cached : cached_rows) {
            const double allowed_gradient = truth.allowed_gradient + rounding_of_ds(*kernels) * truth.mass_of_gradient;
            const double allowed_scale = truth.allowed_scale + rounding_of_ds(*kernels) * truth.mass_of_scale;
            context = c.name() + ", cached " + std::to_string(cached);
            const Outcome found = run(*kernels, batch, cached, 2);
            expect_within("retention", kernels->name, found.retention, truth.retention, truth.allowed_loss);
            expect_within("consistency", kernels->name, found.consistency, truth.consistency, truth.allowed_loss);
            expect_within("gradient of scale", kernels->name, found.scale, truth.scale, allowed_scale);
            for (std::size_t k = 0; k < truth.image.size(); ++k) {
                expect_within("gradient of image", kernels->name, found.image[k], truth.image[k], allowed_gradient);
                expect_within("gradient of text", kernels->name, found.text[k], truth.text[k], allowed_gradient);
            }
            // There, component i of both gradients of pair i is scale dS_ii: no kernels round it.
            for (int64_t i = 0; c.regime == Regime::axes && i < c.n; ++i) {
                const int64_t k = i * c.width + i;
                expect_within("dS of a pair for image", kernels->name, found.image[k], truth.image[k], truth.allowed_gradient);
                expect_within("dS of a pair for text", kernels->name, found.text[k], truth.text[k], truth.allowed_gradient);
            }
            if (cached == cached_rows.back() && !same_bits(found, run(*kernels, batch, cached, 1)))
                fail("one and two threads give different bits", kernels->name);
            // too many threads for each to have whole blocks, and a gradient of several panel groups
            if (c.n > 256 && c.width > 144 && !same_bits(found, run(*kernels, batch, cached, 7)))
                fail("two and seven threads give different bits", kernels->name);
            for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16})
                if (cached == cached_rows.back() &&
                    !same_bits(rounded(found, dtype), run(*kernels, batch, cached, c.n > 256 ? 7 : 2, dtype)))
                    fail("gradients are not those of float32, rounded once", kernels->name);
        }
}

void check(const std::vector<const IsaKernels*>& all_kernels, const Case& c, const std::vector<int64_t>& cached_rows) {
    in_its_dtype(all_kernels, c, [&](const auto& kernels, const Case& of) { check_in(kernels, of, cached_rows); });
}

// The sigmoid loss of a batch with this bias, and its gradients.
void check_sigmoid_in(const std::vector<const IsaKernels*>& all_kernels, const Case& c, float bias) {
    const Batch batch(c);
    const int64_t n = c.n;
    const Doubles s = similarity(batch.image, batch.text, c.scale);
    Doubles image(n * c.width), text(n * c.width), image_mass(n), text_mass(n);
    double loss = 0, of_scale = 0, of_bias = 0, mass = 0;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) {
            const double sign = i == j ? -1 : 1, y = sign * (s[i * n + j] + bias);
            const double slope = sign / (1 + std::exp(-y));
            loss += y > 0 ? y + std::log1p(std::exp(-y)) : std::log1p(std::exp(y));
            of_bias += slope, of_scale += slope * s[i * n + j] / c.scale, mass += std::abs(slope);
            image_mass[i] += std::abs(slope), text_mass[j] += std::abs(slope);
            for (int64_t k = 0; k < c.width; ++k) {
                image[i * c.width + k] += c.scale * slope * batch.text.values[j * c.width + k];
                text[j * c.width + k] += c.scale * slope * batch.image.values[i * c.width + k];
            }
        }
    const double unit = 4 * EPS * (1 + c.scale + std::abs(bias));
    for (const IsaKernels* kernels : all_kernels) {
        context = c.name();
        const double of_gradient = unit + rounding_of_ds(*kernels);
        std::vector<float> grad_image(n * c.width, NAN), grad_text(n * c.width, NAN);
        double found = NAN, grad_scale = NAN, grad_bias = NAN;
        const cliperase::Sigmoid wanted{bias, &found, grad_image.data(), grad_text.data(), &grad_scale, &grad_bias};
        const SimilarityInputs in = batch.inputs(2);
        cliperase::check(in, wanted);
        {
            const cliperase::Workspace scratch(kernels->sigmoid_scratch(in, wanted));
            kernels->sigmoid(in, wanted, scratch.data());
        }
        expect_within("sigmoid loss", kernels->name, found, loss, unit * mass + EPS * loss + UNDERFLOW);
        expect_within("sigmoid gradient of bias", kernels->name, grad_bias, of_bias, unit * mass + UNDERFLOW);
        expect_within("sigmoid gradient of scale", kernels->name, grad_scale, of_scale, of_gradient * mass + UNDERFLOW);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t k = 0; k < c.width; ++k) {
                expect_within("sigmoid gradient of image", kernels->name, grad_image[i * c.width + k],
                              image[i * c.width + k], c.scale * (of_gradient * image_mass[i] + UNDERFLOW));
                expect_within("sigmoid gradient of text", kernels->name, grad_text[i * c.width + k],
                              text[i * c.width + k], c.scale * (of_gradient * text_mass[i] + UNDERFLOW));
            }
    }
}

void check_sigmoid(const std::vector<const IsaKernels*>& all_kernels, const Case& c, float bias) {
    in_its_dtype(all_kernels, c, [&](const auto& kernels, const Case& of) { check_sigmoid_in(kernels, of, bias); });
}

}  // namespace

void check_losses(const std::vector<const IsaKernels*>& all_kernels) {
    // 1 and 2: nothing or one thing off the diagonal; 129: a block of one column; 257: a tile of one row
    for (const int64_t n : {1, 2, 17, 129, 257})
        for (const bool groups : {false, true})
            for (const auto& [retention, consistency] : {std::pair{true, true}, {true, false}, {false, true}}) {
                Case c;
                c.n = n, c.groups = groups, c.retention = retention, c.consistency = consistency;
                check(all_kernels, c, n > 256 ? std::vector<int64_t>{0, 256, n} : std::vector<int64_t>{0, n});
            }
    // 300 is more than one panel of depth (256); 1 and 3 less than a vector
    const std::pair<int64_t, int64_t> widths[] = {{300, 17}, {16, 300}, {1, 3}, {47, 49}, {96, 33}};
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        Case c;
        c.n = 67, c.dtype = dtype;
        for (const auto& [width, teacher_width] : widths) {
            c.width = width, c.teacher_width = teacher_width;
            check(all_kernels, c, {c.n});
        }
        c.width = 47, c.teacher_width = 49;
        for (const Layout layout : {Layout::transposed, Layout::every_other_column, Layout::expanded}) {
            c.layout = layout;
            check(all_kernels, c, {0});
            Case plain = c;
            plain.consistency = false;
            check_sigmoid(all_kernels, plain, -3);
        }
    }
    for (const float scale : {1.0f, 100.0f, 1000.0f})
        for (const Regime regime : {Regime::random, Regime::converged, Regime::anti_aligned, Regime::collapsed,
                                    Regime::collapsed_teacher, Regime::half_converged, Regime::swapped}) {
            Case c;
            c.n = 130, c.width = c.teacher_width = 64;
            c.regime = regime, c.scale = c.teacher_scale = scale, c.groups = regime == Regime::swapped;
            check(all_kernels, c, {0, c.n});
            c.consistency = c.groups = false;
            check_sigmoid(all_kernels, c, -0.5f * scale);
        }
    Case axes;
    axes.n = 133, axes.width = 136, axes.regime = Regime::axes;
    check(all_kernels, axes, {0, axes.n});
    Case shared;
    shared.n = 257, shared.width = 150, shared.groups = true;
    check(all_kernels, shared, {shared.n});
    Case strips;  // a forward strip is 1024 rows
    strips.n = 1030, strips.width = 20, strips.consistency = false, strips.groups = true;
    check(all_kernels, strips, {256});
}
