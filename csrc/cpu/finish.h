// From the sums of a sweep to its losses, and from the incoming gradients to the terms of dS: the arithmetic of
// cliperase_fast/ops/softmax_stats.py, where the formulas are, in one pass in place of dozens of small tensor operations.
#pragma once

#include "sweep.h"

namespace cliperase {

// The softmaxes of a state [STATE_PLANES, rows + columns], rows first: planes of their log-odds, of their anchors and of
// their factors.
enum StateSoftmax : int { RETENTION, STUDENT_SOFTMAX, TEACHER, STATE_SOFTMAXES };
constexpr int STATE_PLANES = 3 * STATE_SOFTMAXES;

struct Losses {
    double retention, consistency;  // summed over rows and columns
};

// Writes the state [STATE_PLANES, 2 n] of a square problem from what `forward` found; without want_retention that loss is 0.
Losses finish(const Problem& problem, bool want_retention, const Forward& found, float* state);

// The terms of dS, into memory of terms_floats(problem) floats, set in `into`. The weights are those of each row's and
// column's retention and of each one's KL.
std::int64_t terms_floats(const Problem& problem);
void gradient_terms(const Problem& problem, const float* state, bool want_retention, double weight_retention,
                    double weight_consistency, float* memory, Backward& into);

}  // namespace cliperase
