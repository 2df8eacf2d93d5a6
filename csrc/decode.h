// The logits of one new token through a whole GPT on the CPU, as in generation. Schema: fastgpt/ops/decode.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

// tokens (B, 1) int64, cache (2, L, B, H, block_size, D), of which `length` tokens are filled -> logits (B, V). The new
// keys and values are added to the cache. weights: as in fastgpt/ops/decode.py. The same bits for any number of threads.
Tensor decode(const Tensor& tokens, const std::vector<Tensor>& weights, Tensor cache, int64_t length,
              int64_t activation, double eps);

}  // namespace fastgpt
