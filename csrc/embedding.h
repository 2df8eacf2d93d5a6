// Token and position embedding on the CPU. Schemas and autograd are in fastgpt/ops/embedding.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

// (B, T) tokens -> (B, T, C): token_table[tokens] + position_table[position_offset + t]
Tensor embedding(const Tensor& tokens, const Tensor& token_table, const std::optional<Tensor>& position_table,
                 int64_t position_offset);

// grad (B, T, C) -> the gradients of the tables, (vocab_size, C) and (n_positions, C); empty where not wanted.
std::tuple<Tensor, Tensor> embedding_backward(const Tensor& grad, const Tensor& tokens, int64_t vocab_size,
                                              int64_t n_positions, int64_t position_offset, bool with_tokens,
                                              bool with_positions);

}  // namespace fastgpt
