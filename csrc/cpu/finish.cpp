#include "finish.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace cliperase {
namespace {

// So many rows or columns are one thread's, and one summand of the losses whatever the number of threads.
constexpr std::int64_t PART = 256;

float log1p_exp(float x) { return x > 40 ? x : std::log1p(std::exp(x)); }
float rest(float x) { return 1 / (1 + std::exp(-x)); }

struct Anchored {
    float odds, anchor, factor;
};

Anchored anchored(float reference, float total, float diagonal) {
    const float logarithm = std::log(total), rest = reference + logarithm;
    const float anchor = rest <= diagonal ? diagonal : rest;  // NaN stays NaN
    const auto from_anchor = [&](float entry) { return std::exp(static_cast<double>(entry) - static_cast<double>(anchor)); };
    const double sum = static_cast<double>(total) * from_anchor(reference) + from_anchor(diagonal);
    return {(reference - diagonal) + logarithm, anchor, static_cast<float>(1 / sum)};
}

// w P_ij = exp(S_ij - anchor) factor, of one softmax.
Softmax softmax(const Problem& p, const float* state, int which, double weight, float* memory) {
    const std::int64_t count = p.rows + p.columns;
    const float* anchor = state + (STATE_SOFTMAXES + which) * count;
    const float* factor = state + (2 * STATE_SOFTMAXES + which) * count;
#pragma omp parallel for num_threads(p.threads) if (count > PART)
    for (std::int64_t i = 0; i < count; ++i) memory[i] = static_cast<float>(weight * static_cast<double>(factor[i]));
    return {anchor, anchor + p.rows, memory, memory + p.rows};
}

// Rows and then columns, `begin` to `end` of 2 n.
Losses finish_part(const Problem& p, bool want_retention, const Forward& found, float* state, std::int64_t begin,
                   std::int64_t end) {
    const std::int64_t n = p.rows, count = 2 * n;
    Losses losses{0, 0};
    for (std::int64_t at = begin; at < end; ++at) {
        const bool of_row = at < n;
        const std::int64_t i = of_row ? at : at - n;
        const float* sums = (of_row ? found.row_sums : found.column_sums) + i;
        float* to = state + at;
        const auto write = [&](int which, const Anchored& softmax) {
            to[which * count] = softmax.odds;
            to[(STATE_SOFTMAXES + which) * count] = softmax.anchor;
            to[(2 * STATE_SOFTMAXES + which) * count] = softmax.factor;
        };
        const float diagonal = found.diagonal[i];
        const Anchored student = anchored(sums[0], sums[n], diagonal);
        const Anchored retention = p.has_masked() ? anchored(sums[2 * n], sums[3 * n], diagonal) : student;
        write(RETENTION, retention);
        write(STUDENT_SOFTMAX, student);
        write(TEACHER, {0, 0, 0});
        if (want_retention) losses.retention += static_cast<double>(log1p_exp(retention.odds));
        if (p.has_teacher) {
            const float* sums_of_teacher = sums + (p.has_masked() ? 4 : 2) * n;
            const float own = found.teacher_diagonal[i];
            const Anchored teacher = anchored(sums_of_teacher[0], sums_of_teacher[n], own);
            write(TEACHER, teacher);
            const float gap = sums_of_teacher[2 * n] / sums_of_teacher[n] - ((own - diagonal) - *found.shift);
            losses.consistency +=
                static_cast<double>(rest(teacher.odds) * gap - log1p_exp(teacher.odds) + log1p_exp(student.odds));
        }
    }
    return losses;
}

}  // namespace

Losses finish(const Problem& p, bool want_retention, const Forward& found, float* state) {
    const std::int64_t n = p.rows, count = 2 * n, parts = (count + PART - 1) / PART;
    std::vector<Losses> of_part(static_cast<std::size_t>(parts), Losses{0, 0});
#pragma omp parallel for num_threads(p.threads) if (parts > 1)
    for (std::int64_t part = 0; part < parts; ++part)
        of_part[static_cast<std::size_t>(part)] =
            finish_part(p, want_retention, found, state, part * PART, std::min(count, (part + 1) * PART));
    Losses losses{0, 0};
    for (const Losses& of : of_part) losses.retention += of.retention, losses.consistency += of.consistency;
    return losses;
}

std::int64_t terms_floats(const Problem& p) { return STATE_SOFTMAXES * (p.rows + p.columns) + p.rows; }

void gradient_terms(const Problem& p, const float* state, bool want_retention, double weight_retention,
                    double weight_consistency, float* memory, Backward& into) {
    const std::int64_t n = p.rows, count = p.rows + p.columns;
    float* diagonal = memory + STATE_SOFTMAXES * count;
    // The retention rides on the student's softmax unless groups have given it one of its own.
    const double of_retention = want_retention ? weight_retention : 0, own = p.has_masked() ? 0 : of_retention;
    const int student = p.has_teacher ? STUDENT_SOFTMAX : RETENTION;
    into.student = softmax(p, state, student, own + (p.has_teacher ? weight_consistency : 0), memory);
    if (p.has_masked()) into.masked = softmax(p, state, RETENTION, of_retention, memory + count);
    if (p.has_teacher) into.teacher = softmax(p, state, TEACHER, -weight_consistency, memory + 2 * count);
    into.diagonal = diagonal;
    if (!p.paired()) return;
#pragma omp parallel for num_threads(p.threads) if (n > PART)
    for (std::int64_t i = 0; i < n; ++i) {
        const auto both = [&](int which) {
            const float* odds = state + which * count + i;
            return static_cast<double>(rest(odds[0])) + static_cast<double>(rest(odds[n + p.first]));
        };
        double entry = 0;
        if (want_retention) entry -= weight_retention * both(RETENTION);
        if (p.has_teacher) entry += weight_consistency * (both(TEACHER) - both(STUDENT_SOFTMAX));
        diagonal[i] = static_cast<float>(entry);
    }
}

}  // namespace cliperase
