// The matrix product of matmul.h: checks the arguments and divides the longer side of the output among threads. The
// kernel is in matmul_tiles.h.
#include "matmul.h"

#include <algorithm>
#include <memory>

namespace fastgpt {

constexpr int64_t LINES_PER_TASK = 64;  // rows or columns of `out`; two panels of B where vectors are widest

static void fill_with_bias(const Matmul& m) {
  for (int64_t i = 0; i < m.rows; ++i)
    if (m.bias)
      std::copy_n(m.bias, m.columns, m.c + i * m.c_row);
    else
      std::fill_n(m.c + i * m.c_row, m.columns, 0.0f);
}

void multiply(const Matmul& whole) {
  if (whole.depth == 0 && !whole.accumulate) fill_with_bias(whole);
  const bool by_rows = whole.rows > whole.columns;
  const int64_t lines = by_rows ? whole.rows : whole.columns;
  const int64_t tasks = (lines + LINES_PER_TASK - 1) / LINES_PER_TASK;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Matmul part = whole;
    const int64_t first = begin * LINES_PER_TASK, count = std::min(end * LINES_PER_TASK, lines) - first;
    if (by_rows) {
      part.a += first * part.a_row, part.c += first * part.c_row, part.rows = count;
      part.diagonal -= first;
    } else {
      part.b += first * part.b_column, part.c += first, part.columns = count;
      part.diagonal += first;
      if (part.bias) part.bias += first;
    }
    const std::unique_ptr<float[]> workspace(new float[static_cast<size_t>(kernels().matmul_workspace(part))]);
    kernels().matmul(part, workspace.get());
  });
}

void matmul(const Tensor& a, const Tensor& b, Tensor out, bool accumulate) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && out.dim() == 2 && a.size(1) == b.size(0) && a.size(0) == out.size(0) &&
                      b.size(1) == out.size(1),
                  "a, b, out: expected (M, K), (K, N) and (M, N)");
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float &&
                      out.scalar_type() == ScalarType::Float,
                  "a, b, out: expected float32");
  STD_TORCH_CHECK(out.size(1) <= 1 || out.stride(1) == 1, "out: expected contiguous rows");
  Matmul whole{};
  whole.a = a.const_data_ptr<float>();
  whole.b = b.const_data_ptr<float>();
  whole.c = out.mutable_data_ptr<float>();
  whole.a_row = a.stride(0), whole.a_depth = a.stride(1);
  whole.b_depth = b.stride(0), whole.b_column = b.stride(1);
  whole.c_row = out.stride(0);
  whole.rows = a.size(0), whole.columns = b.size(1), whole.depth = a.size(1);
  whole.accumulate = accumulate;
  multiply(whole);
}

}  // namespace fastgpt
