// Layer norm (Ba et al. 2016), alone or after the residual addition of a transformer, row by row, and its gradients:
//
//     h = residual + dropout(x)
//     y = (h - mean) rstd weight + bias, with the mean of the row and rstd = 1 / sqrt(variance + eps)
//
//     with g = dy weight and x_hat = (h - mean) rstd:
//     dh = rstd (g - mean(g) - x_hat mean(g x_hat)), plus the gradient that h itself has
//     dweight = sum over the rows of dy x_hat, dbias = sum of dy; dx = dh, where x was not dropped
//
// What is fused, forward: dropout, addition, statistics and norm. Backward: all the gradients; the mask is drawn again.
// Rows are read from memory once and written once: a row stays in the first cache while it is gone over three times.
//
// All arithmetic is in float32. Rows of other types are converted to float32 first, in that cache, so that x, residual,
// h and y may each have a type of its own, as they do under autocast.
#pragma once

#include "kernels.h"
#include "linear_rows.h"
#include "philox.h"
#include "simd.h"
#include "vectors_of_row.h"

namespace fastgpt {
namespace {

template <class T>
inline const float* widened(const void* values, int64_t first, int64_t columns, float* scratch) {
  widen<T>(static_cast<const T*>(values) + first, scratch, columns);
  return scratch;
}

// A row in float32: where it is, or a copy of it in `scratch`.
inline const float* read_row(const TypedRows& rows, int64_t row, int64_t columns, float* scratch) {
  const int64_t first = row * columns;
  if (rows.type == BFLOAT16) return widened<BFloat16>(rows.values, first, columns, scratch);
  if (rows.type == FLOAT16) return widened<Float16>(rows.values, first, columns, scratch);
  return static_cast<const float*>(rows.values) + first;
}

// Where to write a row in float32: its place, or where this has another type, `scratch`, which `finish_row` then rounds.
inline float* start_row(const TypedRows& rows, int64_t row, int64_t columns, float* scratch) {
  return rows.type == FLOAT32 ? static_cast<float*>(rows.values) + row * columns : scratch;
}

inline void finish_row(const TypedRows& rows, int64_t row, int64_t columns, const float* scratch) {
  const int64_t first = row * columns;
  if (rows.type == BFLOAT16) narrow<BFloat16>(scratch, static_cast<BFloat16*>(rows.values) + first, columns);
  if (rows.type == FLOAT16) narrow<Float16>(scratch, static_cast<Float16*>(rows.values) + first, columns);
}

// The sum of term(j, n) over the vectors of a row. Four sums, so that an addition need not wait for the one before.
template <class Term>
inline float sum_over(int64_t columns, const Term& term) {
  Vec sum[4] = {};
  int64_t j = 0;
  for (; j + 4 * LANES <= columns; j += 4 * LANES)
    for (int k = 0; k < 4; ++k) sum[k] += term(j + k * LANES, LANES);
  for (; j + LANES <= columns; j += LANES) sum[0] += term(j, LANES);
  if (j < columns) sum[1] += term(j, static_cast<int>(columns - j));
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Calls visit(j, n, kept) for the vectors of a row, with the mask of the columns that are kept.
template <class Visit>
inline void over_mask(const Dropout& dropout, int64_t row, int64_t columns, const Visit& visit) {
  Mask kept[2];
  over_columns(columns, [&](int64_t j, int n) {
    const int half = j / LANES % 2;
    if (half == 0) dropout.keep(static_cast<uint64_t>(row), static_cast<uint64_t>(j), kept);
    visit(j, n, kept[half]);
  });
}

template <bool DROPS>
void layer_norm_forward(const LayerNormRows& a, int64_t begin, int64_t end, float* scratch) {
  const Dropout dropout(a.seed, a.dropout_p, a.first_row);
  const int64_t C = a.columns;
  for (int64_t row = begin; row < end; ++row) {
    const float* h = read_row(a.x, row, C, scratch);
    if (a.residual.values) {
      const float* x = h;
      const float* residual = read_row(a.residual, row, C, scratch + C);
      float* sum = start_row(a.h, row, C, scratch + C);
      if constexpr (DROPS)
        over_mask(dropout, row, C, [&](int64_t j, int n, Mask kept) {
          const Vec scaled = load_first(x + j, n) * dropout.scale;
          store_some(sum + j, n, load_first(residual + j, n) + (kept ? scaled : Vec{}));
        });
      else
        over_columns(C, [&](int64_t j, int n) {
          store_some(sum + j, n, load_first(residual + j, n) + load_first(x + j, n));
        });
      finish_row(a.h, row, C, sum);
      h = read_row(a.h, row, C, scratch + C);  // what is normalised is the sum as it was rounded
    }
    const float count = static_cast<float>(C);
    const float mean = sum_over(C, [&](int64_t j, int n) { return load_first(h + j, n); }) / count;
    const float variance = sum_over(C, [&](int64_t j, int n) {
      const Vec centred = load_first(h + j, n, mean) - mean;
      return centred * centred;
    }) / count;
    const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
    a.mean[row] = mean;
    a.rstd[row] = rstd;
    float* y = start_row(a.y, row, C, scratch);
    over_columns(C, [&](int64_t j, int n) {
      const Vec scaled = (load_first(h + j, n) - mean) * rstd * load_first(a.weight + j, n);
      store_some(y + j, n, a.bias ? scaled + load_first(a.bias + j, n) : scaled);
    });
    finish_row(a.y, row, C, y);
  }
}

void layer_norm_rows(const LayerNormRows& a, int64_t begin, int64_t end, float* scratch) {
  a.dropout_p > 0.0 ? layer_norm_forward<true>(a, begin, end, scratch) : layer_norm_forward<false>(a, begin, end, scratch);
}

// The means of g and g x_hat over a row; adds the row to the sums of dweight and dbias.
template <bool WEIGHT, bool BIAS>
inline void row_means(const LayerNormGradients& a, const float* grad, const float* h, float mean, float rstd,
                      float means[2]) {
  Vec of_grad{}, of_product{};
  over_columns(a.columns, [&](int64_t j, int n) {
    const Vec dy = load_first(grad + j, n), x_hat = (load_first(h + j, n) - mean) * rstd;
    const Vec g = dy * load_first(a.weight + j, n);
    of_grad += g;
    of_product += g * x_hat;
    if constexpr (WEIGHT) store_some(a.weight_sums + j, n, load_first(a.weight_sums + j, n) + dy * x_hat);
    if constexpr (BIAS) store_some(a.bias_sums + j, n, load_first(a.bias_sums + j, n) + dy);
  });
  means[0] = sum_lanes(of_grad) / static_cast<float>(a.columns);
  means[1] = sum_lanes(of_product) / static_cast<float>(a.columns);
}

void layer_norm_gradients(const LayerNormGradients& a, int64_t begin, int64_t end, float* scratch) {
  const Dropout dropout(a.seed, a.dropout_p, a.first_row);
  const int64_t C = a.columns;
  const auto means_of = a.weight_sums ? (a.bias_sums ? row_means<true, true> : row_means<true, false>)
                                      : (a.bias_sums ? row_means<false, true> : row_means<false, false>);
  for (int64_t row = begin; row < end; ++row) {
    const float* grad = read_row(a.grad_y, row, C, scratch);
    const float* h = read_row(a.h, row, C, scratch + C);
    const float mean = a.mean[row], rstd = a.rstd[row];
    float means[2];
    means_of(a, grad, h, mean, rstd, means);
    if (!a.grad_residual.values && !a.grad_x.values) continue;

    const float* grad_h = a.grad_h.values ? read_row(a.grad_h, row, C, scratch + 2 * C) : nullptr;
    const TypedRows& first = a.grad_residual.values ? a.grad_residual : a.grad_x;
    float* out = start_row(first, row, C, scratch + 3 * C);
    over_columns(C, [&](int64_t j, int n) {
      const Vec x_hat = (load_first(h + j, n) - mean) * rstd;
      const Vec g = load_first(grad + j, n) * load_first(a.weight + j, n);
      const Vec of_norm = (g - means[0] - x_hat * means[1]) * rstd;
      store_some(out + j, n, grad_h ? of_norm + load_first(grad_h + j, n) : of_norm);
    });
    if (a.grad_residual.values) finish_row(a.grad_residual, row, C, out);
    if (!a.grad_x.values) continue;

    float* grad_x = start_row(a.grad_x, row, C, scratch);
    if (a.dropout_p > 0.0)
      over_mask(dropout, row, C, [&](int64_t j, int n, Mask kept) {
        const Vec scaled = load_first(out + j, n) * dropout.scale;
        store_some(grad_x + j, n, kept ? scaled : Vec{});
      });
    else if (grad_x != out)
      std::memcpy(grad_x, out, sizeof(float) * static_cast<size_t>(C));
    finish_row(a.grad_x, row, C, grad_x);
  }
}

}  // namespace
}  // namespace fastgpt
