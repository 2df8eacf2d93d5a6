// Cross-entropy of (N, C) logits on the CPU. Schemas and autograd are in fastgpt/ops/cross_entropy.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

enum Reduction : int64_t { NONE = 0, MEAN = 1, SUM = 2 };  // the numbers that PyTorch gives them

// Returns the loss, float32 of shape () or (N,), and what backward needs. That is the gradient of the loss (N, C) where
// with_grad, else the statistics of each row (N, 2), see kernels.h.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets,
                                         const std::optional<Tensor>& weight, int64_t ignore_index, int64_t reduction,
                                         double label_smoothing, bool with_grad);

// The gradient of the logits, for any gradient of the loss. Without the statistics of the forward pass, they are
// computed again.
Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& targets,
                              const std::optional<Tensor>& weight, const std::optional<Tensor>& statistics,
                              int64_t ignore_index, int64_t reduction, double label_smoothing);

// The losses (n,) of a chunk of logits. Where with_grad, the gradient of sum(row_scale * losses) overwrites the chunk.
Tensor cross_entropy_chunk(Tensor logits, const Tensor& targets, const Tensor& row_scale, int64_t ignore_index,
                           double label_smoothing, bool with_grad);

}  // namespace fastgpt
