// The activation on the CPU (activation.h): checks the arguments, and divides the values among threads. The formulas and
// kernels are in activation_rows.h.
#include "activation.h"

#include <algorithm>

#include "sums.h"

namespace fastgpt {
namespace {

constexpr int64_t PIECE = 4096;  // values that are computed together where there is no bias, and so no rows

// A call in the form that the kernels take, and the tensors that it points into.
struct Call {
  const Tensor x;
  const Storage storage;
  const InFloat32 bias;
  ActivationRows rows{};

  Call(const Tensor& given, const std::optional<Tensor>& given_bias, int64_t kind)
      : x(packed(given)), storage(storage_of(given, "x")), bias(given_bias) {
    FASTGPT_CHECK(kind >= GELU && kind <= RELU2, "kind: expected 0, 1, 2 or 3");
    rows.kind = static_cast<Activation>(kind);
    rows.x = x.const_data_ptr();
    rows.values = x.numel();
    rows.columns = PIECE;
    if (given_bias.has_value()) {
      FASTGPT_CHECK(given_bias->dim() == 1 && x.dim() >= 1 && given_bias->size(0) == x.size(x.dim() - 1),
                    "bias: expected (C), to fit x (..., C)");
      rows.bias = bias.data();
    }
  }

  // The rows are those of x, because each column has a bias.
  void by_columns() { rows.columns = x.size(x.dim() - 1); }
  int64_t count() const { return rows.values == 0 ? 0 : (rows.values + rows.columns - 1) / rows.columns; }
};

}  // namespace

Tensor activation(const Tensor& x, const std::optional<Tensor>& bias, int64_t kind) {
  Call call(x, bias, kind);
  if (bias.has_value()) call.by_columns();
  Tensor out = new_like(x);
  call.rows.out = out.mutable_data_ptr();
  const auto kernel = kernels().activation[call.storage];
  torch::stable::parallel_for(0, call.count(), rows_per_task(call.rows.columns),
                              [&](int64_t begin, int64_t end) { kernel(call.rows, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> activation_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                                               int64_t kind, bool with_x, bool with_bias) {
  Call call(x, bias, kind);
  FASTGPT_CHECK(grad.numel() == x.numel() && storage_of(grad, "grad") == call.storage, "grad: expected one like x");
  if (bias.has_value() || with_bias) call.by_columns();
  const Tensor upstream = packed(grad);
  Tensor grad_x = with_x ? new_like(x) : new_small({0}, x.scalar_type());
  call.rows.grad = upstream.const_data_ptr();
  call.rows.out = with_x ? grad_x.mutable_data_ptr() : nullptr;
  const auto kernel = kernels().activation[call.storage];
  SumsOfBlocks sums(call.count(), call.rows.columns, with_bias ? 1 : 0);
  sums.for_each_block([&](int64_t begin, int64_t end, float* of_block) {
    ActivationRows rows = call.rows;
    rows.bias_sums = of_block;
    kernel(rows, begin, end);
  });
  return {grad_x, sums.total({with_bias ? call.rows.columns : 0}, x.scalar_type())};
}

}  // namespace fastgpt
