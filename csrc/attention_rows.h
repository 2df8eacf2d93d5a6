// Attention, forward and backward, without its weights in memory (FlashAttention-2, Dao 2023, arXiv:2307.08691).
//
// A strip of query rows meets a block of keys: its scores are made, turned into weights and multiplied by the values
// while they lie in the nearest caches. Forward keeps of each row its logsumexp, from which backward makes the weights
// again. What is fused: the causal mask, of which only the tiles on the diagonal know; softmax, merged from block to
// block (online softmax); dropout, whose mask is drawn in registers; the conversions of 16-bit values.
#pragma once

#include <cmath>

#include "attention_tiles.h"
#include "philox.h"

namespace fastgpt {
namespace {

constexpr int64_t STRIP = 32;                // query rows whose scores are in memory at a time
constexpr int64_t BLOCK_VALUES = 256 * 64;   // of K, and of V, copied at a time: 64 KB each
constexpr int64_t MOST_KEYS = 256;           // of a block; with PADDED, the length of a row of scores

// The keys of a block: a multiple of two vectors, and so that K^T and V stay in the second-level cache.
inline int64_t block_keys(const Attention& a) {
  const int64_t keys = most(64, least(MOST_KEYS, BLOCK_VALUES / a.width / 64 * 64));
  return least(keys, rounded_up(a.keys, 2 * LANES));
}

// The keys that a query sees: they are the first ones.
inline int64_t keys_seen(const Attention& a, int64_t query) {
  return a.is_causal ? most(0, least(a.keys, query + a.keys - a.queries + 1)) : a.keys;
}

template <class T>
inline T* row_of(const HeadRows& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}

// A part of the workspace, in whole lines of the cache.
inline float* take(float*& workspace, int64_t values) {
  float* taken = workspace;
  workspace += rounded_up(values, LINE);
  return taken;
}

// A strip of query rows against a block of keys.
struct Strip {
  const Attention& a;
  int64_t first, rows;       // of the queries
  int64_t first_key, keys;   // of the block

  // The keys of the block that row r of the strip sees; the last of the rows sees the most.
  int64_t seen(int64_t r) const { return most(0, least(keys, keys_seen(a, first + least(r, rows - 1)) - first_key)); }
  int64_t seen_by_tile(int64_t r) const { return seen(r + TALL - 1); }
};

// scores[r][j] = x[r] . y[j] for the keys that are seen; `y_columns` is y transposed.
inline void multiply_by_columns(const Strip& s, const float* x, const float* y_columns, int64_t y_stride, float* scores) {
  const int64_t columns = s.seen(s.rows - 1);
  for (int64_t j = 0; j < columns; j += 2 * LANES)  // a panel of y stays in the nearest cache
    for (int64_t r = 0; r < s.rows; r += TALL) {
      const int64_t left = least(2 * LANES, s.seen_by_tile(r) - j);
      if (left > 0)
        multiply_columns<PADDED, 1>(x + r * PADDED, y_columns + j, y_stride, s.a.width, left, scores + r * PADDED + j,
                                    PADDED, false);
    }
}

// out[r] (+)= weights[r] y, for the rows y of the keys.
inline void multiply_by_rows(const Strip& s, const float* weights, const float* y, int64_t y_stride, float* out,
                             int64_t out_stride, bool accumulate) {
  for (int64_t r = 0; r < s.rows; r += TALL)
    multiply_columns<PADDED, 1>(weights + r * PADDED, y, y_stride, s.seen_by_tile(r), s.a.width, out + r * out_stride,
                                out_stride, accumulate);
}

// out[j] += sum over r of weights[r][j] x[r]: the keys' part of the strip. Rows above the diagonal are left out.
inline void add_to_keys(const Strip& s, const float* weights, const float* x, float* out, int64_t out_stride) {
  const int64_t columns = s.seen(s.rows - 1);
  for (int64_t j = 0; j < columns; j += TALL) {
    int64_t r = 0;
    if (s.a.is_causal) r = most(0, least(s.rows, s.first_key + j - (s.a.keys - s.a.queries) - s.first));
    multiply_columns<1, PADDED>(weights + r * PADDED + j, x + r * PADDED, PADDED, s.rows - r, s.a.width,
                                out + j * out_stride, out_stride, true);
  }
}

inline Vec masked(Vec v, int64_t n, float fill) {  // `fill` behind the first n lanes
  return lane_numbers() < static_cast<int32_t>(least(n, LANES)) ? v : splat(fill);
}

inline Vec kept_or_zero(Mask kept, Vec v) { return kept ? v : Vec{}; }

inline float largest(const float* row, int64_t n) {
  Vec max = splat(-INFINITY);
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) max = larger(load(row + j), max);
  if (j < n) max = larger(masked(load(row + j), n - j, -INFINITY), max);
  return max_lanes(max);
}

// Replaces n scores by exp(score - max), dropped out, and those behind them up to `end` by zeros. Returns the
// sum before dropout.
template <bool DROPOUT>
inline float weights_of_row(float* row, int64_t n, int64_t end, float max, const Dropout& dropout, uint64_t row_number, int64_t first_key) {
  const Exp exp;
  Vec sum[2] = {};
  for (int64_t j = 0; j < end; j += 2 * LANES) {
    Mask kept[2];
    if constexpr (DROPOUT) dropout.keep(row_number, static_cast<uint64_t>(first_key + j), kept);
    for (int i = 0; i < 2; ++i) {
      const int64_t at = j + i * LANES;
      Vec p = exp(load(row + at) - max);
      if (at + LANES > n) p = masked(p, n - at, 0.0f);
      sum[i] += p;
      store(row + at, DROPOUT ? kept_or_zero(kept[i], p) : p);
    }
  }
  return sum_lanes(sum[0] + sum[1]);
}

struct RowState {
  float max, sum;  // of the scores, and of exp(score - max)
};

// The scores of a strip become weights; what the rows have gathered so far is scaled to their new maxima.
template <bool DROPOUT>
void update_strip(const Strip& s, float* scores, RowState* states, float* out, int64_t out_stride, const Dropout& dropout,
                  uint64_t row_number) {
  for (int64_t r = 0; r < s.rows; ++r) {
    const int64_t n = s.seen(r), end = rounded_up(s.seen_by_tile(r / TALL * TALL), 2 * LANES);
    float* row = scores + r * PADDED;
    RowState& state = states[r];
    const float max = n > 0 ? larger(splat(largest(row, n)), splat(state.max))[0] : state.max;
    if (s.first_key > 0 && max != state.max) {
      const float factor = Exp()(splat(state.max - max))[0];
      state.sum *= factor;
      for (int64_t d = 0; d < s.a.width; d += LANES) store(out + r * out_stride + d, load(out + r * out_stride + d) * factor);
    }
    state.max = max;
    state.sum += weights_of_row<DROPOUT>(row, n, end, max, dropout, row_number + static_cast<uint64_t>(r), s.first_key);
  }
}

// --- forward ---

// The query rows of a task: those whose output of float32 takes as much as a block of keys.
inline int64_t task_rows(const Attention& a) { return most(STRIP, BLOCK_VALUES / most(a.width, 1) / STRIP * STRIP); }

inline int64_t attention_tasks(const Attention& a) {
  return a.batch * a.heads * ((a.queries + task_rows(a) - 1) / task_rows(a));
}

inline int64_t attention_workspace(const Attention& a) {
  const int64_t keys = block_keys(a), rows = least(task_rows(a), rounded_up(a.queries, TALL));
  return 2 * rounded_up(STRIP * PADDED, LINE) + a.width * padded(keys) + (keys + rows) * padded(a.width) + 4 * LINE +
         2 * rows;
}

template <class T, bool DROPOUT>
void attend(const Attention& a, int64_t batch, int64_t head, int64_t begin, int64_t end, float* workspace) {
  const int64_t block = block_keys(a), width = padded(a.width), key_head = head / (a.heads / a.key_heads);
  const int64_t columns_stride = padded(block);
  float* const q = take(workspace, STRIP * PADDED);
  float* const scores = take(workspace, STRIP * PADDED);
  float* const k_columns = take(workspace, a.width * columns_stride);
  float* const v = take(workspace, block * width);
  float* const out = take(workspace, rounded_up(end - begin, TALL) * width);
  RowState* const states = reinterpret_cast<RowState*>(workspace);
  const Dropout dropout(a.seed, a.dropout_p, a.first_row);
  const uint64_t first_row = static_cast<uint64_t>((batch * a.heads + head) * a.queries);
  for (int64_t i = 0; i < end - begin; ++i) states[i] = {-INFINITY, 0.0f};
  const int64_t seen = keys_seen(a, end - 1);
  int64_t key = 0;
  do {
    const int64_t keys = least(block, seen - key);
    if (keys > 0) {
      copy_transposed(row_of<const T>(a.k, batch, key_head, key), a.k.row, keys, a.width, a.scale,
                      k_columns, columns_stride);
      copy_rows(row_of<const T>(a.v, batch, key_head, key), a.v.row, keys, a.width, 1.0f, v, width);
    }
    for (int64_t i = begin; i < end; i += STRIP) {
      const Strip s{a, i, least(STRIP, end - i), key, keys};
      if (key > 0 && s.seen(s.rows - 1) == 0) continue;
      float* const sums = out + (i - begin) * width;
      copy_rows(row_of<const T>(a.q, batch, head, i), a.q.row, s.rows, a.width, 1.0f, q, PADDED);
      clear_rows(q + s.rows * PADDED, PADDED, rounded_up(s.rows, TALL) - s.rows, a.width);
      multiply_by_columns(s, q, k_columns, columns_stride, scores);
      update_strip<DROPOUT>(s, scores, states + (i - begin), sums, width, dropout, first_row + static_cast<uint64_t>(i));
      multiply_by_rows(s, scores, v, width, sums, width, key > 0);
      if (key + block < keys_seen(a, i + s.rows - 1)) continue;
      for (int64_t r = 0; r < s.rows; ++r) {
        const RowState state = states[i - begin + r];
        const bool sees = state.sum > 0.0f || state.sum != state.sum;
        write_row(sums + r * width, a.width, sees ? dropout.scale / state.sum : 0.0f, row_of<T>(a.out, batch, head, i + r));
        a.lse[static_cast<int64_t>(first_row) + i + r] =
            sees ? state.max + log_of_sum(splat(state.sum))[0] : -INFINITY;
      }
    }
    key += block;
  } while (key < seen);
}

// Tasks [begin, end). A later block of queries sees more keys, so late and early blocks take turns: each thread, which
// gets neighbouring tasks, then has about as much to do.
template <class T>
void attention(const Attention& a, int64_t begin, int64_t end, float* workspace) {
  const int64_t rows = task_rows(a), blocks = (a.queries + rows - 1) / rows;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / blocks, turn = task % blocks;
    const int64_t first = (turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2) * rows;
    const auto kernel = a.dropout_p > 0.0 ? attend<T, true> : attend<T, false>;
    kernel(a, head / a.heads, head % a.heads, first, least(first + rows, a.queries), workspace);
  }
}

// --- backward ---

inline int64_t attention_backward_workspace(const Attention& a) {
  const int64_t keys = block_keys(a);
  const int64_t of_queries = keys < a.keys ? a.heads / a.key_heads * rounded_up(a.queries, TALL) : STRIP;
  return 4 * STRIP * PADDED + 2 * a.width * padded(keys) + (3 * keys + of_queries) * padded(a.width) + 9 * LINE;
}

// scores and `grad`, the gradient of the weights, become the weights and the gradient of the scores.
template <bool DROPOUT>
void differentiate_strip(const Strip& s, float* scores, float* grad, const float* lse, const float* delta,
                         const Dropout& dropout, uint64_t row_number) {
  const Exp exp;
  for (int64_t r = 0; r < s.rows; ++r) {
    const int64_t n = s.seen(r), end = rounded_up(s.seen_by_tile(r / TALL * TALL), 2 * LANES);
    float *row = scores + r * PADDED, *grad_row = grad + r * PADDED;
    for (int64_t j = 0; j < end; j += 2 * LANES) {
      Mask kept[2];
      if constexpr (DROPOUT)
        dropout.keep(row_number + static_cast<uint64_t>(r), static_cast<uint64_t>(s.first_key + j), kept);
      for (int i = 0; i < 2; ++i) {
        const int64_t at = j + i * LANES;
        Vec p = exp(load(row + at) - lse[r]);
        if (at + LANES > n) p = masked(p, n - at, 0.0f);
        Vec g = load(grad_row + at);
        if constexpr (DROPOUT) g = kept_or_zero(kept[i], g * dropout.scale);
        g = p * (g - delta[r]);
        if (at + LANES > n) g = masked(g, n - at, 0.0f);
        store(grad_row + at, g);
        store(row + at, DROPOUT ? kept_or_zero(kept[i], p * dropout.scale) : p);
      }
    }
  }
}

template <class T>
inline float dot(const float* x, const T* y, int64_t width) {
  Vec sum{};
  for (int64_t d = 0; d < width; d += LANES) sum += load(x + d) * load_first(y + d, width - d);
  return sum_lanes(sum);
}

template <class T, bool DROPOUT>
void differentiate(const Attention& a, int64_t batch, int64_t key_head, float* workspace) {
  const int64_t block = block_keys(a), width = padded(a.width), group = a.heads / a.key_heads;
  const int64_t columns_stride = padded(block);
  float* const q = take(workspace, STRIP * PADDED);
  float* const grad_out = take(workspace, STRIP * PADDED);
  float* const scores = take(workspace, STRIP * PADDED);
  float* const grad_scores = take(workspace, STRIP * PADDED);
  float* const delta = take(workspace, STRIP);
  float* const k_columns = take(workspace, a.width * columns_stride);
  float* const v_columns = take(workspace, a.width * columns_stride);
  float* const k = take(workspace, block * width);
  float* const grad_k = take(workspace, block * width);
  float* const grad_v = take(workspace, block * width);
  float* const grad_q = workspace;  // of a strip, or where there are several blocks of keys, of all queries
  const bool one_block = block >= a.keys, with_scores = a.grad_q.data || a.grad_k.data;
  const Dropout dropout(a.seed, a.dropout_p, a.first_row);
  int64_t key = 0;
  do {
    const int64_t keys = most(0, least(block, a.keys - key));
    const T* const k_rows = row_of<const T>(a.k, batch, key_head, key);
    copy_transposed(k_rows, a.k.row, keys, a.width, a.scale, k_columns, columns_stride);
    if (with_scores)
      copy_transposed(row_of<const T>(a.v, batch, key_head, key), a.v.row, keys, a.width, 1.0f, v_columns, columns_stride);
    if (a.grad_q.data) copy_rows(k_rows, a.k.row, keys, a.width, a.scale, k, width);
    clear_rows(grad_k, width, rounded_up(keys, TALL), a.width);
    clear_rows(grad_v, width, rounded_up(keys, TALL), a.width);
    // The first query that sees a key of the block; the first block is met by all queries, whose gradients it begins.
    const int64_t first = key > 0 && a.is_causal ? most(0, key - (a.keys - a.queries)) / STRIP * STRIP : 0;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
      for (int64_t i = first; i < a.queries; i += STRIP) {
        const Strip s{a, i, least(STRIP, a.queries - i), key, keys};
        const int64_t padding = rounded_up(s.rows, TALL) - s.rows;
        const int64_t row_number = (batch * a.heads + head) * a.queries + i;
        copy_rows(row_of<const T>(a.q, batch, head, i), a.q.row, s.rows, a.width, 1.0f, q, PADDED);
        copy_rows(row_of<const T>(a.grad_out, batch, head, i), a.grad_out.row, s.rows, a.width, 1.0f, grad_out, PADDED);
        clear_rows(q + s.rows * PADDED, PADDED, padding, a.width);
        clear_rows(grad_out + s.rows * PADDED, PADDED, padding, a.width);
        multiply_by_columns(s, q, k_columns, columns_stride, scores);
        if (with_scores) {
          for (int64_t r = 0; r < s.rows; ++r)
            delta[r] = dot(grad_out + r * PADDED, row_of<const T>(a.out, batch, head, i + r), a.width);
          multiply_by_columns(s, grad_out, v_columns, columns_stride, grad_scores);
        }
        differentiate_strip<DROPOUT>(s, scores, grad_scores, a.lse + row_number, delta, dropout,
                                     static_cast<uint64_t>(row_number));
        if (a.grad_v.data) add_to_keys(s, scores, grad_out, grad_v, width);
        if (a.grad_k.data) add_to_keys(s, grad_scores, q, grad_k, width);
        if (!a.grad_q.data) continue;
        float* const sums = one_block ? grad_q : grad_q + ((head - key_head * group) * rounded_up(a.queries, TALL) + i) * width;
        multiply_by_rows(s, grad_scores, k, width, sums, width, key > 0);
        if (key + block < keys_seen(a, i + s.rows - 1)) continue;
        for (int64_t r = 0; r < s.rows; ++r) write_row(sums + r * width, a.width, 1.0f, row_of<T>(a.grad_q, batch, head, i + r));
      }
    for (int64_t j = 0; j < keys; ++j) {
      if (a.grad_k.data) write_row(grad_k + j * width, a.width, a.scale, row_of<T>(a.grad_k, batch, key_head, key + j));
      if (a.grad_v.data) write_row(grad_v + j * width, a.width, 1.0f, row_of<T>(a.grad_v, batch, key_head, key + j));
    }
    key += block;
  } while (key < a.keys);
}

// Tasks [begin, end): the key heads. Each adds up the gradients of its keys alone, so that no bit depends on threads.
template <class T>
void attention_backward(const Attention& a, int64_t begin, int64_t end, float* workspace) {
  const auto kernel = a.dropout_p > 0.0 ? differentiate<T, true> : differentiate<T, false>;
  for (int64_t task = begin; task < end; ++task) kernel(a, task / a.key_heads, task % a.key_heads, workspace);
}

}  // namespace
}  // namespace fastgpt
