// x W^T + b on the CPU where x has few rows, as in generation. Schema and autograd are in fastgpt/ops/linear.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

// x (..., K), weight (N, K), bias (N) -> (..., N), all of one dtype; sums in float32. The same bits for any number of
// threads.
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace fastgpt
