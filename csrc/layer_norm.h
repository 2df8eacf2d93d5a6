// Layer norm and the residual addition before it on the CPU. Schemas and autograd are in fastgpt/ops/layer_norm.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

// (y, h, statistics): y in `out_dtype`, h = residual + dropout(x), which is empty without a residual, and (2, rows) in
// float32, the means and 1 / standard deviation of the rows that were normalised.
std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                              const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                                              double dropout_p, const std::optional<Tensor>& seed,
                                              int64_t first_sequence, ScalarType out_dtype);

// The gradients of residual and x, and of weight and bias, (number of them, C), from those of y and (where it has one)
// of h; empty where `output_mask` does not want them, which is for x, residual, weight and bias. `x` is what was
// normalised. Without dropout and in one dtype, x and residual share a gradient, which is the first.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad_y, const std::optional<Tensor>& grad_sum, const Tensor& x, const Tensor& weight,
    const Tensor& stats, double dropout_p, const std::optional<Tensor>& seed, int64_t first_sequence,
    ScalarType residual_dtype, ScalarType x_dtype, const std::vector<bool>& output_mask);

}  // namespace fastgpt
