// Cross-entropy of (N, C) logits on the CPU. Schemas and autograd are in fastgpt/ops/cross_entropy.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

enum Reduction : int64_t { NONE = 0, MEAN = 1, SUM = 2 };  // the numbers that PyTorch gives them

// Returns the loss, float32 of shape () or (N,), what backward needs, and where with_correct, for each row whether the
// target's logit is the largest, float32 (N,), else (0,). What backward needs is the gradient of the loss (N, C) where
// with_grad, else the statistics of each row (N, 2), see kernels.h. A softcap of 0 is none.
std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& token_weight, int64_t ignore_index,
                                                 int64_t reduction, double label_smoothing, double z_loss,
                                                 double softcap, bool with_grad, bool with_correct);

// The gradient of the logits, for any gradient of the loss. Without the statistics of the forward pass, they are
// computed again.
Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& targets,
                              const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
                              const std::optional<Tensor>& statistics, int64_t ignore_index, int64_t reduction,
                              double label_smoothing, double z_loss, double softcap);

// The losses (n,) of a chunk of logits, and for each row whether it is correct, as above. Where with_grad, the gradient
// of sum(row_scale * losses) overwrites the chunk.
std::tuple<Tensor, Tensor> cross_entropy_chunk(Tensor logits, const Tensor& targets, const Tensor& row_scale,
                                               int64_t ignore_index, double label_smoothing, double z_loss,
                                               double softcap, bool with_grad, bool with_correct);

}  // namespace fastgpt
