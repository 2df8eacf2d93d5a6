// Layer norm on the CPU (layer_norm.h): checks the arguments, and divides the rows among threads. The formulas and kernels
// are in layer_norm_rows.h.
#include "layer_norm.h"

#include <algorithm>
#include <memory>

#include "sums.h"

namespace fastgpt {
namespace {

TypedRows rows_of(const Tensor& tensor, const char* name) {
  return {const_cast<void*>(tensor.const_data_ptr()), storage_of(tensor, name)};
}

uint64_t key_of(double dropout_p, const std::optional<Tensor>& seed) {
  if (dropout_p == 0.0) return 0;
  FASTGPT_CHECK(seed.has_value() && seed->dim() == 0 && seed->scalar_type() == ScalarType::Long,
                "seed: expected a 0-dim int64 tensor, because dropout_p is not 0");
  return static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
}

// The mask's row of row 0, in a batch of which x (B, ..., C) has the sequences from `first_sequence` on.
uint64_t first_row_of(const Tensor& x, int64_t n_rows, int64_t first_sequence) {
  return static_cast<uint64_t>(n_rows == 0 ? 0 : first_sequence * (n_rows / x.size(0)));
}

int64_t width_of(const Tensor& x, const Tensor& weight) {
  FASTGPT_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1) && weight.size(0) > 0,
                "weight: expected (C), to fit x (..., C) with C at least 1");
  return weight.size(0);
}

// The shape of `like` where the tensor is wanted, else empty.
Tensor new_if(bool wanted, const Tensor& like, ScalarType dtype) {
  return wanted ? new_like(like, dtype) : new_small({0}, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const std::optional<Tensor>& residual,
                                              const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                                              double dropout_p, const std::optional<Tensor>& seed,
                                              int64_t first_sequence, ScalarType out_dtype) {
  const int64_t C = width_of(x, weight), n_rows = x.numel() / C;
  FASTGPT_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == C), "bias: expected (C), like weight");
  const bool adds = residual.has_value();
  FASTGPT_CHECK(!adds || (residual->numel() == x.numel() && residual->size(residual->dim() - 1) == C),
                "residual: expected the shape of x");
  const Tensor given = packed(x), other = packed(residual.value_or(x));
  const InFloat32 scale(weight), shift(bias);
  const ScalarType wide = given.scalar_type() == other.scalar_type() ? given.scalar_type() : ScalarType::Float;
  Tensor y = new_like(x, out_dtype), h = new_if(adds, x, adds ? wide : x.scalar_type());
  Tensor stats = new_small({2, n_rows}, ScalarType::Float);
  LayerNormRows rows{};
  rows.x = rows_of(given, "x");
  if (adds) rows.residual = rows_of(other, "residual");
  rows.h = rows_of(h, "h");
  rows.y = rows_of(y, "y");
  rows.weight = scale.data();
  rows.bias = shift.data();
  rows.mean = stats.mutable_data_ptr<float>();
  rows.rstd = rows.mean + n_rows;
  rows.eps = static_cast<float>(eps);
  rows.columns = C;
  rows.dropout_p = adds ? dropout_p : 0.0;
  rows.seed = key_of(rows.dropout_p, seed);
  rows.first_row = first_row_of(x, n_rows, first_sequence);
  torch::stable::parallel_for(0, n_rows, rows_per_task(C), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(2 * C)]);
    kernels().layer_norm(rows, begin, end, scratch.get());
  });
  return {y, h, stats};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad_y, const std::optional<Tensor>& grad_sum, const Tensor& x, const Tensor& weight,
    const Tensor& stats, double dropout_p, const std::optional<Tensor>& seed, int64_t first_sequence,
    ScalarType residual_dtype, ScalarType x_dtype, const std::vector<bool>& output_mask) {
  FASTGPT_CHECK(output_mask.size() == 4, "output_mask: expected x, residual, weight, bias");
  const bool with_x = output_mask[0], with_residual = output_mask[1];
  const bool with_weight = output_mask[2], with_bias = output_mask[3];
  const int64_t C = width_of(x, weight), n_rows = x.numel() / C;
  FASTGPT_CHECK(grad_y.numel() == x.numel() && (!grad_sum.has_value() || grad_sum->numel() == x.numel()),
                "grad_y, grad_sum: expected the shape of x");
  FASTGPT_CHECK(stats.scalar_type() == ScalarType::Float && stats.is_contiguous() && stats.numel() == 2 * n_rows,
                "stats: expected contiguous float32 (2, rows)");
  const bool shared = dropout_p == 0.0 && x_dtype == residual_dtype;
  const Tensor upstream = packed(grad_y), of_sum = packed(grad_sum.value_or(x)), h = packed(x);
  const InFloat32 scale(weight);
  Tensor grad_residual = new_if(with_residual || (shared && with_x), x, residual_dtype);
  Tensor grad_x = new_if(with_x && !shared, x, x_dtype);
  LayerNormGradients rows{};
  rows.grad_y = rows_of(upstream, "grad_y");
  if (grad_sum.has_value()) rows.grad_h = rows_of(of_sum, "grad_sum");
  rows.h = rows_of(h, "x");
  if (with_residual || (shared && with_x)) rows.grad_residual = rows_of(grad_residual, "grad_residual");
  if (with_x && !shared) rows.grad_x = rows_of(grad_x, "grad_x");
  rows.weight = scale.data();
  rows.mean = stats.const_data_ptr<float>();
  rows.rstd = rows.mean + n_rows;
  rows.columns = C;
  rows.dropout_p = dropout_p;
  rows.seed = key_of(dropout_p, seed);
  rows.first_row = first_row_of(x, n_rows, first_sequence);
  SumsOfBlocks sums(n_rows, C, int{with_weight} + int{with_bias});
  sums.for_each_block([&](int64_t begin, int64_t end, float* of_block) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(4 * C)]);
    LayerNormGradients block = rows;
    block.weight_sums = with_weight ? of_block : nullptr;
    block.bias_sums = with_bias ? of_block + (with_weight ? C : 0) : nullptr;
    kernels().layer_norm_gradients(block, begin, end, scratch.get());
  });
  return {grad_residual, grad_x, sums.total({int{with_weight} + int{with_bias}, C}, weight.scalar_type())};
}

}  // namespace fastgpt
