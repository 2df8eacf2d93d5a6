// The steps of decode.cpp that are not products: layer norm, and the attention of one new token to a cache.
//
// Between the steps values stay in float32; weights and the cache are read in their own dtype.
// What is fused in attention: the new key and value are stored, and one pass over the cache makes the scores, their
// softmax (online, Milakov and Gimelshein 2018) and the weighted sum of the values.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fastgpt {
namespace {

constexpr int64_t WIDEST_HEAD = 256;  // MAX_HEAD_SIZE in fastgpt/config.py

// The `n` <= LANES values at p; the other lanes are 0.
template <class T>
inline Vec load_up_to(const T* p, int64_t n) {
  return n >= LANES ? load(p) : load_some(p, n, 0.0f);
}

template <class T>
inline void store_up_to(T* p, int64_t n, Vec v) {
  store_some(p, n < LANES ? n : LANES, v);
}

template <class T>
void norm_floats(const NormFloats& a) {
  const int64_t C = a.columns;
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t r = 0; r < a.rows; ++r) {
    const float* x = a.x + r * C;
    Vec sum{}, squares{};
    for (int64_t c = 0; c < C; c += LANES) sum += load_up_to(x + c, C - c);
    const float mean = sum_lanes(sum) / static_cast<float>(C);
    for (int64_t c = 0; c < C; c += LANES) {
      const Vec distance = load_up_to(x + c, C - c) - mean;
      squares += lane_numbers() < static_cast<int32_t>(C - c < LANES ? C - c : LANES) ? distance * distance : Vec{};
    }
    const float rstd = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(C) + a.eps);
    for (int64_t c = 0; c < C; c += LANES) {
      const Vec normed = (load_up_to(x + c, C - c) - mean) * rstd * load_up_to(weight + c, C - c);
      store_up_to(a.out + r * C + c, C - c, bias ? normed + load_up_to(bias + c, C - c) : normed);
    }
  }
}

// As load_up_to and store_up_to, but without a branch where WHOLE: then every vector is a whole one.
template <bool WHOLE, class T>
inline Vec load_of(const T* p, int64_t n) {
  return WHOLE ? load(p) : load_up_to(p, n);
}

template <bool WHOLE, class T>
inline void store_of(T* p, int64_t n, Vec v) {
  WHOLE ? store(p, v) : store_up_to(p, n, v);
}

// One pair of a sequence and a head. WHOLE: the head's size is a multiple of LANES.
template <class T, bool WHOLE>
void attend_row(const AttendNewest& a, int64_t pair) {
  const int64_t D = a.head_size, C = a.heads * D;
  const Exp exp;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(D));
  const int64_t sequence = pair / a.heads, head = pair % a.heads, length = a.places[sequence].length;
  const int64_t row = a.places[sequence].row * a.heads + head;
  const float* q = a.qkv + sequence * 3 * C + head * D;
  T* keys = static_cast<T*>(a.keys) + row * a.capacity * D;
  T* values = static_cast<T*>(a.values) + row * a.capacity * D;
  for (int64_t d = 0; d < D; d += LANES) {
    store_of<WHOLE>(keys + length * D + d, D - d, load_of<WHOLE>(q + C + d, D - d));
    store_of<WHOLE>(values + length * D + d, D - d, load_of<WHOLE>(q + 2 * C + d, D - d));
  }
  float sums[WIDEST_HEAD] = {};  // of the values, each times exp(score - largest)
  float largest = -3e38f;
  Vec total{};
  for (int64_t first = 0; first <= length; first += LANES) {
    const int count = static_cast<int>(length + 1 - first < LANES ? length + 1 - first : LANES);
    Vec products[LANES] = {};
    for (int i = 0; i < count; ++i)
      for (int64_t d = 0; d < D; d += LANES)
        products[i] += load_of<WHOLE>(q + d, D - d) * load_of<WHOLE>(keys + (first + i) * D + d, D - d);
    const Vec dots = reduce_each<plus>(products) * scale;
    const Vec scores = lane_numbers() < count ? dots : splat(-__builtin_inff());
    const float before = largest;
    largest = max_lanes(larger(splat(before), scores));
    const Vec shrink = exp(splat(before - largest));
    const Vec weight = exp(scores - largest);
    total = total * shrink + weight;
    float weights[LANES];
    store(weights, weight);
    for (int64_t d = 0; d < D; d += LANES) {
      Vec even = load_of<WHOLE>(sums + d, D - d) * shrink, odd{};
      int i = 0;
      for (; i + 2 <= count; i += 2) {
        even += weights[i] * load_of<WHOLE>(values + (first + i) * D + d, D - d);
        odd += weights[i + 1] * load_of<WHOLE>(values + (first + i + 1) * D + d, D - d);
      }
      if (i < count) even += weights[i] * load_of<WHOLE>(values + (first + i) * D + d, D - d);
      store_of<WHOLE>(sums + d, D - d, even + odd);
    }
  }
  const float all = sum_lanes(total);
  float* out = a.out + pair * D;
  for (int64_t d = 0; d < D; d += LANES)
    store_of<WHOLE>(out + d, D - d, load_of<WHOLE>(sums + d, D - d) / all);
}

template <class T>
void attend_newest(const AttendNewest& a, int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair)
    a.head_size % LANES == 0 ? attend_row<T, true>(a, pair) : attend_row<T, false>(a, pair);
}

}  // namespace
}  // namespace fastgpt
