// Cross-entropy, row by row: the loss, and the logits' gradient, from one read and one write of main memory. For a row
// x of C logits with target y, class weights w and label smoothing s (Szegedy et al. 2016, arXiv:1512.00567):
//
//     log p[j] = (x[j] - max) - log(sum over k of exp(x[k] - max))
//     loss = -(1 - s) w[y] log p[y] - s / C * sum over j of w[j] log p[j]
//     dloss / dx[j] = ((1 - s) w[y] + s / C * sum over k of w[k]) p[j] - s / C * w[j] - (1 - s) w[y] (j == y)
//
// With a z-loss (Chowdhery et al. 2022, PaLM, arXiv:2204.02311), z lse^2 is added to the loss, where lse is the logsumexp
// of the row, and 2 z lse p[j] to the gradient. With a soft cap c (Gemma Team 2024, Gemma 2, arXiv:2408.00118), all this
// is computed of x'[j] = c tanh(x[j] / c), and dx'[j] / dx[j] = 1 - (x'[j] / c)^2 multiplies the gradient.
//
// What is fused: the statistics of a row (its maximum and the log of its sum of exp), the loss and the gradient. The
// log of the sum of exp of a row is computed in blocks that stay in the first-level cache: first the maximum of a
// block, then its sum of exp(x - maximum), then both are merged into those of the row (online softmax, Milakov and
// Gimelshein 2018). This takes one exp for each value, in whatever order the values come. The gradient then reads the
// row again, from the second-level cache, and computes exp a second time. To keep the first exp instead, a row would
// have to be written, read back and scaled, and this third pass over memory takes longer. Capped values are kept, in
// float32 and in the second-level cache, because tanh takes longer than exp.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"
#include "vectors_of_row.h"

namespace fastgpt {
namespace {

constexpr int64_t BLOCK = 2048;  // values; 8 KB of float32, a quarter of the smallest first-level cache

struct Statistics {
  float max, log_sum;  // the maximum of a row, and the log of its sum of exp(x - max)
};

// c tanh(x / c), and its derivative.
struct Softcap {
  float cap, inverse;

  explicit Softcap(float softcap) : cap(softcap), inverse(softcap > 0.0f ? 1.0f / softcap : 0.0f) {}

  Vec operator()(Vec x) const { return tanh_of(x * inverse) * cap; }

  // By the capped value. Rounding would make it less than 0 where that is the cap.
  Vec slope(Vec capped) const {
    const Vec t = capped * inverse;
    return larger(Vec{}, 1.0f - t * t);
  }
};

// out[j] = cap(x[j]) for j < n
template <class T>
void cap_values(const T* x, float* out, int64_t n, const Softcap& cap) {
  over_columns(n, [&](int64_t j, int count) { store_some(out + j, count, cap(load_first(x + j, count))); });
}

// A row whose values are taken as they are.
template <class T>
struct Plain {
  const T* x;
  const T* block(int64_t start, int64_t) const { return x + start; }
};

// A row whose values are capped, block by block, when they are asked for.
template <class T>
struct Capped {
  const T* x;
  float* values;  // (n), written
  const Softcap& cap;
  const float* block(int64_t start, int64_t size) const {
    cap_values(x + start, values + start, size, cap);
    return values + start;
  }
};

template <class Row>
Statistics row_statistics(const Row& given, int64_t n) {
  const Exp exp;
  float row_max = -INFINITY;
  float row_sum = 0.0f;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t size = n - start < BLOCK ? n - start : BLOCK;
    const auto* block = given.block(start, size);
    const int64_t whole = size / LANES * LANES;
    const Vec tail = whole < size ? load_tail(block, size, -INFINITY) : splat(-INFINITY);

    Vec max0 = tail, max1 = tail;  // two chains, which the processor runs at the same time
    int64_t i = 0;
    for (; i + 2 * LANES <= whole; i += 2 * LANES) {
      max0 = larger(load(block + i), max0);
      max1 = larger(load(block + i + LANES), max1);
    }
    if (i < whole) max0 = larger(load(block + i), max0);
    const float block_max = max_lanes(larger(max0, max1));
    if (block_max > row_max) {
      if (start > 0) row_sum *= std::exp(row_max - block_max);
      row_max = block_max;
    }
    // If all values so far are -inf, exp(-inf - -inf) would be NaN, although finite values may follow.
    const Vec shift = splat(row_max == -INFINITY ? 0.0f : row_max);

    Vec sum0 = whole < size ? exp(tail - shift) : Vec{};
    Vec sum1 = Vec{};
    for (i = 0; i + 2 * LANES <= whole; i += 2 * LANES) {
      sum0 += exp(load(block + i) - shift);
      sum1 += exp(load(block + i + LANES) - shift);
    }
    if (i < whole) sum0 += exp(load(block + i) - shift);
    row_sum += sum_lanes(sum0 + sum1);
  }
  // The result of a row of -inf alone is NaN, because its softmax is 0 / 0.
  return {row_max, row_max == -INFINITY ? row_sum + NAN : std::log(row_sum)};
}

// The sum of -w[j] log p[j] over j, which label smoothing multiplies by s / C and adds to the loss.
template <class T>
float smoothing_loss(const T* x, int64_t n, Statistics row, const float* class_weight) {
  Vec sum0 = Vec{}, sum1 = Vec{};
  int64_t i = 0;
  const auto term = [&](int64_t j) {
    const Vec log_p = row.log_sum - (load(x + j) - row.max);
    return class_weight ? log_p * load(class_weight + j) : log_p;
  };
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    sum0 += term(i);
    sum1 += term(i + LANES);
  }
  for (; i + LANES <= n; i += LANES) sum0 += term(i);
  float sum = sum_lanes(sum0 + sum1);
  for (; i < n; ++i) sum += (row.log_sum - (to_float(x[i]) - row.max)) * (class_weight ? class_weight[i] : 1.0f);
  return sum;
}

// out[j] = p[j] * scale - smooth * w[j], times the slope of the cap where x is CAPPED. The output may overwrite x. The
// caller computes the entry of the target.
template <bool SMOOTH, bool STREAM, bool CAPPED, class Value, class T>
void softmax_gradient(const Value* x, T* out, int64_t n, Statistics row, float scale, float smooth,
                      const float* class_weight, [[maybe_unused]] const Softcap& cap) {
  const Exp exp;
  const auto gradient = [&](Vec values, int64_t at) {
    Vec g = exp((values - row.max) - row.log_sum) * scale;
    if constexpr (SMOOTH) g -= class_weight ? load(class_weight + at) * smooth : splat(smooth);
    if constexpr (CAPPED) g *= cap.slope(values);
    return g;
  };
  if (n < LANES) {
    const Vec values = load_some(x, n, 0.0f);
    Vec g = exp((values - row.max) - row.log_sum) * scale;
    if constexpr (SMOOTH) g -= class_weight ? load_some(class_weight, n, 0.0f) * smooth : splat(smooth);
    if constexpr (CAPPED) g *= cap.slope(values);
    store_some(out, n, g);
    return;
  }
  // The first and the last vector overlap their neighbours and write the same values. Both are read before anything is
  // written, so that they do so in place, too.
  const Vec first = gradient(load(x), 0);
  const Vec last = gradient(load(x + n - LANES), n - LANES);
  int64_t i = 0;
  if constexpr (STREAM) {
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % stream_alignment<T>() / sizeof(T));
    i = past == 0 ? 0 : LANES - past;
    for (; i + LANES <= n; i += LANES) stream(out + i, gradient(load(x + i), i));
  } else {
    for (; i + LANES <= n; i += LANES) store(out + i, gradient(load(x + i), i));
  }
  store(out, first);
  store(out + n - LANES, last);
}

// out[j] *= the slope of the cap at x[j]
inline void multiply_by_slope(float* out, const float* capped, int64_t n, const Softcap& cap) {
  over_columns(n, [&](int64_t j, int count) {
    store_some(out + j, count, load_first(out + j, count) * cap.slope(load_first(capped + j, count)));
  });
}

// Whether all of x[0 .. n) are less than `limit`, or at most that; false where one is NaN. The lanes past the end hold
// -inf. Only where the limit is -inf, too, are they not less than it, and then no value of the row is.
template <bool OR_EQUAL, class T>
bool all_below(const T* x, int64_t n, float limit) {
  const Vec limits = splat(limit);
  for (int64_t start = 0; start < n; start += BLOCK) {  // most rows are decided in their first block
    Mask within = ~Mask{};
    over_columns(n - start < BLOCK ? n - start : BLOCK, [&](int64_t j, int count) {
      const Vec values = load_first(x + start + j, count, -INFINITY);
      within &= OR_EQUAL ? values <= limits : values < limits;
    });
    for (int lane = 0; lane < LANES; ++lane)
      if (!within[lane]) return false;
  }
  return true;
}

// Whether the target is the first of the largest logits. They are compared before they are capped, because large ones
// are equal afterwards.
template <class T>
bool is_correct(const T* x, int64_t n, int64_t target) {
  const float own = to_float(x[target]);
  return own == own && all_below<false>(x, target, own) && all_below<true>(x + target + 1, n - target - 1, own);
}

// Short rows of float32 without smoothing: LANES rows at a time, all of which stay in the first-level cache. What each
// row needs once (a maximum, a sum, a log, the entry of the target) is computed for all of them by one vector
// operation. The last n % LANES columns, where they are few, are computed in the same way, a column at a time; where
// they are many, the last vector of a row overlaps the one before. The values of exp are stored in the memory of the
// gradient and scaled there, so that each is computed once. (In 16 bits they would be rounded twice.) The gradient may
// be the logits. WHOLE is the number of columns in whole vectors where the caller knows it, so that the loops have a
// constant length; else 0.
template <bool WITH_GRADIENT, int64_t WHOLE>
void short_rows(const CrossEntropyRows& a, int64_t begin, int64_t end, float* scratch) {
  const Exp exp;
  const Softcap cap(a.softcap);
  const int64_t n = a.classes;
  const int64_t whole = WHOLE > 0 ? WHOLE : n / LANES * LANES;
  const int tail = whole > 0 && n - whole > LANES / 4 ? 0 : static_cast<int>(n - whole);  // columns
  const bool overlaps = whole + tail < n;
  // Lanes of the overlapping vector whose values are in the whole vectors, too.
  const Mask seen = lane_numbers() < static_cast<int32_t>(whole + LANES - n);

  for (int64_t start = begin; start < end; start += LANES) {
    const int count = static_cast<int>(end - start < LANES ? end - start : LANES);
    const float* logits = static_cast<const float*>(a.logits) + start * a.logits_stride;
    const int64_t* targets = a.targets + start;
    int64_t stride = a.logits_stride;
    for (int r = 0; a.correct && r < count; ++r) {
      const bool counts = targets[r] != a.ignore_index;
      a.correct[start + r] = counts && is_correct(logits + r * stride, n, targets[r]) ? 1.0f : 0.0f;
    }
    if (a.softcap > 0.0f) {
      for (int r = 0; r < count; ++r) cap_values(logits + r * stride, scratch + r * n, n, cap);
      logits = scratch;
      stride = n;
    }
    float* gradient = WITH_GRADIENT ? static_cast<float*>(a.gradient) + start * a.gradient_stride : nullptr;
    float columns[LANES][LANES];  // of the tail: columns[j][r] is value whole + j of row r
    float counted[LANES] = {}, at_target[LANES] = {}, weight[LANES] = {}, max[LANES], factor[LANES];
    float row_scale[LANES] = {}, scale[LANES] = {};
    Vec parts[LANES];  // of row r: at first the maximum in each lane, later the sum
    Vec last[LANES];   // of row r: the vector that overlaps the one before
    for (int r = 0; r < count; ++r) {
      const float* x = logits + r * stride;
      const bool counts = targets[r] != a.ignore_index;
      const int64_t target = counts ? targets[r] : 0;  // an ignored row is computed too, and its results are dropped
      counted[r] = counts ? 1.0f : 0.0f;
      weight[r] = counts && a.class_weight ? a.class_weight[target] : counted[r];
      if constexpr (WITH_GRADIENT) {
        row_scale[r] = a.row_scale[(start + r) * a.row_scale_stride];
        scale[r] = row_scale[r] * weight[r];
      }
      at_target[r] = x[target];
      for (int j = 0; j < tail; ++j) columns[j][r] = x[whole + j];
      if (overlaps) last[r] = load(x + n - LANES);
      Vec row_max = overlaps ? last[r] : splat(-INFINITY);
      for (int64_t j = 0; j < whole; j += LANES) row_max = larger(load(x + j), row_max);
      parts[r] = row_max;
    }
    for (int r = count; r < LANES; ++r) {
      parts[r] = Vec{};
      for (int j = 0; j < tail; ++j) columns[j][r] = 0.0f;
    }
    Vec row_max = reduce_each<larger>(parts);
    for (int j = 0; j < tail; ++j) row_max = larger(load(columns[j]), row_max);
    store(max, row_max);

    for (int r = 0; r < count; ++r) {
      const float* x = logits + r * stride;
      Vec sum = Vec{};
      if (overlaps) {
        last[r] = exp(last[r] - max[r]);
        sum = seen ? Vec{} : last[r];
      }
      for (int64_t j = 0; j < whole; j += LANES) {
        const Vec e = exp(load(x + j) - max[r]);
        sum += e;
        if constexpr (WITH_GRADIENT) store(gradient + r * a.gradient_stride + j, e);
      }
      parts[r] = sum;
    }
    for (int r = count; r < LANES; ++r) parts[r] = splat(1.0f);
    Vec row_sum = reduce_each<plus>(parts);
    for (int j = 0; j < tail; ++j) {
      const Vec e = exp(load(columns[j]) - row_max);
      row_sum += e;
      store(columns[j], e);
    }
    const Vec log_sum = log_of_sum(row_sum);
    const Vec log_p = (load(at_target) - row_max) - log_sum;
    Vec loss = load(counted) > 0.0f ? 0.0f - load(weight) * log_p : Vec{};
    Vec of_softmax = load(scale);  // multiplies p in the gradient
    if (a.z_loss > 0.0f) {
      const Vec z_times_lse = (row_max + log_sum) * a.z_loss;
      loss = load(counted) > 0.0f ? loss + z_times_lse * (row_max + log_sum) : loss;
      of_softmax += load(row_scale) * (z_times_lse * 2.0f);
    }
    if (a.loss) store_some(a.loss + start, count, loss);
    if (a.statistics) store_pairs(a.statistics + 2 * start, count, row_max, log_sum);
    if constexpr (!WITH_GRADIENT) continue;

    const Vec factors = of_softmax / row_sum;
    store(factor, factors);
    for (int j = 0; j < tail; ++j) store(columns[j], load(columns[j]) * factors);
    // The target's entry is computed again, in one expression: where p is near 1, rounding p before 1 is subtracted
    // would lose digits.
    store(at_target, exp(log_p) * of_softmax - load(scale));
    for (int r = 0; r < count; ++r) {
      float* out = gradient + r * a.gradient_stride;
      if (targets[r] == a.ignore_index) {
        std::memset(out, 0, sizeof(float) * static_cast<size_t>(n));
        continue;
      }
      for (int64_t j = 0; j < whole; j += LANES) store(out + j, load(out + j) * factor[r]);
      if (overlaps) store(out + n - LANES, last[r] * factor[r]);
      for (int j = 0; j < tail; ++j) out[whole + j] = columns[j][r];
      out[targets[r]] = at_target[r];
      if (a.softcap > 0.0f) multiply_by_slope(out, scratch + r * n, n, cap);
    }
  }
}

template <bool WITH_GRADIENT>
void short_rows_of(const CrossEntropyRows& a, int64_t begin, int64_t end, float* scratch) {
  // A vocabulary of characters often has this size: Shakespeare's has 65 characters.
  if (a.classes / LANES * LANES == 64) return short_rows<WITH_GRADIENT, 64>(a, begin, end, scratch);
  short_rows<WITH_GRADIENT, 0>(a, begin, end, scratch);
}

// Capped values: those of a row, and of short rows those of LANES rows.
inline int64_t cross_entropy_scratch(const CrossEntropyRows& a) {
  return a.softcap > 0.0f ? (a.classes <= BLOCK ? LANES : 1) * a.classes : 0;
}

// The gradient of one row: `x` are its values, which are capped where CAPPED.
template <bool CAPPED, class Value, class T>
void row_gradient(const CrossEntropyRows& a, const Value* x, T* out, Statistics row, float scale, float smooth,
                  const Softcap& cap) {
  const auto gradient = a.label_smoothing > 0.0f
                            ? (a.stream ? softmax_gradient<true, true, CAPPED, Value, T>
                                        : softmax_gradient<true, false, CAPPED, Value, T>)
                            : (a.stream ? softmax_gradient<false, true, CAPPED, Value, T>
                                        : softmax_gradient<false, false, CAPPED, Value, T>);
  gradient(x, out, a.classes, row, scale, smooth, a.class_weight, cap);
}

template <class T>
void cross_entropy_rows(const CrossEntropyRows& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = a.classes;
  const bool capped = a.softcap > 0.0f;
  const Softcap cap(a.softcap);
  const float smooth_each = a.label_smoothing / static_cast<float>(n);
  const bool smooths = a.label_smoothing > 0.0f;
  if constexpr (std::is_same_v<T, float>)
    if (n <= BLOCK && !smooths && !a.stream && !a.known_statistics)
      return a.gradient ? short_rows_of<true>(a, begin, end, scratch) : short_rows_of<false>(a, begin, end, scratch);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(a.logits) + i * a.logits_stride;
    T* out = a.gradient ? static_cast<T*>(a.gradient) + i * a.gradient_stride : nullptr;
    const int64_t target = a.targets[i];
    if (target == a.ignore_index) {
      if (a.loss) a.loss[i] = 0.0f;
      if (a.correct) a.correct[i] = 0.0f;
      if (a.statistics) a.statistics[2 * i] = a.statistics[2 * i + 1] = 0.0f;
      if (out) std::memset(static_cast<void*>(out), 0, sizeof(T) * static_cast<size_t>(n));
      continue;
    }
    const float weight = (1.0f - a.label_smoothing) * (a.class_weight ? a.class_weight[target] : 1.0f);
    const float g = out ? a.row_scale[i * a.row_scale_stride] : 0.0f;
    if (a.correct) a.correct[i] = is_correct(x, n, target) ? 1.0f : 0.0f;
    Statistics row;
    if (a.known_statistics) {
      row = {a.known_statistics[2 * i], a.known_statistics[2 * i + 1]};
      if (capped) cap_values(x, scratch, n, cap);
    } else {
      row = capped ? row_statistics(Capped<T>{x, scratch, cap}, n) : row_statistics(Plain<T>{x}, n);
    }
    if (a.statistics) {
      a.statistics[2 * i] = row.max;
      a.statistics[2 * i + 1] = row.log_sum;
    }
    const float x_target = capped ? scratch[target] : to_float(x[target]);
    const float log_p = (x_target - row.max) - row.log_sum;
    const float z_times_lse = a.z_loss > 0.0f ? a.z_loss * (row.max + row.log_sum) : 0.0f;
    if (a.loss) {
      float loss = -weight * log_p;
      if (smooths)
        loss = smooth_each * (capped ? smoothing_loss(scratch, n, row, a.class_weight)
                                     : smoothing_loss(x, n, row, a.class_weight)) - weight * log_p;
      a.loss[i] = a.z_loss > 0.0f ? loss + z_times_lse * (row.max + row.log_sum) : loss;
    }
    if (!out) continue;
    // Without smoothing, its terms are left out instead of multiplied by 0, because a class weight may be infinite.
    const float smoothed = smooths ? smooth_each * (a.class_weight ? a.class_weight[target] : 1.0f) : 0.0f;
    float of_softmax = smooths ? weight + smooth_each * a.class_weight_sum : weight;
    if (a.z_loss > 0.0f) of_softmax += 2.0f * z_times_lse;
    const float scale = g * of_softmax;
    // The target's entry is computed again, in one expression: where p is near 1, rounding p before 1 is subtracted
    // would lose digits.
    float at_target = Exp()(splat(log_p))[0] * scale - g * (weight + smoothed);
    if (capped) {
      at_target *= cap.slope(splat(x_target))[0];
      row_gradient<true>(a, scratch, out, row, scale, g * smooth_each, cap);
    } else {
      row_gradient<false>(a, x, out, row, scale, g * smooth_each, cap);
    }
    from_float(at_target, out[target]);
  }
  if (a.stream) finish_streams();
}

}  // namespace
}  // namespace fastgpt
