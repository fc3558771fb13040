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

float log_odds(float reference, float total, float diagonal) { return (reference - diagonal) + std::log(total); }

// w P_ij = exp(S_ij - anchor) factor, of one softmax.
Softmax softmax(const Problem& p, const float* diagonals, const float* odds, double weight, float* memory) {
    const std::int64_t count = p.rows + p.columns;
    float *anchor = memory, *factor = memory + count;
#pragma omp parallel for num_threads(p.threads) if (count > PART)
    for (std::int64_t i = 0; i < count; ++i) {
        anchor[i] = diagonals[i] + (odds[i] > 0 ? odds[i] : 0 * odds[i]);  // NaN stays NaN
        factor[i] = static_cast<float>(weight * std::exp((anchor[i] - diagonals[i]) - log1p_exp(odds[i])));
    }
    return {anchor, anchor + p.rows, factor, factor + p.rows};
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
        const float diagonal = found.diagonal[i], odds = log_odds(sums[0], sums[n], diagonal);
        const float retention = p.has_masked() ? log_odds(sums[2 * n], sums[3 * n], diagonal) : odds;
        to[DIAGONAL * count] = diagonal;
        to[RETENTION_ODDS * count] = retention;
        to[STUDENT_ODDS * count] = odds;
        to[TEACHER_DIAGONAL * count] = to[TEACHER_ODDS * count] = 0;
        if (want_retention) losses.retention += static_cast<double>(log1p_exp(retention));
        if (p.has_teacher) {
            const float* teacher = sums + (p.has_masked() ? 4 : 2) * n;
            const float own = found.teacher_diagonal[i], teacher_odds = log_odds(teacher[0], teacher[n], own);
            to[TEACHER_DIAGONAL * count] = own;
            to[TEACHER_ODDS * count] = teacher_odds;
            const float gap = teacher[2 * n] / teacher[n] - ((own - diagonal) - *found.shift);
            losses.consistency += static_cast<double>(rest(teacher_odds) * gap - log1p_exp(teacher_odds) + log1p_exp(odds));
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

std::int64_t terms_floats(const Problem& p) { return 6 * (p.rows + p.columns) + p.rows; }

void gradient_terms(const Problem& p, const float* state, bool want_retention, double weight_retention,
                    double weight_consistency, float* memory, Backward& into) {
    const std::int64_t n = p.rows, count = p.rows + p.columns;
    const auto plane = [&](int which) { return state + which * count; };
    float* diagonal = memory + 6 * count;
    // The retention rides on the student's softmax unless groups have given it one of its own.
    const double of_retention = want_retention ? weight_retention : 0, own = p.has_masked() ? 0 : of_retention;
    const int odds = p.has_teacher ? STUDENT_ODDS : RETENTION_ODDS;
    into.student = softmax(p, plane(DIAGONAL), plane(odds), own + (p.has_teacher ? weight_consistency : 0), memory);
    if (p.has_masked())
        into.masked = softmax(p, plane(DIAGONAL), plane(RETENTION_ODDS), of_retention, memory + 2 * count);
    if (p.has_teacher)
        into.teacher = softmax(p, plane(TEACHER_DIAGONAL), plane(TEACHER_ODDS), -weight_consistency, memory + 4 * count);
    into.diagonal = diagonal;
    if (!p.paired()) return;
#pragma omp parallel for num_threads(p.threads) if (n > PART)
    for (std::int64_t i = 0; i < n; ++i) {
        const auto both = [&](int which) {
            return static_cast<double>(rest(plane(which)[i])) + static_cast<double>(rest(plane(which)[n + p.first + i]));
        };
        double entry = 0;
        if (want_retention) entry -= weight_retention * both(RETENTION_ODDS);
        if (p.has_teacher) entry += weight_consistency * (both(TEACHER_ODDS) - both(STUDENT_ODDS));
        diagonal[i] = static_cast<float>(entry);
    }
}

}  // namespace cliperase
