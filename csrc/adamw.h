// One step of AdamW (Loshchilov and Hutter 2019) for all tensors of a group on the CPU in float32, with the clipping of
// their gradients, and the norm that clipping needs.
//
// Clipping by itself reads and writes all gradients once more. Here the factor multiplies them in registers. All tensors
// are one list of pieces, which threads share, so a model of many small tensors takes one call.
#pragma once

#include "tensor.h"

namespace fastgpt {

// The Euclidean norm of all `tensors` together, 0-dim. The same bits for any number of threads.
Tensor total_norm(const std::vector<Tensor> tensors);

// The tensors of each list are contiguous, and fit those of the others; `steps` are 0-dim, and counted here.
void adamw(const std::vector<Tensor> weights, const std::vector<Tensor> grads, const std::vector<Tensor> exp_avgs,
           const std::vector<Tensor> exp_avg_sqs, const std::vector<Tensor> steps, double lr, double weight_decay,
           double beta1, double beta2, double eps, double grad_scale);

}  // namespace fastgpt
