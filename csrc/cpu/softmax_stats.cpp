#include "softmax_stats.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "float_environment.h"

namespace cliperase {
namespace {

// Rows and columns in a part. A part is summed by one thread, so that the losses do not depend on the number of
// threads.
constexpr std::int64_t PART = 256;

// Calls `work` with each number below `count`, from all threads if there are more than `alone`.
template <typename Work>
void for_each_of(const SimilarityInputs& in, std::int64_t count, std::int64_t alone, Work work) {
    const FloatEnvironment callers;
#pragma omp parallel num_threads(in.threads) if (count > alone)
    {
        const SharedFloatEnvironment environment(callers);
#pragma omp for
        for (std::int64_t i = 0; i < count; ++i) work(i);
    }
}

float log1p_exp(float x) { return x > 40 ? x : std::log1p(std::exp(x)); }
float one_minus_p(float x) { return 1 / (1 + std::exp(-x)); }

struct Anchored {
    float odds, anchor, factor;
};

Anchored anchored(float reference, float total, float diagonal) {
    const float logarithm = std::log(total), others = reference + logarithm;
    const float anchor = others <= diagonal ? diagonal : others;  // NaN stays NaN
    const auto from_anchor = [&](float entry) {
        return std::exp(static_cast<double>(entry) - static_cast<double>(anchor));
    };
    const double sum = static_cast<double>(total) * from_anchor(reference) + from_anchor(diagonal);
    return {(reference - diagonal) + logarithm, anchor, static_cast<float>(1 / sum)};
}

// The terms of one softmax, see `Softmax`; writes the weighted factors to `memory`.
Softmax softmax(const SimilarityInputs& in, const float* saved_stats, int which, double weight, float* memory) {
    const std::int64_t count = in.rows + in.columns;
    const float* anchor = saved_stats + (SAVED_SOFTMAXES + which) * count;
    const float* factor = saved_stats + (2 * SAVED_SOFTMAXES + which) * count;
    for_each_of(in, count, PART, [&](std::int64_t i) {
        memory[i] = static_cast<float>(weight * static_cast<double>(factor[i]));
    });
    return {anchor, anchor + in.rows, memory, memory + in.rows};
}

// The softmaxes of retention and student in one: exp(S_ij - anchor) factor, with the anchor of the retention. It is
// over fewer entries, so that its anchor is the smaller one; it bounds all entries of pairs to retain.
Softmax joint_softmax(const SimilarityInputs& in, const float* saved_stats, double weight_retention,
                      double weight_consistency, float* memory) {
    const std::int64_t n = in.rows, count = 2 * n;
    const float* const anchors = saved_stats + SAVED_SOFTMAXES * count;
    const float* const factors = saved_stats + 2 * SAVED_SOFTMAXES * count;
    for_each_of(in, count, PART, [&](std::int64_t at) {
        const auto weighted = [&](int which, double weight) {
            return weight * static_cast<double>(factors[which * count + at]);
        };
        const double down = static_cast<double>(anchors[RETENTION * count + at]) -
                            static_cast<double>(anchors[STUDENT * count + at]);
        const double both =
            weighted(RETENTION, weight_retention) + weighted(STUDENT, weight_consistency) * std::exp(down);
        memory[at] = in.comparison.forgets(at % n) ? 0 : static_cast<float>(both);
    });
    const float* const anchor = anchors + RETENTION * count;
    return {anchor, anchor + n, memory, memory + n};
}

// The losses and saved statistics of positions `begin` to `end` of 2 n: rows, then columns.
Losses compute_part(const SimilarityInputs& in, bool want_retention, const Forward& found, float* saved_stats,
                    std::int64_t begin, std::int64_t end) {
    const std::int64_t n = in.rows, count = 2 * n;
    Losses losses{0, 0};
    for (std::int64_t at = begin; at < end; ++at) {
        const bool of_row = at < n;
        const std::int64_t i = of_row ? at : at - n;
        const float* sums = (of_row ? found.row_stats : found.column_stats) + i;
        float* to = saved_stats + at;
        const auto write = [&](int which, const Anchored& softmax) {
            to[which * count] = softmax.odds;
            to[(SAVED_SOFTMAXES + which) * count] = softmax.anchor;
            to[(2 * SAVED_SOFTMAXES + which) * count] = softmax.factor;
        };
        const float diagonal = found.diagonal[i];
        const Anchored student = anchored(sums[0], sums[n], diagonal);
        const Anchored retention = in.has_masked() ? anchored(sums[2 * n], sums[3 * n], diagonal) : student;
        const bool retained = !in.comparison.forgets(i);
        write(RETENTION, retained ? retention : Anchored{0, 0, 0});
        write(STUDENT, student);
        write(TEACHER, {0, 0, 0});
        if (want_retention && retained) losses.retention += static_cast<double>(log1p_exp(retention.odds));
        if (in.has_teacher) {
            const float* sums_of_teacher = sums + (in.has_masked() ? 4 : 2) * n;
            const float own = found.teacher_diagonal[i];
            const Anchored teacher = anchored(sums_of_teacher[0], sums_of_teacher[n], own);
            write(TEACHER, teacher);
            const float gap = sums_of_teacher[2 * n] / sums_of_teacher[n] - ((own - diagonal) - *found.shift);
            losses.consistency += static_cast<double>(one_minus_p(teacher.odds) * gap - log1p_exp(teacher.odds) +
                                                      log1p_exp(student.odds));
        }
    }
    return losses;
}

}  // namespace

Losses compute_losses(const SimilarityInputs& in, bool want_retention, const Forward& found, float* saved_stats) {
    const std::int64_t n = in.rows, count = 2 * n, parts = (count + PART - 1) / PART;
    std::vector<Losses> of_part(static_cast<std::size_t>(parts), Losses{0, 0});
    for_each_of(in, parts, 1, [&](std::int64_t part) {
        of_part[static_cast<std::size_t>(part)] =
            compute_part(in, want_retention, found, saved_stats, part * PART, std::min(count, (part + 1) * PART));
    });
    Losses losses{0, 0};
    for (const Losses& of : of_part) losses.retention += of.retention, losses.consistency += of.consistency;
    return losses;
}

std::int64_t terms_size(const SimilarityInputs& in) { return SAVED_SOFTMAXES * (in.rows + in.columns) + in.rows; }

float* gradient_terms(const SimilarityInputs& in, const float* saved_stats, bool want_retention,
                      double weight_retention, double weight_consistency, float* memory, Backward& into) {
    const std::int64_t n = in.rows, count = in.rows + in.columns;
    float* diagonal = memory + SAVED_SOFTMAXES * count;
    // Retention and consistency share the student's softmax, unless groups give the retention a softmax of its own.
    const double of_retention = want_retention ? weight_retention : 0, own = in.has_masked() ? 0 : of_retention;
    const int student = in.has_teacher ? STUDENT : RETENTION;
    into.student = softmax(in, saved_stats, student, own + (in.has_teacher ? weight_consistency : 0), memory);
    if (in.has_masked() && in.row_groups != nullptr)
        into.masked = softmax(in, saved_stats, RETENTION, of_retention, memory + count);
    if (in.has_masked() && in.row_groups == nullptr)
        into.retained = joint_softmax(in, saved_stats, of_retention, weight_consistency, memory + count);
    if (in.has_teacher) into.teacher = softmax(in, saved_stats, TEACHER, -weight_consistency, memory + 2 * count);
    into.diagonal = diagonal;
    if (!in.paired()) return diagonal;
    for_each_of(in, n, PART, [&](std::int64_t i) {
        const auto both = [&](int which) {
            const float* odds = saved_stats + which * count + i;
            return static_cast<double>(one_minus_p(odds[0])) +
                   static_cast<double>(one_minus_p(odds[n + in.pair_offset]));
        };
        double entry = 0;
        if (want_retention && !in.comparison.forgets(i)) entry -= weight_retention * both(RETENTION);
        if (in.has_teacher) entry += weight_consistency * (both(TEACHER) - both(STUDENT));
        diagonal[i] = static_cast<float>(entry);
    });
    return diagonal;
}

}  // namespace cliperase
