// Token and position embedding, row by row, and the gradients of the two tables (learned positions, as in GPT-2,
// Radford et al. 2019):
//
//     out[b, t] = token_table[tokens[b, t]] + position_table[t]
//     token_grad[v] = sum of grad[b, t] over all (b, t) with tokens[b, t] = v
//     position_grad[t] = sum over b of grad[b, t]
//
// What is fused, forward: both look-ups and the addition, so that each output row is written once. Backward has two
// ways. In general, the rows of one token are summed in registers, and the sum is written once. Where both tables are
// small, one pass over all rows adds each row to the sums of both tables, which stay in the cache. Both ways add in the
// same order (see SIDE_BY_SIDE in kernels.h) and without atomic operations, so the bits are the same for any number of
// threads.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fastgpt {
namespace {

template <class T, bool WITH_POSITIONS, bool STREAM>
void gather_row(const T* token, const T* position, T* out, int64_t n) {
  const auto value = [&](int64_t i) { return WITH_POSITIONS ? load(token + i) + load(position + i) : load(token + i); };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    if constexpr (STREAM)
      stream(out + i, value(i));
    else
      store(out + i, value(i));
  }
  for (; i < n; ++i)
    if constexpr (WITH_POSITIONS)
      from_float(to_float(token[i]) + to_float(position[i]), out[i]);
    else
      out[i] = token[i];
}

template <class T>
void gather_rows(const GatherRows& a, int64_t begin, int64_t end) {
  // Stores past the caches need every row to be aligned, that is the start of the output and the length of its rows.
  const bool aligned = reinterpret_cast<uintptr_t>(a.out) % stream_alignment<T>() == 0 && a.columns % LANES == 0;
  const bool around_caches = a.stream && aligned;
  for (int64_t row = begin; row < end; ++row) {
    const T* token = static_cast<const T*>(a.token_table) + a.tokens[row] * a.token_stride;
    T* out = static_cast<T*>(a.out) + row * a.columns;
    const T* position = nullptr;
    if (a.position_table) position = static_cast<const T*>(a.position_table) + row % a.length * a.position_stride;
    if (position && around_caches)
      gather_row<T, true, true>(token, position, out, a.columns);
    else if (position)
      gather_row<T, true, false>(token, position, out, a.columns);
    else if (around_caches)
      gather_row<T, false, true>(token, nullptr, out, a.columns);
    else
      gather_row<T, false, false>(token, nullptr, out, a.columns);
  }
  if (around_caches) finish_streams();
}

// Sums VECTORS * LANES columns over all the rows. The sums stay in registers.
template <class T, int VECTORS>
void sum_strip(const SumRows& a, int64_t column) {
  const T* rows = static_cast<const T*>(a.rows) + column;
  Vec sum[VECTORS] = {};
  for (int64_t i = 0; i < a.count; ++i) {
    const T* row = rows + (a.order ? a.order[i] : i) * a.row_stride;
    for (int v = 0; v < VECTORS; ++v) sum[v] += load(row + v * LANES);
  }
  T* out = static_cast<T*>(a.out) + column;
  for (int v = 0; v < VECTORS; ++v) store(out + v * LANES, sum[v]);
}

template <class T>
void sum_rows(const SumRows& a) {
  int64_t column = 0;
  for (; column + 8 * LANES <= a.columns; column += 8 * LANES) sum_strip<T, 8>(a, column);
  for (; column + LANES <= a.columns; column += LANES) sum_strip<T, 1>(a, column);
  for (; column < a.columns; ++column) {
    float sum = 0.0f;
    for (int64_t i = 0; i < a.count; ++i)
      sum += to_float(static_cast<const T*>(a.rows)[(a.order ? a.order[i] : i) * a.row_stride + column]);
    from_float(sum, static_cast<T*>(a.out)[column]);
  }
}

template <class T>
void write_sums(const float* sums, int64_t rows, int64_t width, void* out, int64_t columns, int64_t begin) {
  for (int64_t row = 0; row < rows; ++row) {
    T* to = static_cast<T*>(out) + row * columns + begin;
    const float* from = sums + row * width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, load(from + i));
    for (; i < width; ++i) from_float(from[i], to[i]);
  }
}

// Adds the rows of SEQUENCES sequences, position by position: all of them at one position, then all at the next one. So
// the sums of a position are read and written once for all of the sequences.
template <class T, int SEQUENCES, bool TOKENS, bool POSITIONS>
void accumulate_sequences(const AccumulateRows& a, int64_t first) {
  const int64_t width = a.end - a.begin;
  for (int64_t t = 0; t < a.length; ++t) {
    const T* values[SEQUENCES];
    float* token[SEQUENCES];
    float* position = POSITIONS ? a.position_sums + t * width : nullptr;
    for (int k = 0; k < SEQUENCES; ++k) {
      const int64_t row = (first + k) * a.length + t;
      values[k] = static_cast<const T*>(a.rows) + row * a.columns + a.begin;
      token[k] = TOKENS ? a.token_sums + a.tokens[row] * width : nullptr;
    }
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      Vec sum = POSITIONS ? load(position + i) : Vec{};
      for (int k = 0; k < SEQUENCES; ++k) {
        __builtin_prefetch(values[k] + i + 2 * a.columns);  // two rows ahead; the hardware cannot follow so many rows
        const Vec v = load(values[k] + i);
        if constexpr (TOKENS) store(token[k] + i, load(token[k] + i) + v);
        if constexpr (POSITIONS) sum += v;
      }
      if constexpr (POSITIONS) store(position + i, sum);
    }
    for (; i < width; ++i)
      for (int k = 0; k < SEQUENCES; ++k) {
        const float v = to_float(values[k][i]);
        if constexpr (TOKENS) token[k][i] += v;
        if constexpr (POSITIONS) position[i] += v;
      }
  }
}

template <class T, bool TOKENS, bool POSITIONS>
void accumulate_all(const AccumulateRows& a) {
  const int64_t sequences = a.count / a.length;
  int64_t first = 0;
  for (; first + SIDE_BY_SIDE <= sequences; first += SIDE_BY_SIDE)
    accumulate_sequences<T, SIDE_BY_SIDE, TOKENS, POSITIONS>(a, first);
  for (; first < sequences; ++first) accumulate_sequences<T, 1, TOKENS, POSITIONS>(a, first);
}

template <class T>
void accumulate_rows(const AccumulateRows& a) {
  const int64_t width = a.end - a.begin;
  if (a.token_sums && a.position_sums)
    accumulate_all<T, true, true>(a);
  else if (a.token_sums)
    accumulate_all<T, true, false>(a);
  else if (a.position_sums)
    accumulate_all<T, false, true>(a);
  if (a.token_sums) write_sums<T>(a.token_sums, a.vocab_size, width, a.token_grad, a.columns, a.begin);
  if (a.position_sums) write_sums<T>(a.position_sums, a.length, width, a.position_grad, a.columns, a.begin);
}

}  // namespace
}  // namespace fastgpt
