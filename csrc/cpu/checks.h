// Refuses what would make a sweep read or write where it must not: ValueError in Python, before any work.
#pragma once

#include "sweep.h"

namespace cliperase {

// All throw std::invalid_argument that names the argument.
void check(const Problem& problem);
void check(const Problem& problem, const Forward& forward);
void check(const Problem& problem, const Backward& backward);
void check(const Problem& problem, const Sigmoid& sigmoid);

}  // namespace cliperase
