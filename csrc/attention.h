// Attention on the CPU, forward and backward; fastgpt/ops/attention.py is its definition.
#pragma once

#include "tensor.h"

namespace fastgpt {

// q (B, H, Tq, D), k and v (B, Hkv, Tk, D), of any strides; seed: the Philox key of dropout, whose rows
// are those of a batch that has `first_sequence` sequences before these. Returns the output, whose
// heads lie side by side in memory, as (B, Tq, H, D), and the logsumexp of each row, (B, H, Tq) in float32.
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& seed,
                                     bool is_causal, double scale, double dropout_p, int64_t first_sequence);

// The gradients of q, k and v; an empty tensor for each that is not asked for.
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const std::optional<Tensor>& seed, bool is_causal, double scale,
                                                      double dropout_p, int64_t first_sequence, bool needs_q, bool needs_k,
                                                      bool needs_v);

// The same for qkv (B, T, 3 C), in which q, k and v lie side by side. The output is (B, T, C), and the gradient is that
// of qkv.
std::tuple<Tensor, Tensor> attention_packed(const Tensor& qkv, int64_t n_head, const std::optional<Tensor>& seed,
                                            bool is_causal, double scale, double dropout_p, int64_t first_sequence);
Tensor attention_packed_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                 int64_t n_head, const std::optional<Tensor>& seed, bool is_causal, double scale,
                                 double dropout_p, int64_t first_sequence);

}  // namespace fastgpt
