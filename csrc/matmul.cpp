// The matrix product of matmul.h: checks the arguments and divides the output among threads. The kernel is in
// matmul_tiles.h.
#include "matmul.h"

#include <algorithm>
#include <memory>

namespace fastgpt {

// A thread gets whole panels of A and of B, whatever the instruction set.
constexpr int64_t PANEL_ROWS = 12, PANEL_COLUMNS = 32;
constexpr int64_t SMALLEST_PART = int64_t{1} << 19;  // multiply-adds, which take about 4 us; waking a thread takes as long

static int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

// How many parts the rows and the columns of the output are divided into.
struct Grid {
  int64_t rows, columns;
};

// The division among `threads` whose largest part takes the least time. A part multiplies its rows with its columns, and
// packs both; to pack a value takes about as long as 16 multiply-adds.
static Grid grid_of(const Matmul& m, int64_t threads) {
  Grid best{1, 1};
  double least = 0.0;
  for (int64_t by_rows = 1; by_rows <= threads; ++by_rows) {
    const Grid grid{by_rows, threads / by_rows};
    const auto rows = static_cast<double>(parts_of(parts_of(m.rows, PANEL_ROWS), grid.rows) * PANEL_ROWS);
    const auto columns = static_cast<double>(parts_of(parts_of(m.columns, PANEL_COLUMNS), grid.columns) * PANEL_COLUMNS);
    const double time = rows * columns + 16.0 * (rows + columns);
    if (by_rows == 1 || time < least) best = grid, least = time;
  }
  return best;
}

static void fill_with_bias(const Matmul& m) {
  for (int64_t i = 0; i < m.rows; ++i)
    if (m.bias)
      std::copy_n(m.bias, m.columns, m.c + i * m.c_row);
    else
      std::fill_n(m.c + i * m.c_row, m.columns, 0.0f);
}

void multiply(const Matmul& whole) {
  if (whole.depth == 0 && !whole.accumulate) fill_with_bias(whole);
  const double work = static_cast<double>(whole.rows) * static_cast<double>(whole.columns) * static_cast<double>(whole.depth);
  const auto most = static_cast<int64_t>(std::min(work / SMALLEST_PART, 1e6)) + 1;
  const Grid grid = grid_of(whole, std::min<int64_t>(torch::stable::get_num_threads(), most));
  const int64_t rows = parts_of(parts_of(whole.rows, PANEL_ROWS), grid.rows) * PANEL_ROWS;
  const int64_t columns = parts_of(parts_of(whole.columns, PANEL_COLUMNS), grid.columns) * PANEL_COLUMNS;
  torch::stable::parallel_for(0, grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / grid.columns * rows, j = task % grid.columns * columns;
      Matmul part = whole;
      part.rows = std::min(rows, whole.rows - i), part.columns = std::min(columns, whole.columns - j);
      if (part.rows <= 0 || part.columns <= 0) continue;
      part.a += i * part.a_row;
      part.b += j * part.b_column;
      part.c += i * part.c_row + j;
      part.diagonal += j - i;
      if (part.bias) part.bias += j;
      const std::unique_ptr<float[]> workspace(new float[static_cast<size_t>(kernels().matmul_workspace(part))]);
      kernels().matmul(part, workspace.get());
    }
  });
}

void matmul(const Tensor& a, const Tensor& b, Tensor out, bool accumulate) {
  FASTGPT_CHECK(a.dim() == 2 && b.dim() == 2 && out.dim() == 2 && a.size(1) == b.size(0) && a.size(0) == out.size(0) &&
                    b.size(1) == out.size(1),
                "a, b, out: expected (M, K), (K, N) and (M, N)");
  FASTGPT_CHECK(a.scalar_type() == ScalarType::Float && b.scalar_type() == ScalarType::Float &&
                    out.scalar_type() == ScalarType::Float,
                "a, b, out: expected float32");
  FASTGPT_CHECK(out.size(1) <= 1 || out.stride(1) == 1, "out: expected contiguous rows");
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
