// The iterations of orthogonal.h. Several matrices are computed at a time, each by one thread, where there are as many
// as threads; else one after the other, each product divided among threads.
#include "orthogonal.h"

#include <algorithm>
#include <memory>

#include "matmul.h"

namespace fastgpt {

namespace {

constexpr int64_t BLOCK = 32;  // rows and columns of a square whose values are copied across the diagonal together

// Symmetric matrices (size, size), one after the other in memory.
struct Squares {
  explicit Squares(int64_t size, int count) : size(size), values(new float[static_cast<size_t>(count * size * size)]) {}
  float* operator[](int index) const { return values.get() + index * size * size; }
  int64_t size;
  std::unique_ptr<float[]> values;
};

// Copies the values above the diagonal to those below it.
void mirror(float* square, int64_t size) {
  torch::stable::parallel_for(0, (size + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * BLOCK; i < std::min(end * BLOCK, size); i += BLOCK)
      for (int64_t j = 0; j <= i; j += BLOCK)
        for (int64_t row = i; row < std::min(i + BLOCK, size); ++row)
          for (int64_t column = j; column < std::min(j + BLOCK, row); ++column)
            square[row * size + column] = square[column * size + row];
  });
}

// product = left right, symmetric as left and right are.
void multiply_symmetric(const float* left, const float* right, float* product, int64_t size) {
  Matmul m{};
  m.a = left, m.b = right, m.c = product;
  m.a_row = 1, m.a_depth = size;  // a is its own transpose, and this way it is packed faster
  m.b_depth = size, m.b_column = 1;
  m.c_row = size;
  m.rows = m.columns = m.depth = size;
  m.upper = true;
  multiply(m);
  mirror(product, size);
}

}  // namespace

Tensor orthogonal(const Tensor& x, double a, double b, double c, int64_t iterations) {
  FASTGPT_CHECK(x.dim() == 3 && x.scalar_type() == ScalarType::Float, "x: expected (N, rows, columns) in float32");
  const int64_t count = x.size(0), rows = x.size(1), columns = x.size(2);
  Tensor out = new_buffer(x, {count, rows, columns}, /*zeros=*/false);
  const float* inputs = x.const_data_ptr<float>();
  float* outputs = out.mutable_data_ptr<float>();
  const float scale = static_cast<float>(a), of_gram = static_cast<float>(b), of_square = static_cast<float>(c);

  const auto orthogonalise = [&](const float* matrix, float* result, const Squares& squares) {
    float *gram = squares[0], *p = squares[1], *product = squares[2], *spare = squares[3];
    Matmul m{};
    m.a = m.b = matrix, m.c = gram;
    m.a_row = m.b_column = x.stride(1), m.a_depth = m.b_depth = x.stride(2);
    m.c_row = m.rows = m.columns = rows, m.depth = columns;
    m.upper = true;
    multiply(m);
    mirror(gram, rows);
    for (int64_t iteration = 0; iteration < iterations; ++iteration) {
      if (iteration > 0) {  // gram = p gram p
        multiply_symmetric(p, gram, spare, rows);
        multiply_symmetric(p, spare, gram, rows);
      }
      multiply_symmetric(gram, gram, p, rows);
      for (int64_t i = 0; i < rows * rows; ++i) p[i] = of_square * p[i] + of_gram * gram[i];
      for (int64_t i = 0; i < rows; ++i) p[i * rows + i] += scale;
      if (iteration == 0) {
        std::copy_n(p, rows * rows, product);
      } else {
        multiply_symmetric(p, product, spare, rows);
        std::swap(product, spare);
      }
    }
    m = {};
    m.a = product, m.b = matrix, m.c = result;
    m.a_row = 1, m.a_depth = rows;
    m.b_depth = x.stride(1), m.b_column = x.stride(2);
    m.c_row = m.columns = columns, m.rows = m.depth = rows;
    multiply(m);
  };
  const int64_t grain = count < torch::stable::get_num_threads() ? count : 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const Squares squares(rows, 4);
    for (int64_t n = begin; n < end; ++n)
      orthogonalise(inputs + n * x.stride(0), outputs + n * rows * columns, squares);
  });
  return out;
}

}  // namespace fastgpt
