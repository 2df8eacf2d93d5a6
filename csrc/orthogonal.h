// Newton-Schulz iterations of a stack of matrices on the CPU, for Muon: see fastgpt/ops/orthogonal.py.
//
// An iteration multiplies x by p = a I + b g + c g^2, where g = x x^T. All p and g are polynomials in the first g, so
// they are symmetric, and so are their products: half of each is computed, and the other half copied. x itself is
// multiplied once, at the end, by the product of all p.
#pragma once

#include "tensor.h"

namespace fastgpt {

// x (N, rows, columns) in float32, any strides, no singular value above 1. The same bits for any number of threads.
Tensor orthogonal(const Tensor& x, double a, double b, double c, int64_t iterations);

}  // namespace fastgpt
