// x W^T + b on the CPU, and its gradients. Schema and autograd are in fastgpt/ops/linear.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

// x (..., K), weight (N, K), bias (N) -> (..., N), all of one dtype; sums in float32. Few rows of x, as in generation,
// take the kernel of linear_rows.h; more of them in float32 take that of matmul_tiles.h. The same bits for any number
// of threads.
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

// In float32, with the gradient grad (..., N) of the output: dx = grad W where there is a weight, dW = grad^T x where
// there is an x, and db, the sum of the rows of grad, where `with_bias`. The others are empty.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                   const std::optional<Tensor>& weight, bool with_bias);

}  // namespace fastgpt
