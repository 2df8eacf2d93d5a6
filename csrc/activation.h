// The activation of a feed-forward layer on the CPU. Schemas and autograd are in fastgpt/ops/activation.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

// f(x + bias), with `kind` an Activation: x (..., C), bias (C) or none.
Tensor activation(const Tensor& x, const std::optional<Tensor>& bias, int64_t kind);

// The gradients of x and bias; empty where not wanted.
std::tuple<Tensor, Tensor> activation_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                                               int64_t kind, bool with_x, bool with_bias);

}  // namespace fastgpt
