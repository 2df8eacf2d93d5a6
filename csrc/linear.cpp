// x W^T + b for few rows (linear.h): checks the arguments, converts x to float32 once, and divides the columns of the
// output among threads. The kernel is in linear_rows.h.
#include "linear.h"

#include <algorithm>
#include <memory>

namespace fastgpt {

constexpr int64_t VALUES_PER_TASK = 65536;  // of W, which take about 15 us to read in float32

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1),
                  "x, weight: expected (..., K) and (N, K)");
  const Storage storage = storage_of(x, "x");
  STD_TORCH_CHECK(storage_of(weight, "weight") == storage, "weight: expected the dtype of x");
  const int64_t N = weight.size(0), K = weight.size(1);
  if (bias.has_value())
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N && storage_of(*bias, "bias") == storage,
                    "bias: expected (N), like weight");
  std::vector<int64_t> sizes(static_cast<size_t>(x.dim()));
  for (int64_t d = 0; d < x.dim(); ++d) sizes[static_cast<size_t>(d)] = x.size(d);
  sizes.back() = N;
  Tensor out = new_buffer(x, sizes, /*zeros=*/false);

  const Tensor inputs = packed(x);
  const Tensor table = with_contiguous_rows(weight);
  const Tensor shift = bias.has_value() ? packed(*bias) : table;
  LinearRows rows{};
  rows.weight = table.const_data_ptr();
  rows.weight_stride = table.stride(0);
  rows.bias = bias.has_value() ? shift.const_data_ptr() : nullptr;
  rows.out = out.mutable_data_ptr();
  rows.depth = K;
  rows.columns = N;
  rows.rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows.rows *= x.size(d);
  std::unique_ptr<float[]> widened;
  if (storage == FLOAT32) {
    rows.x = inputs.const_data_ptr<float>();
  } else {
    widened.reset(new float[static_cast<size_t>(rows.rows * K)]);
    kernels().widen[storage](inputs.const_data_ptr(), widened.get(), rows.rows * K);
    rows.x = widened.get();
  }
  const auto kernel = kernels().linear[storage];
  const int64_t grain = VALUES_PER_TASK / std::max<int64_t>(K, 1) + 1;
  torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  return out;
}

}  // namespace fastgpt
