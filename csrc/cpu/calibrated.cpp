#include "calibrated.h"

#include <algorithm>
#include <vector>

namespace cliperase {
namespace {

// C - C* of pair i, from its entries of S and S°.
double difference(const SimilarityInputs& in, float student, float teacher) {
    return static_cast<double>(student) / static_cast<double>(in.scale) -
           static_cast<double>(teacher) / static_cast<double>(in.teacher_scale);
}

double edited_entries(const SimilarityInputs& in) {
    const Comparison& c = in.comparison;
    const double forgotten = static_cast<double>(c.forget_end - c.forget_begin);
    if (c.row_ids == nullptr) return forgotten * forgotten;
    std::vector<std::int32_t> ids(c.column_ids + c.forget_begin, c.column_ids + c.forget_end);
    std::sort(ids.begin(), ids.end());
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < in.rows; ++i) {
        const auto equal = std::equal_range(ids.begin(), ids.end(), c.row_ids[i]);
        count += equal.second - equal.first;
    }
    return static_cast<double>(count);
}

}  // namespace

void calibrated_terms(const SimilarityInputs& in, const Forward& found, float* terms, float* factors, float* saved) {
    const std::int64_t n = in.rows;
    const Losses losses = compute_losses(in, true, found, saved);
    double forget = found.squares[0], anchor = found.squares[1];
    float* const own = saved + SAVED_STATS * 2 * n;
    for (std::int64_t i = 0; i < n; ++i) {
        const double d = difference(in, found.diagonal[i], found.teacher_diagonal[i]);
        if (!in.comparison.forgets(i))
            anchor += d * d;
        else if (!(d < 0))  // NaN stays NaN
            forget += d * d;
        own[i] = found.diagonal[i], own[n + i] = found.teacher_diagonal[i];
    }
    const double pairs = static_cast<double>(n), edited = edited_entries(in), others = pairs * pairs - edited,
                 retained = pairs - static_cast<double>(in.comparison.forget_end - in.comparison.forget_begin);
    const double sums[CALIBRATED_TERMS] = {losses.retention, forget, losses.consistency, anchor};
    const double of_mean[CALIBRATED_TERMS] = {0.5 / std::max(1.0, retained), edited > 0 ? 1 / edited : 0, 1 / pairs,
                                              others > 0 ? 1 / others : 0};
    for (int term = 0; term < CALIBRATED_TERMS; ++term) {
        terms[term] = static_cast<float>(sums[term] * of_mean[term]);
        factors[term] = static_cast<float>(of_mean[term]);
    }
}

double calibrated_gradient_terms(const SimilarityInputs& in, const float* saved,
                                 const double (&weights)[CALIBRATED_TERMS], float* memory, Backward& into) {
    const std::int64_t n = in.rows;
    float* const diagonal = gradient_terms(in, saved, true, weights[RETAIN], weights[CONSISTENCY], memory, into);
    const double of_forget = 2 / static_cast<double>(in.scale) * weights[FORGET],
                 of_anchor = 2 / static_cast<double>(in.scale) * weights[ANCHOR];
    into.pull_forget = static_cast<float>(of_forget), into.pull_anchor = static_cast<float>(of_anchor);
    const float* const own = saved + SAVED_STATS * 2 * n;
    double dot = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const double d = difference(in, own[i], own[n + i]);
        dot += static_cast<double>(diagonal[i]) * static_cast<double>(own[i]);
        const double pull = in.comparison.forgets(i) ? (d < 0 ? 0 : d) * of_forget : d * of_anchor;
        diagonal[i] = static_cast<float>(static_cast<double>(diagonal[i]) + pull);
    }
    return dot;
}

}  // namespace cliperase
