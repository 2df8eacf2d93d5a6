// The logits of one new token through a whole GPT on the CPU, as in generation. Schema: fastgpt/ops/decode.py.
#pragma once

#include "tensor.h"

namespace fastgpt {

// tokens (n, 1) int64, cache (2, L, B, H, block_size, D), of which `length` tokens are filled -> logits (n, V). The new
// keys and values are added to the cache. Without `rows`, n is B. rows (n, 2) int64: the row of each token in the cache,
// and the length of that row. weights: as in fastgpt/ops/decode.py. The same bits for any number of threads.
Tensor decode(const Tensor& tokens, const std::vector<Tensor>& weights, Tensor cache, int64_t length,
              const std::optional<Tensor>& rows, int64_t activation, double eps);

}  // namespace fastgpt
