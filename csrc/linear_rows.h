// x W^T + b for a few rows x. W is read once and in order, so that the product takes as long as reading W from memory.
//
// Matrix libraries are made for many rows. For a single row, MKL on AMD's processors reads W at a third of that speed.
// What is fused: the products, the bias, and the rounding to the dtype of the output. Also here: the sum of many rows,
// which is the gradient of the bias.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fastgpt {
namespace {

constexpr int64_t AHEAD = 4096;          // bytes of W fetched ahead; the hardware's prefetcher stops where a page ends
constexpr int64_t ROWS_OF_WEIGHT = 16;   // they stay in the nearer caches until every row of x has used them

// out[r][n] = x[r] . w[n] + b[n], for ROWS rows of x from `first` and n in [begin, end). CHAINS separate sums hide
// the latency of an addition.
template <class T, class Out, int ROWS, int CHAINS>
void dot_products(const LinearRows& a, int64_t first, int64_t begin, int64_t end) {
  const int64_t K = a.depth, whole = K / LANES * LANES;
  const float* x = a.x + first * K;
  for (int64_t n = begin; n < end; ++n) {
    const T* w = static_cast<const T*>(a.weight) + n * a.weight_stride;
    Vec sum[ROWS][CHAINS] = {};
    int64_t k = 0;
    for (; k + CHAINS * LANES <= whole; k += CHAINS * LANES)
      for (int c = 0; c < CHAINS; ++c) {
        const Vec value = load(w + k + c * LANES);
        __builtin_prefetch(reinterpret_cast<const char*>(w + k + c * LANES) + AHEAD);
        for (int r = 0; r < ROWS; ++r) sum[r][c] += value * load(x + r * K + k + c * LANES);
      }
    for (; k < whole; k += LANES)
      for (int r = 0; r < ROWS; ++r) sum[r][0] += load(w + k) * load(x + r * K + k);
    if (whole < K) {
      const Vec value = load_tail(w, K, 0.0f);
      for (int r = 0; r < ROWS; ++r) sum[r][0] += value * load_tail(x + r * K, K, 0.0f);
    }
    const float bias = a.bias ? to_float(static_cast<const T*>(a.bias)[n]) : 0.0f;
    for (int r = 0; r < ROWS; ++r) {
      Vec total = sum[r][0];
      for (int c = 1; c < CHAINS; ++c) total += sum[r][c];
      Out& out = static_cast<Out*>(a.out)[(first + r) * a.columns + n];
      from_float(sum_lanes(total) + bias + (a.accumulate ? to_float(out) : 0.0f), out);
    }
  }
}

// Columns [begin, end) of the output, for all rows: four rows of x at a time.
template <class T, class Out>
void linear_rows(const LinearRows& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += ROWS_OF_WEIGHT) {
    const int64_t last = n + ROWS_OF_WEIGHT < end ? n + ROWS_OF_WEIGHT : end;
    int64_t row = 0;
    for (; row + 4 <= a.rows; row += 4) dot_products<T, Out, 4, 2>(a, row, n, last);
    if (a.rows - row == 3) dot_products<T, Out, 3, 2>(a, row, n, last);
    if (a.rows - row == 2) dot_products<T, Out, 2, 2>(a, row, n, last);
    if (a.rows - row == 1) dot_products<T, Out, 1, 4>(a, row, n, last);
  }
}

// The sums of columns [begin, begin + width), with width <= VECTORS * LANES. SUMMED rows are added one after the other,
// and their sums are added with the rounding errors carried along (Kahan 1965), because a plain sum of thousands of rows
// would round worse than PyTorch's.
template <int VECTORS>
void column_strip(const ColumnSums& a, int64_t begin, int64_t width) {
  constexpr int64_t SUMMED = 32;
  Vec total[VECTORS] = {}, error[VECTORS] = {};
  for (int64_t first = 0; first < a.count; first += SUMMED) {
    const int64_t last = first + SUMMED < a.count ? first + SUMMED : a.count;
    Vec sum[VECTORS] = {};
    for (int64_t i = first; i < last; ++i) {
      const float* row = a.rows + i * a.columns + begin;
      for (int v = 0; v < VECTORS; ++v) sum[v] += width < LANES ? load_some(row, width, 0.0f) : load(row + v * LANES);
    }
    for (int v = 0; v < VECTORS; ++v) {
      const Vec added = sum[v] - error[v];
      const Vec next = total[v] + added;
      error[v] = (next - total[v]) - added;
      total[v] = next;
    }
  }
  for (int v = 0; v < VECTORS; ++v) store_some(a.out + begin + v * LANES, width < LANES ? width : LANES, total[v]);
}

// The sums of columns [begin, end), which are the gradient of the bias.
inline void column_sums(const ColumnSums& a, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j + 8 * LANES <= end; j += 8 * LANES) column_strip<8>(a, j, 8 * LANES);
  for (; j + LANES <= end; j += LANES) column_strip<1>(a, j, LANES);
  if (j < end) column_strip<1>(a, j, end - j);
}

// Converts values to float32.
template <class T>
void widen(const void* from, float* to, int64_t count) {
  const T* values = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(values + i));
  for (; i < count; ++i) to[i] = to_float(values[i]);
}

// Rounds values of float32 to T.
template <class T>
void narrow(const float* from, void* to, int64_t count) {
  T* values = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(values + i, load(from + i));
  for (; i < count; ++i) from_float(from[i], values[i]);
}

}  // namespace
}  // namespace fastgpt
