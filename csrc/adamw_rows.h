// The kernels of adamw.h: one pass over weights, gradients and both moments, and the sum of squares of gradients.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fastgpt {
namespace {

#if defined(FASTGPT_AVX512)
inline Vec square_root(Vec v) { return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)v); }
#elif defined(FASTGPT_AVX2)
inline Vec square_root(Vec v) { return (Vec)_mm256_sqrt_ps((__m256)v); }
#else
inline Vec square_root(Vec v) {
  for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
#endif

inline void adamw_of_lanes(const AdamWRows& a, float* weight, float* exp_avg, float* exp_avg_sq, const float* grad) {
  const Vec g = load(grad) * a.grad_scale, before = load(exp_avg);
  const Vec m = before + (g - before) * (1.0f - a.beta1);
  const Vec v = load(exp_avg_sq) * a.beta2 + g * g * (1.0f - a.beta2);
  store(exp_avg, m);
  store(exp_avg_sq, v);
  store(weight, load(weight) * a.kept - m * a.step_size / (square_root(v) * a.root_correction + a.eps));
}

// The last values, of which there are fewer than lanes, are computed in copies.
inline void adamw(const AdamWRows& a, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) adamw_of_lanes(a, a.weight + i, a.exp_avg + i, a.exp_avg_sq + i, a.grad + i);
  if (i == end) return;
  float weight[LANES] = {}, exp_avg[LANES] = {}, exp_avg_sq[LANES] = {}, grad[LANES] = {};
  const size_t bytes = sizeof(float) * static_cast<size_t>(end - i);
  std::memcpy(weight, a.weight + i, bytes), std::memcpy(exp_avg, a.exp_avg + i, bytes);
  std::memcpy(exp_avg_sq, a.exp_avg_sq + i, bytes), std::memcpy(grad, a.grad + i, bytes);
  adamw_of_lanes(a, weight, exp_avg, exp_avg_sq, grad);
  std::memcpy(a.weight + i, weight, bytes), std::memcpy(a.exp_avg + i, exp_avg, bytes);
  std::memcpy(a.exp_avg_sq + i, exp_avg_sq, bytes);
}

// Sums of float32 grow to at most `count` / (4 LANES) addends here; the caller adds those of its pieces in double.
inline double sum_of_squares(const float* values, int64_t count) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES)
    for (int k = 0; k < 4; ++k) {
      const Vec v = load(values + i + k * LANES);
      sums[k] += v * v;
    }
  double rest = 0.0;
  for (; i < count; ++i) rest += double{values[i]} * values[i];
  return rest + sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace
}  // namespace fastgpt
