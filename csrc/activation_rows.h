// The activation of a feed-forward layer, its gradient, and the bias before it, one row after the other:
//
//     gelu(x) = x Phi(x), with Phi the distribution function of the normal distribution (Hendrycks and Gimpel 2016)
//     gelu_tanh(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), its approximation in GPT-2
//     relu(x) = max(x, 0), and relu2(x) = relu(x)^2 (So et al. 2021, Primer)
//
// What is fused, forward: the bias and the function. Backward: the derivative, which is computed again from x, and the
// sums of the bias's gradient. Both read and write each value once.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "vectors_of_row.h"

namespace fastgpt {
namespace {

inline Vec absolute(Vec x) {
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0x7fffffffu;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// With phi the density of the normal distribution, Phi(-a) / phi(a) is a smooth function of a >= 0, which falls like
// 1 / a. It is computed as a polynomial in t = 1 / (1 + 0.35 a), a minimax fit for a <= 13.5 with a relative error of
// 3e-8; for larger a, phi(a) is 0 in float32. The derivative needs phi, too, and so takes little more time.
class Gelu {
 public:
  Gelu() : exp() {}  // written out, because an implicit constructor would not be compiled for this target

  Vec operator()(Vec x) const {
    Vec bell;
    return x * distribution(x, bell);
  }

  Vec gradient(Vec x, Vec grad) const {
    Vec bell;
    const Vec below = distribution(x, bell);
    return grad * (x * bell * 0.398942280f + below);  // 1 / sqrt(2 pi)
  }

 private:
  // Phi(x). `bell` becomes exp(-x^2 / 2).
  Vec distribution(Vec x, Vec& bell) const {
    const Vec t = 1.0f / (absolute(x) * 0.35f + 1.0f);
    Vec p = t * -0.029125871f + 0.143872261f;
    p = p * t - 0.255504638f;
    p = p * t + 0.158929363f;
    p = p * t - 0.022937188f;
    p = p * t + 0.105432957f;
    p = p * t + 0.119852431f;
    p = p * t + 0.139859080f;
    p = p * t + 0.139621571f;
    bell = exp(x * x * -0.5f);
    const Vec tail = p * t * bell;  // Phi(-|x|)
    return x < 0.0f ? tail : 1.0f - tail;
  }

  const Exp exp;
};

// (1 + tanh(u)) / 2 is the logistic function of 2 u.
class GeluTanh {
 public:
  GeluTanh() : exp() {}

  Vec operator()(Vec x) const {
    Vec slope;
    return x * logistic(x, slope);
  }

  Vec gradient(Vec x, Vec grad) const {
    Vec slope;
    const Vec below = logistic(x, slope);
    const Vec inner = x * x * (3.0f * 0.044715f * SCALE) + SCALE;  // d(2 u) / dx
    return grad * (x * slope * inner + below);
  }

 private:
  static constexpr float SCALE = 1.59576912f;  // 2 sqrt(2 / pi)

  // The logistic function of 2 u. `slope` becomes its derivative.
  Vec logistic(Vec x, Vec& slope) const {
    const Vec twice_u = x * (x * x * (0.044715f * SCALE) + SCALE);
    const Vec e = exp(0.0f - absolute(twice_u));
    const Vec above = 1.0f / (e + 1.0f);  // of |2 u|
    const Vec below = e * above;          // of -|2 u|
    slope = above * below;
    return x < 0.0f ? below : above;
  }

  const Exp exp;
};

struct Relu {
  Vec operator()(Vec x) const { return larger(Vec{}, x); }  // NaN stays NaN
  Vec gradient(Vec x, Vec grad) const { return x <= 0.0f ? Vec{} : grad; }
};

struct SquaredRelu {
  Vec operator()(Vec x) const {
    const Vec y = larger(Vec{}, x);
    return y * y;
  }
  Vec gradient(Vec x, Vec grad) const { return x <= 0.0f ? Vec{} : grad * (x + x); }
};

template <class T, class Function, bool WITH_BIAS>
void activate(const ActivationRows& a, int64_t begin, int64_t end) {
  const Function function;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * a.columns;
    const T* x = static_cast<const T*>(a.x) + first;
    T* out = static_cast<T*>(a.out) + first;
    over_columns(a.values - first < a.columns ? a.values - first : a.columns, [&](int64_t j, int n) {
      Vec v = load_first(x + j, n);
      if constexpr (WITH_BIAS) v += load_first(a.bias + j, n);
      store_some(out + j, n, function(v));
    });
  }
}

template <class T, class Function, bool WITH_BIAS>
void activate_backward(const ActivationRows& a, int64_t begin, int64_t end) {
  const Function function;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * a.columns;
    const T* x = static_cast<const T*>(a.x) + first;
    const T* grad = static_cast<const T*>(a.grad) + first;
    T* out = a.out ? static_cast<T*>(a.out) + first : nullptr;
    over_columns(a.values - first < a.columns ? a.values - first : a.columns, [&](int64_t j, int n) {
      Vec v = load_first(x + j, n);
      if constexpr (WITH_BIAS) v += load_first(a.bias + j, n);
      const Vec grad_x = function.gradient(v, load_first(grad + j, n));
      if (out) store_some(out + j, n, grad_x);
      if (a.bias_sums) store_some(a.bias_sums + j, n, load_first(a.bias_sums + j, n) + grad_x);
    });
  }
}

template <class T, class Function>
void activation_rows_of(const ActivationRows& a, int64_t begin, int64_t end) {
  if (a.grad)
    a.bias ? activate_backward<T, Function, true>(a, begin, end) : activate_backward<T, Function, false>(a, begin, end);
  else
    a.bias ? activate<T, Function, true>(a, begin, end) : activate<T, Function, false>(a, begin, end);
}

template <class T>
void activation_rows(const ActivationRows& a, int64_t begin, int64_t end) {
  switch (a.kind) {
    case GELU:
      return activation_rows_of<T, Gelu>(a, begin, end);
    case GELU_TANH:
      return activation_rows_of<T, GeluTanh>(a, begin, end);
    case RELU:
      return activation_rows_of<T, Relu>(a, begin, end);
    case RELU2:
      return activation_rows_of<T, SquaredRelu>(a, begin, end);
  }
}

}  // namespace
}  // namespace fastgpt
