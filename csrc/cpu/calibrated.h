// The calibrated loss of a joint batch: its terms from a forward pass with a comparison, and what the backward pass
// takes. cliperase_fast/ops/calibrated.py gives the formulas.
#pragma once

#include "softmax_stats.h"

namespace cliperase {

enum CalibratedTerm : int { RETAIN, FORGET, CONSISTENCY, ANCHOR, CALIBRATED_TERMS };

// Writes the terms [CALIBRATED_TERMS], the factors that made means of their sums, and `saved` [SAVED_STATS + 1, 2 n]:
// the saved statistics, then S and the edited S° of pairs.
void calibrated_terms(const SimilarityInputs& inputs, const Forward& found, float* terms, float* factors, float* saved);

// Sets the softmaxes, diagonal and pull of `into`, and returns the sum of dS S over pairs. weights: the gradient of
// each term times its factor. memory: terms_size(inputs) floats.
double calibrated_gradient_terms(const SimilarityInputs& inputs, const float* saved,
                                 const double (&weights)[CALIBRATED_TERMS], float* memory, Backward& into);

}  // namespace cliperase
