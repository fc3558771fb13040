// The losses from the statistics of a forward pass, and dS from the incoming gradients: the arithmetic of
// cliperase_fast/ops/spec.py, which gives the formulas, in one pass instead of dozens of small tensor operations.
#pragma once

#include "sweep.h"

namespace cliperase {

// The softmaxes of the saved statistics [SAVED_STATS, rows + columns], rows first: their log-odds, anchors and factors.
enum SavedSoftmax : int { RETENTION, STUDENT, TEACHER, SAVED_SOFTMAXES };
constexpr int SAVED_STATS = 3 * SAVED_SOFTMAXES;

struct Losses {
    double retention, consistency;  // summed over rows and columns
};

// Returns the losses of a whole batch and writes saved_stats, [SAVED_STATS, 2 n]. retention is 0 unless want_retention,
// and that of pairs to forget does not count.
Losses compute_losses(const SimilarityInputs& inputs, bool want_retention, const Forward& found, float* saved_stats);

// Writes the terms of dS to `memory`, terms_size(inputs) floats, and points `into` to them. weight_retention: of the
// retention of each row and column; weight_consistency: of each one's KL. Returns the diagonal, which is in `memory`.
std::int64_t terms_size(const SimilarityInputs& inputs);
float* gradient_terms(const SimilarityInputs& inputs, const float* saved_stats, bool want_retention,
                      double weight_retention, double weight_consistency, float* memory, Backward& into);

}  // namespace cliperase
