// x W^T + b and its gradients (linear.h): checks the arguments, and hands the products to the kernels. That for few rows
// is in linear_rows.h, and that for many in matmul_tiles.h.
#include "linear.h"

#include <algorithm>
#include <memory>

#include "matmul.h"

namespace fastgpt {

constexpr int64_t VALUES_PER_TASK = 65536;  // of W, which take about 15 us to read in float32
constexpr int64_t FEW_ROWS = 8;             // up to here reading W takes longer than multiplying

static int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) rows *= tensor.size(d);
  return rows;
}

// The sizes of `tensor`, with another last one.
static std::vector<int64_t> sizes_with(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes(static_cast<size_t>(tensor.dim()));
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes[static_cast<size_t>(d)] = tensor.size(d);
  sizes.back() = last;
  return sizes;
}

static void few_rows(const Tensor& x, const Tensor& weight, const Tensor* bias, Storage storage, Tensor& out) {
  const Tensor table = with_contiguous_rows(weight);
  LinearRows rows{};
  rows.weight = table.const_data_ptr();
  rows.weight_stride = table.stride(0);
  rows.bias = bias ? bias->const_data_ptr() : nullptr;
  rows.out = out.mutable_data_ptr();
  rows.depth = weight.size(1);
  rows.columns = weight.size(0);
  rows.rows = rows_of(x);
  std::unique_ptr<float[]> widened;
  if (storage == FLOAT32) {
    rows.x = x.const_data_ptr<float>();
  } else {
    widened.reset(new float[static_cast<size_t>(rows.rows * rows.depth)]);
    kernels().widen[storage](x.const_data_ptr(), widened.get(), rows.rows * rows.depth);
    rows.x = widened.get();
  }
  const auto kernel = kernels().linear[storage];
  const int64_t grain = VALUES_PER_TASK / std::max<int64_t>(rows.depth, 1) + 1;
  torch::stable::parallel_for(0, rows.columns, grain, [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  FASTGPT_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1),
                "x, weight: expected (..., K) and (N, K)");
  const Storage storage = storage_of(x, "x");
  FASTGPT_CHECK(storage_of(weight, "weight") == storage, "weight: expected the dtype of x");
  const int64_t N = weight.size(0), K = weight.size(1);
  if (bias.has_value())
    FASTGPT_CHECK(bias->dim() == 1 && bias->size(0) == N && storage_of(*bias, "bias") == storage,
                  "bias: expected (N), like weight");
  Tensor out = new_buffer(x, sizes_with(x, N), /*zeros=*/false);
  const Tensor inputs = packed(x);
  const Tensor shift = bias.has_value() ? packed(*bias) : weight;
  if (storage != FLOAT32 || rows_of(x) <= FEW_ROWS) {
    few_rows(inputs, weight, bias.has_value() ? &shift : nullptr, storage, out);
    return out;
  }
  Matmul product{};
  product.a = inputs.const_data_ptr<float>();
  product.b = weight.const_data_ptr<float>();
  product.bias = bias.has_value() ? shift.const_data_ptr<float>() : nullptr;
  product.c = out.mutable_data_ptr<float>();
  product.a_row = K, product.a_depth = 1;
  product.b_depth = weight.stride(1), product.b_column = weight.stride(0);
  product.c_row = N;
  product.rows = rows_of(x), product.columns = N, product.depth = K;
  multiply(product);
  return out;
}

static Tensor gradient_of_x(const Tensor& grad, const Tensor& weight) {
  const int64_t N = weight.size(0), K = weight.size(1);
  Tensor dx = new_buffer(grad, sizes_with(grad, K), /*zeros=*/false);
  Matmul product{};
  product.a = grad.const_data_ptr<float>();
  product.b = weight.const_data_ptr<float>();
  product.c = dx.mutable_data_ptr<float>();
  product.a_row = N, product.a_depth = 1;
  product.b_depth = weight.stride(0), product.b_column = weight.stride(1);
  product.c_row = K;
  product.rows = rows_of(grad), product.columns = K, product.depth = N;
  multiply(product);
  return dx;
}

static Tensor gradient_of_weight(const Tensor& grad, const Tensor& x) {
  const int64_t N = grad.size(grad.dim() - 1), K = x.size(x.dim() - 1);
  Tensor dw = new_buffer(grad, {N, K}, /*zeros=*/false);
  Matmul product{};
  product.a = grad.const_data_ptr<float>();
  product.b = x.const_data_ptr<float>();
  product.c = dw.mutable_data_ptr<float>();
  product.a_row = 1, product.a_depth = N;
  product.b_depth = K, product.b_column = 1;
  product.c_row = K;
  product.rows = N, product.columns = K, product.depth = rows_of(grad);
  multiply(product);
  return dw;
}

static Tensor gradient_of_bias(const Tensor& grad) {
  const int64_t N = grad.size(grad.dim() - 1);
  Tensor db = new_buffer(grad, {N}, /*zeros=*/false);
  ColumnSums sums{};
  sums.rows = grad.const_data_ptr<float>();
  sums.count = rows_of(grad), sums.columns = N;
  sums.out = db.mutable_data_ptr<float>();
  const int64_t grain = VALUES_PER_TASK / std::max<int64_t>(sums.count, 1) / 64 * 64 + 64;  // whole cache lines
  torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) { kernels().column_sums(sums, begin, end); });
  return db;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const std::optional<Tensor>& x,
                                                   const std::optional<Tensor>& weight, bool with_bias) {
  FASTGPT_CHECK(grad.dim() >= 1 && storage_of(grad, "grad") == FLOAT32, "grad: expected (..., N) in float32");
  const int64_t N = grad.size(grad.dim() - 1);
  if (weight.has_value())
    FASTGPT_CHECK(weight->dim() == 2 && weight->size(0) == N && storage_of(*weight, "weight") == FLOAT32,
                  "weight: expected (N, K) in float32");
  if (x.has_value())
    FASTGPT_CHECK(x->dim() == grad.dim() && rows_of(*x) == rows_of(grad) && storage_of(*x, "x") == FLOAT32,
                  "x: expected (..., K) in float32, with the rows of grad");
  const Tensor rows = packed(grad);
  const auto none = [&] { return new_small({0}, ScalarType::Float); };
  return {weight.has_value() ? gradient_of_x(rows, *weight) : none(),
          x.has_value() ? gradient_of_weight(rows, packed(*x)) : none(), with_bias ? gradient_of_bias(rows) : none()};
}

}  // namespace fastgpt
