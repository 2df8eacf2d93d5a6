// Runs the row kernels of every instruction set under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
//
// Each buffer ends where its rows end, so that AddressSanitizer sees every access past the end. Rows begin at several
// offsets from the start of the allocation, so that they are aligned to a vector and not; at offset 0 an access before
// the start is seen, too. Results are compared with sums in double; the tests in Python compare them with the oracle.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "storage.h"

using namespace fastgpt;

static int failures = 0;

static void expect(bool ok, const char* what, const char* kernels_name, int64_t n) {
  if (ok) return;
  ++failures;
  std::printf("%s: wrong with %s at length %lld\n", what, kernels_name, static_cast<long long>(n));
}

// n values at the end of an allocation, `offset` values after its start.
template <class T>
struct Buffer {
  std::unique_ptr<T[]> memory;
  T* data;

  Buffer(int64_t n, int64_t offset) : memory(new T[static_cast<size_t>(n + offset)]), data(memory.get() + offset) {
    for (int64_t i = 0; i < n; ++i) from_float(std::sin(static_cast<float>(i) * 1.7f) * 4.0f, data[i]);
  }
};

template <class T>
constexpr Storage storage() {
  return std::is_same_v<T, float> ? FLOAT32 : std::is_same_v<T, BFloat16> ? BFLOAT16 : FLOAT16;
}

template <class T>
static void cross_entropy(int64_t n, int64_t offset, bool in_place, bool stream, bool smoothing, bool weighted,
                          bool capped) {
  Buffer<T> logits(n, offset), gradient(n, offset);
  Buffer<float> weight(n, 0);
  for (int64_t i = 0; i < n; ++i) weight.data[i] = 1.0f;
  std::vector<double> values(static_cast<size_t>(n));
  double max = -INFINITY, sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double x = to_float(logits.data[i]);
    max = std::fmax(max, values[static_cast<size_t>(i)] = capped ? 3.0 * std::tanh(x / 3.0) : x);
  }
  for (double value : values) sum += std::exp(value - max);

  const int64_t target = n / 2;
  float loss = 0.0f, correct = -1.0f, statistics[2] = {}, row_scale = 2.0f;
  CrossEntropyRows rows{};
  rows.logits = logits.data;
  rows.gradient = in_place ? logits.data : gradient.data;
  rows.logits_stride = rows.gradient_stride = rows.classes = n;
  rows.targets = &target;
  rows.ignore_index = -100;
  rows.class_weight = weighted ? weight.data : nullptr;
  rows.class_weight_sum = static_cast<float>(n);
  rows.label_smoothing = smoothing ? 0.1f : 0.0f;
  rows.row_scale = &row_scale;
  rows.z_loss = capped ? 0.5f : 0.0f;
  rows.softcap = capped ? 3.0f : 0.0f;
  rows.loss = &loss;
  rows.correct = capped ? &correct : nullptr;
  rows.statistics = n % 2 == 0 ? statistics : nullptr;
  rows.stream = stream;
  Buffer<float> scratch(kernels().cross_entropy_scratch(rows), 0);
  const bool is_largest = static_cast<int64_t>(std::max_element(values.begin(), values.end()) - values.begin()) == target;
  kernels().cross_entropy[storage<T>()](rows, 0, 1, scratch.data);

  const double log_of_sum = max + std::log(sum);
  double expected = capped ? 0.5 * log_of_sum * log_of_sum : 0.0, total = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double log_p = values[static_cast<size_t>(i)] - max - std::log(sum);
    expected -= log_p * ((smoothing ? 0.1 / static_cast<double>(n) : 0.0) + (i == target ? (smoothing ? 0.9 : 1.0) : 0.0));
    const double slope = capped ? 1.0 - values[static_cast<size_t>(i)] * values[static_cast<size_t>(i)] / 9.0 : 1.0;
    total += to_float(static_cast<T*>(rows.gradient)[i]) / std::fmax(slope, 1e-3);
  }
  expect(std::fabs(loss - expected) < 1e-4 * (1.0 + expected), "loss", kernels().name, n);
  // Without the slopes of the cap, the sum of a row is 0, or that of the z-loss: 2 z, which is 1, times the row's scale.
  expect(std::fabs(total - (capped ? 2.0 * log_of_sum : 0.0)) < (capped && sizeof(T) == 2 ? 0.4 : 0.05), "gradient", kernels().name, n);
  if (capped) expect(correct == (is_largest ? 1.0f : 0.0f), "correct", kernels().name, n);

  const int64_t ignored = -100;
  rows.targets = &ignored;
  kernels().cross_entropy[storage<T>()](rows, 0, 1, scratch.data);
  expect(loss == 0.0f && correct <= 0.0f && to_float(static_cast<T*>(rows.gradient)[n - 1]) == 0.0f, "ignored row", kernels().name, n);
}

// More rows than a whole number of vectors has lanes. Every sixth row is ignored.
static void short_rows(int64_t n, bool in_place, bool capped) {
  constexpr int64_t ROWS = 35;
  Buffer<float> logits(ROWS * n, 1), gradient(ROWS * n, 1), loss(ROWS, 0), statistics(2 * ROWS, 0), correct(ROWS, 0);
  std::vector<double> values(logits.data, logits.data + ROWS * n);
  for (double& value : values) value = capped ? 3.0 * std::tanh(value / 3.0) : value;
  std::vector<int64_t> targets;
  for (int64_t i = 0; i < ROWS; ++i) targets.push_back(i % 6 == 5 ? -100 : (i * 7) % n);
  const float row_scale = 2.0f;
  CrossEntropyRows rows{};
  rows.logits = logits.data;
  rows.gradient = in_place ? logits.data : gradient.data;
  rows.logits_stride = rows.gradient_stride = rows.classes = n;
  rows.targets = targets.data();
  rows.ignore_index = -100;
  rows.class_weight_sum = static_cast<float>(n);
  rows.row_scale = &row_scale;
  rows.loss = loss.data;
  rows.statistics = statistics.data;
  rows.softcap = capped ? 3.0f : 0.0f;
  rows.correct = capped ? correct.data : nullptr;
  Buffer<float> scratch(kernels().cross_entropy_scratch(rows), 0);
  kernels().cross_entropy[FLOAT32](rows, 0, ROWS, scratch.data);
  for (int64_t i = 0; i < ROWS; ++i) {
    const double* x = values.data() + i * n;
    const int64_t target = targets[static_cast<size_t>(i)];
    double sum = 0.0, worst = 0.0;
    for (int64_t j = 0; j < n; ++j) sum += std::exp(x[j]);
    for (int64_t j = 0; j < n; ++j) {
      const double slope = capped ? 1.0 - x[j] * x[j] / 9.0 : 1.0;
      const double expected = target < 0 ? 0.0 : 2.0 * slope * (std::exp(x[j]) / sum - (j == target));
      worst = std::fmax(worst, std::fabs(expected - static_cast<float*>(rows.gradient)[i * n + j]));
    }
    const double expected = target < 0 ? 0.0 : std::log(sum) - x[target];
    expect(std::fabs(loss.data[i] - expected) < 1e-5 * (1.0 + expected), "loss of rows", kernels().name, n);
    expect(worst < 1e-5, "gradient of rows", kernels().name, n);
  }
  expect(kernels().count_indices(targets.data(), ROWS, n, &rows.ignore_index) == 30, "count", kernels().name, n);
  expect(kernels().count_indices(targets.data(), ROWS, n, nullptr) == -1, "count all", kernels().name, n);
}

// Two rows with a bias, forward and backward; the sums of a bias's gradient are those of both rows.
template <class T>
static void activation(int64_t columns, int64_t offset, Activation kind) {
  Buffer<T> x(2 * columns, offset), grad(2 * columns, offset), out(2 * columns, offset), grad_x(2 * columns, 0);
  Buffer<float> bias(columns, 0);
  std::vector<float> sums(static_cast<size_t>(columns));
  ActivationRows rows{};
  rows.kind = kind;
  rows.x = x.data, rows.bias = bias.data, rows.out = out.data;
  rows.values = 2 * columns, rows.columns = columns;
  kernels().activation[storage<T>()](rows, 0, 2);
  rows.grad = grad.data, rows.out = grad_x.data, rows.bias_sums = sums.data();
  kernels().activation[storage<T>()](rows, 0, 2);
  const double v = double{to_float(x.data[2 * columns - 1])} + bias.data[columns - 1];
  const double root = std::sqrt(2.0), inner = root / std::sqrt(M_PI) * (v + 0.044715 * v * v * v);
  const double positive = v > 0.0 ? v : 0.0;
  const double expected[] = {v * 0.5 * std::erfc(-v / root), 0.5 * v * (1.0 + std::tanh(inner)), positive,
                             positive * positive};
  const double unit = std::is_same_v<T, float> ? 1e-6 : 8e-3;
  expect(std::fabs(to_float(out.data[2 * columns - 1]) - expected[kind]) < unit * (1.0 + expected[RELU2]), "activation",
         kernels().name, columns);
  const double sum = double{to_float(grad_x.data[0])} + to_float(grad_x.data[columns]);
  expect(std::fabs(sums[0] - sum) < 40.0 * unit, "sums of the bias", kernels().name, columns);
}

// x and y of one storage type, residual and h in float32, with a residual, dropout and all the gradients.
template <class T>
static void layer_norm(int64_t columns, int64_t offset, bool drops) {
  constexpr int64_t ROWS = 2;
  const int64_t n = ROWS * columns;
  Buffer<T> x(n, offset), y(n, offset), grad_x(n, 0);
  Buffer<float> residual(n, offset), h(n, 1), grad_residual(n, 0), weight(columns, 0), bias(columns, 1);
  Buffer<float> mean(ROWS, 0), rstd(ROWS, 0), scratch(2 * columns, 0), more_scratch(4 * columns, 0);
  std::vector<float> sums(static_cast<size_t>(2 * columns));
  LayerNormRows a{};
  a.x = {x.data, storage<T>()}, a.y = {y.data, storage<T>()};
  a.residual = {residual.data, FLOAT32}, a.h = {h.data, FLOAT32};
  a.weight = weight.data, a.bias = bias.data, a.mean = mean.data, a.rstd = rstd.data;
  a.eps = 1e-5f, a.dropout_p = drops ? 0.3 : 0.0, a.seed = 7, a.columns = columns;
  kernels().layer_norm(a, 0, ROWS, scratch.data);
  LayerNormGradients d{};
  d.grad_y = a.y, d.grad_h = a.residual, d.h = a.h;
  d.grad_residual = {grad_residual.data, FLOAT32}, d.grad_x = {grad_x.data, storage<T>()};
  d.weight = weight.data, d.mean = mean.data, d.rstd = rstd.data;
  d.weight_sums = sums.data(), d.bias_sums = sums.data() + columns;
  d.dropout_p = a.dropout_p, d.seed = a.seed, d.columns = columns;
  kernels().layer_norm_gradients(d, 0, ROWS, more_scratch.data);

  double sum = 0.0, of_bias = 0.0;
  for (int64_t j = 0; j < columns; ++j) sum += h.data[j];
  for (int64_t row = 0; row < ROWS; ++row) of_bias += to_float(y.data[(row + 1) * columns - 1]);
  expect(std::fabs(mean.data[0] - sum / static_cast<double>(columns)) < 1e-5, "mean", kernels().name, columns);
  expect(std::fabs(sums.back() - of_bias) < 1e-4, "gradient of the bias", kernels().name, columns);
  const double added = double{h.data[n - 1]} - residual.data[n - 1], given = to_float(x.data[n - 1]);
  const bool kept = std::fabs(added - (drops ? given / 0.7 : given)) < 1e-4 * (1.0 + std::fabs(given));
  expect(kept || (drops && added == 0.0), "sum", kernels().name, columns);
}

template <class T>
static void embedding(int64_t columns, bool with_positions, bool stream) {
  constexpr int64_t V = 3, N = 5;
  Buffer<T> table(V * columns, 0), positions(2 * columns, 0), out(N * columns, 0), sum(columns, 0);
  const int64_t tokens[N] = {2, 0, 0, 1, 2};
  GatherRows rows{};
  rows.tokens = tokens;
  rows.token_table = table.data;
  rows.position_table = with_positions ? positions.data : nullptr;
  rows.token_stride = rows.position_stride = rows.columns = columns;
  rows.length = 2;
  rows.out = out.data;
  rows.stream = stream;
  kernels().gather[storage<T>()](rows, 0, N);
  for (int64_t i = 0; i < columns; ++i) {
    T expected;
    const float position = with_positions ? to_float(positions.data[columns + i]) : 0.0f;
    from_float(to_float(table.data[columns + i]) + position, expected);
    expect(to_float(out.data[3 * columns + i]) == to_float(expected), "gather", kernels().name, columns);
  }
  const int64_t order[2] = {1, 4};
  SumRows sums{};
  sums.rows = out.data;
  sums.row_stride = sums.columns = columns;
  sums.order = order;
  sums.count = 2;
  sums.out = sum.data;
  kernels().sum_rows[storage<T>()](sums);
  for (int64_t i = 0; i < columns; ++i) {
    T expected;
    from_float(to_float(out.data[columns + i]) + to_float(out.data[4 * columns + i]), expected);
    expect(to_float(sum.data[i]) == to_float(expected), "sum", kernels().name, columns);
  }
}

// Nine sequences, of which eight are added at a time and the last one alone. The columns are in two parts, as for two
// threads.
template <class T>
static void embedding_sums(int64_t columns, bool with_tokens, bool with_positions) {
  constexpr int64_t V = 3, B = 9, LENGTH = 2;
  Buffer<T> rows(B * LENGTH * columns, 1), token_grad(V * columns, 0), position_grad(LENGTH * columns, 0);
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < B * LENGTH; ++i) tokens.push_back(i * i % V);
  for (int part = 0; part < 2; ++part) {
    const int64_t begin = part * columns / 2, end = (part + 1) * columns / 2, width = end - begin;
    std::vector<float> token_sums(static_cast<size_t>(V * width)), position_sums(static_cast<size_t>(LENGTH * width));
    AccumulateRows a{};
    a.rows = rows.data, a.tokens = tokens.data();
    a.count = B * LENGTH, a.length = LENGTH, a.vocab_size = V, a.columns = columns, a.begin = begin, a.end = end;
    a.token_sums = with_tokens ? token_sums.data() : nullptr;
    a.position_sums = with_positions ? position_sums.data() : nullptr;
    a.token_grad = token_grad.data, a.position_grad = position_grad.data;
    kernels().accumulate_rows[storage<T>()](a);
  }
  for (int64_t j = 0; j < columns; ++j) {
    double of_token = 0.0, of_position = 0.0;
    for (int64_t i = 0; i < B * LENGTH; ++i) {
      if (tokens[static_cast<size_t>(i)] == 1) of_token += to_float(rows.data[i * columns + j]);
      if (i % LENGTH == 1) of_position += to_float(rows.data[i * columns + j]);
    }
    const double tolerance = std::is_same_v<T, float> ? 1e-5 : 0.2;
    if (with_tokens)
      expect(std::fabs(to_float(token_grad.data[columns + j]) - of_token) < tolerance, "token", kernels().name, columns);
    if (with_positions)
      expect(std::fabs(to_float(position_grad.data[columns + j]) - of_position) < tolerance, "position", kernels().name,
             columns);
  }
}

template <class T>
static void all() {
  std::vector<int64_t> lengths;
  for (int64_t n = 1; n <= 70; ++n) lengths.push_back(n);
  for (int64_t n : {127, 128, 129, 2047, 2048, 2049, 2100, 4099}) lengths.push_back(n);
  for (int64_t n : lengths) {
    for (int64_t offset : {0, 1, 3})
      for (int branch = 0; branch < 32; ++branch)
        cross_entropy<T>(n, offset, branch & 1, branch & 2, branch & 4, branch & 8, branch & 16);
    for (int64_t offset : {0, 1, 3})
      for (Activation kind : {GELU, GELU_TANH, RELU, RELU2}) activation<T>(n, offset, kind);
    for (int64_t offset : {0, 1, 3})
      for (bool drops : {false, true}) layer_norm<T>(n, offset, drops);
    for (int branch = 0; branch < 4; ++branch) embedding<T>(n, branch & 1, branch & 2);
    for (int branch = 1; branch < 4; ++branch) embedding_sums<T>(n, branch & 1, branch & 2);
  }
}

template <class T>
static void linear(int64_t rows, int64_t columns, int64_t depth, bool with_bias) {
  Buffer<T> given(rows * depth, 1), weight(columns * depth, 0), bias(columns, 0), out(rows * columns, 3);
  Buffer<float> x(rows * depth, 1);
  kernels().widen[storage<T>()](given.data, x.data, rows * depth);
  LinearRows a{};
  a.x = x.data, a.weight = weight.data, a.out = out.data;
  a.bias = with_bias ? bias.data : nullptr;
  a.rows = rows, a.depth = depth, a.columns = columns, a.weight_stride = depth;
  kernels().linear[storage<T>()](a, 0, columns);
  for (int64_t r : {int64_t{0}, rows - 1})
    for (int64_t n : {int64_t{0}, columns - 1}) {
      double expected = with_bias ? double{to_float(bias.data[n])} : 0.0, size = 1.0;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = double{to_float(given.data[r * depth + k])} * to_float(weight.data[n * depth + k]);
        expected += term, size += std::fabs(term);
      }
      const double unit = sizeof(T) == 4 ? 1e-6 : 8e-3;
      expect(std::fabs(to_float(out.data[r * columns + n]) - expected) < unit * size, "linear", kernels().name, depth);
    }
}

template <class T>
static void norm_of_floats(int64_t rows, int64_t columns, bool with_bias) {
  Buffer<float> x(rows * columns, 1), out(rows * columns, 3);
  Buffer<T> weight(columns, 0), bias(columns, 0);
  NormFloats a{};
  a.x = x.data, a.out = out.data, a.rows = rows, a.columns = columns, a.eps = 1e-5f;
  a.weight = weight.data, a.bias = with_bias ? bias.data : nullptr;
  kernels().norm_floats[storage<T>()](a);
  const float* last = x.data + (rows - 1) * columns;
  double mean = 0.0, variance = 0.0;
  for (int64_t c = 0; c < columns; ++c) mean += last[c] / static_cast<double>(columns);
  for (int64_t c = 0; c < columns; ++c) variance += (last[c] - mean) * (last[c] - mean) / static_cast<double>(columns);
  const int64_t c = columns - 1;
  const double expected = (last[c] - mean) / std::sqrt(variance + 1e-5) * to_float(weight.data[c]);
  const double shift = with_bias ? double{to_float(bias.data[c])} : 0.0;
  expect(std::fabs(out.data[rows * columns - 1] - expected - shift) < 1e-4, "layer norm", kernels().name, columns);
}

// The newest of length + 1 tokens, for the last pair of a sequence and a head, computed in two parts. The other sequence
// is shorter, and the rows of the cache are in another order.
template <class T>
static void attend(int64_t heads, int64_t size, int64_t length) {
  const int64_t capacity = length + 1, pairs = 2 * heads, C = heads * size;
  Buffer<float> qkv(2 * 3 * C, 1), out(2 * C, 3);
  Buffer<T> keys(pairs * capacity * size, 0), values(pairs * capacity * size, 1);
  AttendNewest a{};
  a.qkv = qkv.data, a.keys = keys.data, a.values = values.data, a.out = out.data;
  const CachePlace places[] = {{1, length / 2}, {0, length}};
  a.heads = heads, a.head_size = size, a.capacity = capacity, a.places = places;
  kernels().attend_newest[storage<T>()](a, 0, pairs / 2);
  kernels().attend_newest[storage<T>()](a, pairs / 2, pairs);
  const float* q = qkv.data + 3 * C + C - size;
  const T* key = keys.data + (heads - 1) * capacity * size;
  const T* value = values.data + (heads - 1) * capacity * size;
  double total = 0.0, expected = 0.0;
  for (int64_t t = 0; t <= length; ++t) {
    double score = 0.0;
    for (int64_t d = 0; d < size; ++d) score += q[d] * double{to_float(key[t * size + d])};
    const double weight = std::exp(score / std::sqrt(static_cast<double>(size)));
    total += weight, expected += weight * to_float(value[t * size + size - 1]);
  }
  const double found = out.data[2 * C - 1];
  expect(std::fabs(found - expected / total) < 1e-4 * (1.0 + std::fabs(found)), "attention", kernels().name, length);
}

// The first and the last of `columns` sums, computed in two parts, as for two threads.
static void column_sums(int64_t rows, int64_t columns) {
  Buffer<float> values(rows * columns, 1), out(columns, 3);
  ColumnSums a{};
  a.rows = values.data, a.out = out.data;
  a.count = rows, a.columns = columns;
  kernels().column_sums(a, 0, columns / 2);
  kernels().column_sums(a, columns / 2, columns);
  for (int64_t j : {int64_t{0}, columns - 1}) {
    double expected = 0.0, size = 1.0;
    for (int64_t i = 0; i < rows; ++i)
      expected += values.data[i * columns + j], size += std::fabs(values.data[i * columns + j]);
    expect(std::fabs(out.data[j] - expected) < 1e-6 * size, "column sums", kernels().name, columns);
  }
}

static void matmul(int64_t rows, int64_t columns, int64_t depth, bool a_transposed, bool b_transposed, bool accumulate,
                   bool upper) {
  Buffer<float> a(rows * depth, 1), b(depth * columns, 0), bias(columns, 0), c(rows * columns, 3);
  std::vector<float> before(c.data, c.data + rows * columns);
  Matmul m{};
  m.a = a.data, m.b = b.data, m.c = c.data;
  m.a_row = a_transposed ? 1 : depth, m.a_depth = a_transposed ? rows : 1;
  m.b_depth = b_transposed ? 1 : columns, m.b_column = b_transposed ? depth : 1;
  m.c_row = columns;
  m.rows = rows, m.columns = columns, m.depth = depth;
  m.accumulate = accumulate;
  m.bias = accumulate || rows % 2 == 0 ? nullptr : bias.data;
  m.upper = upper;
  std::vector<float> workspace(static_cast<size_t>(kernels().matmul_workspace(m)));
  kernels().matmul(m, workspace.data());
  for (int64_t i : {int64_t{0}, rows - 1})
    for (int64_t j : {int64_t{0}, columns - 1}) {
      if (upper && i > j) continue;
      double expected = accumulate ? before[static_cast<size_t>(i * columns + j)] : m.bias ? m.bias[j] : 0.0, size = 1.0;
      for (int64_t p = 0; p < depth; ++p) {
        const double term = double{a.data[i * m.a_row + p * m.a_depth]} * b.data[p * m.b_depth + j * m.b_column];
        expected += term, size += std::fabs(term);
      }
      expect(std::fabs(c.data[i * columns + j] - expected) < 1e-5 * size, "matmul", kernels().name, rows);
    }
}

// A step in two parts, as for two threads, with a gradient of 1 and moments of 0: the weight moves by the step size.
static void adamw(int64_t count) {
  Buffer<float> weight(count, 1), grad(count, 1), exp_avg(count, 1), exp_avg_sq(count, 1);
  for (int64_t i = 0; i < count; ++i) weight.data[i] = 2.0f, grad.data[i] = 1.0f, exp_avg.data[i] = exp_avg_sq.data[i] = 0.0f;
  AdamWRows a{};
  a.weight = weight.data, a.grad = grad.data, a.exp_avg = exp_avg.data, a.exp_avg_sq = exp_avg_sq.data;
  a.grad_scale = 0.5f, a.kept = 0.5f, a.beta1 = 0.5f, a.beta2 = 0.75f, a.eps = 0.0f;
  a.step_size = 1.0f, a.root_correction = 1.0f;
  kernels().adamw(a, 0, count / 2);
  kernels().adamw(a, count / 2, count);
  for (int64_t i = 0; i < count; ++i) expect(std::fabs(weight.data[i]) < 1e-6, "adamw", kernels().name, count);
  expect(std::fabs(kernels().sum_of_squares(grad.data, count) - double(count)) < 1e-6, "norm", kernels().name, count);
}

// `group` query heads on one key head, with gaps between their rows or without. Compared with the formula: the first
// value of the first and the last query.
template <class T>
static void attention(int64_t group, int64_t queries, int64_t keys, int64_t width, bool is_causal, double dropout_p) {
  const int64_t row = width + (queries % 2 == 0 ? 3 : 0), q_values = group * queries * row, k_values = keys * row;
  Buffer<T> q(q_values, 0), k(k_values, 1), v(k_values, 0), out(q_values, 1), grad_out(q_values, 0);
  Buffer<T> grad_q(q_values, 0), grad_k(k_values, 0), grad_v(k_values, 1);
  Buffer<float> lse(group * queries, 0);
  const auto rows = [&](T* data, int64_t count) { return HeadRows{data, 0, count * row, row}; };
  Attention a{};
  a.q = rows(q.data, queries), a.k = rows(k.data, keys), a.v = rows(v.data, keys), a.out = rows(out.data, queries);
  a.grad_out = rows(grad_out.data, queries), a.grad_q = rows(grad_q.data, queries);
  a.grad_k = rows(grad_k.data, keys), a.grad_v = rows(grad_v.data, keys);
  a.lse = lse.data;
  a.batch = a.key_heads = 1, a.heads = group, a.queries = queries, a.keys = keys, a.width = width;
  a.is_causal = is_causal, a.scale = -0.1f, a.dropout_p = dropout_p, a.seed = 7;
  const auto with_workspace = [](int64_t values, auto call) {
    float* workspace = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>((values + 15) / 16 * 64)));
    call(workspace);
    std::free(workspace);
  };
  with_workspace(kernels().attention_workspace(a), [&](float* workspace) {
    kernels().attention[storage<T>()](a, 0, kernels().attention_tasks(a), workspace);
  });
  with_workspace(kernels().attention_backward_workspace(a), [&](float* workspace) {
    kernels().attention_backward[storage<T>()](a, 0, 1, workspace);
  });
  double worst = 0.0, sum_of_grad_q = 0.0;
  for (int64_t h = 0; h < group; ++h)
    for (int64_t i : {int64_t{0}, queries - 1}) {
      const T* x = q.data + (h * queries + i) * row;
      const int64_t seen = is_causal ? std::max<int64_t>(0, std::min(keys, i + keys - queries + 1)) : keys;
      double sum = 0.0, expected = 0.0;
      for (int64_t j = 0; j < seen; ++j) {
        double score = 0.0;
        for (int64_t d = 0; d < width; ++d) score += double{to_float(x[d])} * to_float(k.data[j * row + d]);
        sum += std::exp(-0.1 * score);
        expected += std::exp(-0.1 * score) * to_float(v.data[j * row]);
      }
      expected = seen > 0 ? expected / sum : 0.0;
      worst = std::fmax(worst, std::fabs(expected - to_float(out.data[(h * queries + i) * row])));
    }
  for (int64_t i = 0; i < group * queries; ++i) sum_of_grad_q += to_float(grad_q.data[i * row]);
  if (dropout_p == 0.0) expect(worst < (sizeof(T) == 4 ? 1e-4 : 0.05), "attention", kernels().name, keys);
  expect(std::isfinite(sum_of_grad_q), "attention's gradient", kernels().name, keys);
}

int main() {
  for (const char* name : {"avx512", "avx2", "generic"}) {
    if (!use_kernels(name)) {
      std::printf("%s: not on this processor\n", name);
      continue;
    }
    for (int64_t count : {1, 15, 16, 17, 64, 65, 130}) adamw(count);
    for (int64_t n = 6; n <= 150; ++n)
      for (bool in_place : {false, true})
        for (bool capped : {false, true}) short_rows(n, in_place, capped);
    all<float>();
    all<BFloat16>();
    all<Float16>();
    for (int64_t rows : {1, 11, 12, 13, 300})
      for (int64_t columns : {1, 31, 32, 33, 299, 301})
        for (int64_t depth : {1, 7, 8, 513})
          for (int branch = 0; branch < 16; ++branch)
            matmul(rows, columns, depth, branch & 1, branch & 2, branch & 4, branch & 8);
    for (int64_t rows : {0, 1, 32, 33, 100})
      for (int64_t columns : {1, 15, 16, 17, 130, 300}) column_sums(rows, columns);
    for (int64_t rows = 1; rows <= 9; ++rows)
      for (int64_t depth : {1, 3, 7, 15, 16, 17, 64, 100})
        for (int64_t columns : {1, 15, 17}) {
          linear<float>(rows, columns, depth, rows & 1);
          linear<BFloat16>(rows, columns, depth, rows & 1);
          linear<Float16>(rows, columns, depth, rows & 1);
        }
    for (int64_t size : {1, 3, 16, 17, 64, 256})
      for (int64_t length : {0, 1, 15, 16, 40}) {
        attend<float>(1 + length % 3, size, length);
        attend<BFloat16>(1 + length % 3, size, length);
        attend<Float16>(1 + length % 3, size, length);
        norm_of_floats<float>(1 + length % 3, size, length & 1);
        norm_of_floats<BFloat16>(1 + length % 3, size, length & 1);
        norm_of_floats<Float16>(1 + length % 3, size, length & 1);
      }
    for (int64_t queries : {1, 5, 33, 300})
      for (int64_t keys : {1, 4, 31, 70, 257})
        for (int64_t width : {1, 15, 16, 33})
          for (int branch = 0; branch < 4; ++branch) {
            attention<float>(1 + queries % 3, queries, keys, width, branch & 1, branch & 2 ? 0.25 : 0.0);
            if (queries == 33) attention<BFloat16>(2, queries, keys, width, branch & 1, branch & 2 ? 0.25 : 0.0);
            if (queries == 33) attention<Float16>(1, queries, keys, width, branch & 1, branch & 2 ? 0.25 : 0.0);
          }
    attention<float>(2, 70, 600, 200, true, 0.5);
    std::printf("%s: done\n", name);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
