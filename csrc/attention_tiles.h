// What the attention kernels are made of: a tile of a matrix product in registers, and the copies that feed it.
//
// The operands are small, and stay in the nearer caches. So only those that a tile reads across their rows are copied in
// another order: K^T and V^T. The others are read where they lie, in rows of PADDED values, which is a constant, so that
// the address of each value of A is a constant away from that of its neighbour.
#pragma once

#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace fastgpt {
namespace {

constexpr int TALL = LANES == 16 ? 8 : 4;  // rows of a tile: 2 * TALL vectors of sums, two of B and one of A in registers
constexpr int64_t LINE = 16;               // float32 values in a line of the cache

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The distance of rows of n values: an odd number of lines, so that the rows of a column spread over the whole cache.
constexpr int64_t padded(int64_t n) { return (rounded_up(n, LINE) / LINE | 1) * LINE; }
constexpr int64_t PADDED = padded(256);  // for rows of keys of a block, and of the values of a head

// c[TALL][VECTORS * LANES] (+)= a b, where a[i][p] is a[i * A_ROW + p * A_DEPTH].
template <int VECTORS, int64_t A_ROW, int64_t A_DEPTH>
inline void multiply(const float* a, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
                     bool accumulate) {
  Vec sum[TALL][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = Vec{};
  for (int64_t p = 0; p < depth; ++p) {
    Vec row[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) row[j] = load(b + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) sum[i][j] += a[i * A_ROW] * row[j];
    a += A_DEPTH;
    b += b_stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + i * c_stride + j * LANES;
      store(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
    }
}

// The same for a whole number of vectors of columns, of which the last one begins before `columns`.
template <int64_t A_ROW, int64_t A_DEPTH>
inline void multiply_columns(const float* a, const float* b, int64_t b_stride, int64_t depth, int64_t columns, float* c,
                             int64_t c_stride, bool accumulate) {
  int64_t j = 0;
  for (; j + LANES < columns; j += 2 * LANES)
    multiply<2, A_ROW, A_DEPTH>(a, b + j, b_stride, depth, c + j, c_stride, accumulate);
  if (j < columns) multiply<1, A_ROW, A_DEPTH>(a, b + j, b_stride, depth, c + j, c_stride, accumulate);
}

template <class T>
inline Vec load_first(const T* p, int64_t n) {  // zeros behind the first n values
  return n >= LANES ? load(p) : load_some(p, n, 0.0f);
}

// to[i] = scale * from[i], in float32, for rows of `width` values, with zeros behind them up to a whole vector.
template <class T>
inline void copy_rows(const T* from, int64_t from_stride, int64_t rows, int64_t width, float scale, float* to,
                      int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i, from += from_stride, to += to_stride)
    for (int64_t d = 0; d < width; d += LANES) store(to + d, load_first(from + d, width - d) * scale);
}

inline void clear_rows(float* to, int64_t to_stride, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i, to += to_stride)
    for (int64_t d = 0; d < width; d += LANES) store(to + d, Vec{});
}

// out[0 .. width) = from * factor
template <class T>
inline void write_row(const float* from, int64_t width, float factor, T* out) {
  for (int64_t d = 0; d < width; d += LANES) store_some(out + d, least(LANES, width - d), load(from + d) * factor);
}

// out[d][i] = scale * from[i][d], with zeros for the columns i behind `rows` up to a whole vector.
template <class T>
inline void copy_transposed(const T* from, int64_t from_stride, int64_t rows, int64_t width, float scale, float* out,
                            int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t d = 0; d < width; d += LANES) {
      Vec block[LANES];
      for (int64_t r = 0; r < LANES; ++r)
        block[r] = i + r < rows ? load_first(from + (i + r) * from_stride + d, width - d) * scale : Vec{};
      transpose(block);
      for (int64_t c = 0; c < least(LANES, width - d); ++c) store(out + (d + c) * out_stride + i, block[c]);
    }
}

}  // namespace
}  // namespace fastgpt
