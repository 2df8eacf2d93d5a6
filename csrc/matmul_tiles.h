// The matrix product c = a b + bias or c += a b in float32, by packed panels and a tile of sums in registers (Goto and
// van de Geijn 2008; BLIS, Van Zee and van de Geijn 2015).
//
// linear and linear_cross_entropy use it where it is faster than the library that PyTorch calls, see matmul.h. Panels of A of
// TILE_ROWS rows, and panels of B two vectors wide, are copied (packed), so that the loop over the depth of a tile
// reads both in order. Each step of the loop loads two vectors of B and broadcasts TILE_ROWS values of A, for each of
// which it makes two fused multiply-adds into sums in registers.
#pragma once

#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace fastgpt {
namespace {

constexpr int TILE_COLUMNS = 2 * LANES;
// 2 * TILE_ROWS vectors of sums, two vectors of B and one of A are in registers at the same time.
constexpr int TILE_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;
constexpr int64_t CHAIN = 128;             // products added one after the other; more would have larger errors than MKL
constexpr int64_t DEPTH = 512;             // of a panel; one of A then takes at most 24 KB of the first-level cache
constexpr int64_t RESIDENT = 288 * DEPTH;  // values of the smaller operand packed at a time: 576 KB, in the L2 cache
constexpr int64_t STREAMED = 128 * DEPTH;  // values of the larger operand packed at a time: 256 KB

constexpr int64_t SLACK = LANES;  // values after a packed block, which packing may overwrite

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The lines of each block, where `lines` are divided into blocks of whole panels and at most `most` lines. The blocks
// are about equal, because a small last one would hardly be worth packing.
constexpr int64_t equal_blocks(int64_t lines, int64_t most, int64_t panel) {
  const int64_t panels = (lines + panel - 1) / panel, most_panels = most / panel;
  const int64_t blocks = panels == 0 ? 1 : (panels + most_panels - 1) / most_panels;
  return (panels + blocks - 1) / blocks * panel;
}

// What a block of c begins with: its own values, the bias in every row (stride 0), or nothing (null).
struct Start {
  const float* values;
  int64_t stride;
};

// c[ROWS][TILE_COLUMNS] = start + the first ROWS rows of a panel of A times a panel of B
template <int ROWS>
void multiply_tile(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride, Start start) {
  Vec sum[ROWS][2];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
    sum[i][0] = sum[i][1] = Vec{};
    __builtin_prefetch(c + i * c_stride, 1);
    __builtin_prefetch(c + i * c_stride + LANES, 1);
  }
  for (int64_t p = 0; p < depth; ++p) {
    const Vec b0 = load(b), b1 = load(b + LANES);
    __builtin_prefetch(b + 8 * TILE_COLUMNS);
    __builtin_prefetch(b + 8 * TILE_COLUMNS + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      sum[i][0] += a[i] * b0;
      sum[i][1] += a[i] * b1;
    }
    a += TILE_ROWS;
    b += TILE_COLUMNS;
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i) {
    float* row = c + i * c_stride;
    store(row, start.values ? load(start.values + i * start.stride) + sum[i][0] : sum[i][0]);
    store(row + LANES, start.values ? load(start.values + i * start.stride + LANES) + sum[i][1] : sum[i][1]);
  }
}

// The same for the first `rows` rows. Of the last panel often only a few count: of 256 rows, say, 4.
inline void multiply_rows(int64_t rows, const float* a, const float* b, int64_t depth, float* c, int64_t c_stride,
                               Start start) {
  constexpr int THIRD = (TILE_ROWS + 2) / 3;
  if (rows <= THIRD) return multiply_tile<THIRD>(a, b, depth, c, c_stride, start);
  if (rows <= 2 * THIRD) return multiply_tile<2 * THIRD>(a, b, depth, c, c_stride, start);
  multiply_tile<TILE_ROWS>(a, b, depth, c, c_stride, start);
}

// Copies up to WIDTH lines, whose values follow one another, to a panel: out[p * WIDTH + line] is value p of a line. What
// is in lines past the last one does not matter, because their sums are dropped. WIDTH may be no multiple of LANES:
// then what a store writes past a row of the panel is overwritten by the next store, and at the end it is in SLACK.
template <int WIDTH>
void pack_lines(const float* lines, int64_t line_stride, int width, int64_t depth, float* out) {
  int64_t p = 0;
  for (; p + LANES <= depth; p += LANES)
    for (int first = 0; first < WIDTH; first += LANES) {
      Vec block[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        const int line = first + i < width ? first + i : width - 1;
        block[i] = load(lines + line * line_stride + p);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int q = 0; q < LANES; ++q) store(out + (p + q) * WIDTH + first, block[q]);
    }
  for (; p < depth; ++p)
    for (int i = 0; i < WIDTH; ++i) out[p * WIDTH + i] = i < width ? lines[i * line_stride + p] : 0.0f;
}

// Copies `count` lines (rows of A or columns of B) of `depth` values each to panels of WIDTH lines. out[panel][p][line]
// is value p of a line.
template <int WIDTH>
void pack(const float* from, int64_t line_stride, int64_t depth_stride, int64_t count, int64_t depth, float* out) {
  for (int64_t first = 0; first < count; first += WIDTH, out += WIDTH * depth) {
    const float* lines = from + first * line_stride;
    const int width = static_cast<int>(smaller(WIDTH, count - first));
    if (depth_stride == 1) {
      pack_lines<WIDTH>(lines, line_stride, width, depth, out);
    } else if (width == WIDTH && line_stride == 1) {
      for (int64_t p = 0; p < depth; ++p) std::memcpy(out + p * WIDTH, lines + p * depth_stride, 4 * WIDTH);
    } else {
      for (int64_t p = 0; p < depth; ++p)
        for (int i = 0; i < WIDTH; ++i)
          out[p * WIDTH + i] = i < width ? lines[i * line_stride + p * depth_stride] : 0.0f;
    }
  }
}

inline void copy_rows(const float* from, int64_t from_stride, int64_t rows, int64_t width, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(to + r * to_stride, from + r * from_stride, sizeof(float) * static_cast<size_t>(width));
}

// c = start + a b, tile by tile, for packed blocks of A (rows, depth) and B (depth, columns). Tiles below the diagonal
// are left out: those of columns from j on end at row j + TILE_COLUMNS + diagonal.
inline void multiply_blocks(const float* a, const float* b, int64_t rows, int64_t columns, int64_t depth, float* c,
                            int64_t c_stride, Start start, int64_t diagonal) {
  for (int64_t j = 0; j < columns; j += TILE_COLUMNS)
    for (int64_t i = 0; i < smaller(rows, j + TILE_COLUMNS + diagonal); i += TILE_ROWS) {
      float* to = c + i * c_stride + j;
      const Start from = {start.values ? start.values + i * start.stride + j : nullptr, start.stride};
      const int64_t height = smaller(TILE_ROWS, rows - i), width = smaller(TILE_COLUMNS, columns - j);
      const bool is_whole = height == TILE_ROWS && width == TILE_COLUMNS;
      // A tile at the edge is computed in a copy that begins with the same values. Its sums have the bits of any other
      // tile's. They must not differ, because the number of threads decides which tiles are at an edge.
      float edge[TILE_ROWS * TILE_COLUMNS];
      float* tile = is_whole ? to : edge;
      const int64_t stride = is_whole ? c_stride : TILE_COLUMNS;
      Start first = from;
      if (!is_whole && from.values) {
        std::memset(edge, 0, sizeof edge);
        copy_rows(from.values, from.stride, height, width, edge, TILE_COLUMNS);
        first = {edge, TILE_COLUMNS};
      }
      for (int64_t p = 0; p < depth; p += CHAIN)
        multiply_rows(height, a + i * depth + p * TILE_ROWS, b + j * depth + p * TILE_COLUMNS, smaller(CHAIN, depth - p),
                      tile, stride, p == 0 ? first : Start{tile, stride});
      if (!is_whole) copy_rows(edge, TILE_COLUMNS, height, width, to, c_stride);
    }
}

// The rows of a packed block of A, and the columns of one of B. A block of the operand with the shorter side (of A
// where a_stays) is packed once for each slice of the depth and stays in the cache, while the blocks of the other one
// pass.
struct Blocks {
  int64_t rows, columns;
  bool a_stays;
};

inline Blocks blocks_of(const Matmul& m) {
  const int64_t depth = smaller(DEPTH, m.depth < 1 ? 1 : m.depth);
  const bool a_stays = m.rows <= m.columns;
  const int64_t most_rows = (a_stays ? RESIDENT : STREAMED) / depth;
  const int64_t most_columns = (a_stays ? STREAMED : RESIDENT) / depth;
  return {equal_blocks(m.rows, most_rows, TILE_ROWS), equal_blocks(m.columns, most_columns, TILE_COLUMNS), a_stays};
}

inline int64_t matmul_workspace(const Matmul& m) {
  const Blocks blocks = blocks_of(m);
  return (blocks.rows + blocks.columns) * smaller(DEPTH, m.depth) + 2 * SLACK;
}

inline void matmul(const Matmul& m, float* workspace) {
  const Blocks blocks = blocks_of(m);
  float* packed_a = workspace;
  float* packed_b = workspace + blocks.rows * smaller(DEPTH, m.depth) + SLACK;
  for (int64_t p = 0; p < m.depth; p += DEPTH) {
    const int64_t depth = smaller(DEPTH, m.depth - p);
    const auto pack_a = [&](int64_t i) {
      const int64_t rows = smaller(blocks.rows, m.rows - i);
      pack<TILE_ROWS>(m.a + i * m.a_row + p * m.a_depth, m.a_row, m.a_depth, rows, depth, packed_a);
    };
    const auto pack_b = [&](int64_t j) {
      const int64_t columns = smaller(blocks.columns, m.columns - j);
      pack<TILE_COLUMNS>(m.b + j * m.b_column + p * m.b_depth, m.b_column, m.b_depth, columns, depth, packed_b);
    };
    const auto multiply = [&](int64_t i, int64_t j) {
      float* c = m.c + i * m.c_row + j;
      Start start = {m.accumulate || p > 0 ? c : nullptr, m.c_row};
      if (p == 0 && m.bias) start = {m.bias + j, 0};
      multiply_blocks(packed_a, packed_b, smaller(blocks.rows, m.rows - i), smaller(blocks.columns, m.columns - j), depth,
                      c, m.c_row, start, m.upper ? m.diagonal + j - i : m.rows);
    };
    if (blocks.a_stays) {
      for (int64_t i = 0; i < m.rows; i += blocks.rows) {
        pack_a(i);
        for (int64_t j = 0; j < m.columns; j += blocks.columns) pack_b(j), multiply(i, j);
      }
    } else {
      for (int64_t j = 0; j < m.columns; j += blocks.columns) {
        pack_b(j);
        for (int64_t i = 0; i < m.rows; i += blocks.rows) pack_a(i), multiply(i, j);
      }
    }
  }
}

}  // namespace
}  // namespace fastgpt
