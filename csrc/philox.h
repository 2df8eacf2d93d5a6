// The dropout masks of fastgpt/ops/dropout.py, bit for bit, drawn in registers: Philox-4x32-10 (Salmon et al. 2011), keyed
// by (seed, row, column), so that no mask is kept in memory, and backward draws the one that forward drew.
//
// A word of a counter takes the lower half of a 64-bit lane, because a product of two words has 64 bits. A vector then
// draws for LANES / 2 counters, whose four words are the columns of two vectors: two instructions a column. What is left
// in the upper halves does no harm: the multiplication does not read them, and they are dropped at the end.
#pragma once

#include "simd.h"

namespace fastgpt {
namespace {

typedef uint64_t Words __attribute__((vector_size(4 * FASTGPT_LANES)));

// The products of the lower halves of the lanes.
inline Words multiply_words(Words a, Words b) {
#if defined(FASTGPT_AVX512)
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(FASTGPT_AVX2)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The 64-bit lanes at even places of a and b, in turns; or those at odd places.
template <int ODD, int... I>
inline Words interleave(Words a, Words b, std::integer_sequence<int, I...>) {
  constexpr int PLACES = LANES / 2;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((I & 1) ? PLACES + (I & ~1) + ODD : I + ODD)...);
#else
  return __builtin_shuffle(a, b, Words{static_cast<uint64_t>((I & 1) ? PLACES + (I & ~1) + ODD : I + ODD)...});
#endif
}

class Dropout {
 public:
  // Drops with probability p in [0, 1). Row 0 of the caller is `first_row` of the mask.
  Dropout(uint64_t seed, double p, uint64_t first_row)
      : scale(static_cast<float>(1.0 / (1.0 - p))),
        first_row(first_row),
        // The sum with 2^52 is rounded to an integer, ties to even, as Python's round() does.
        last_dropped(static_cast<int32_t>(static_cast<int64_t>(p * 0x1p31 + 0x1p52 - 0x1p52) - 1)) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < ROUNDS; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u)
      keys[round][0] = low, keys[round][1] = high;
    // The groups of four columns are in the order in which `interleave` gives neighbours back.
    for (uint64_t i = 0; i < LANES / 2; ++i) group_of_lane[i] = i / 2 + i % 2 * (LANES / 4);
  }

  // The random words of the columns [column, column + 2 * LANES) of a row; `column` is a multiple of four.
  void draw(uint64_t row, uint64_t column, Bits words[2]) const {
    row += first_row;
    Words c0 = group_of_lane + column / 4, c1 = Words{} + (row & 0xffffffffu), c2 = Words{} + (row >> 32), c3{};
#pragma GCC unroll 10
    for (int round = 0; round < ROUNDS; ++round) {
      const Words p0 = multiply_words(c0, Words{} + 0xD2511F53u), p1 = multiply_words(c2, Words{} + 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ keys[round][0];
      c2 = (p0 >> 32) ^ c3 ^ keys[round][1];
      c1 = p1;
      c3 = p0;
    }
    const Words first = (c0 & 0xffffffffu) | c1 << 32, second = (c2 & 0xffffffffu) | c3 << 32;
    words[0] = (Bits)interleave<0>(first, second, std::make_integer_sequence<int, LANES / 2>());
    words[1] = (Bits)interleave<1>(first, second, std::make_integer_sequence<int, LANES / 2>());
  }

  // Which of these columns are kept: all bits of a lane are set, or none.
  void keep(uint64_t row, uint64_t column, Mask kept[2]) const {
    Bits words[2];
    draw(row, column, words);
    for (int i = 0; i < 2; ++i) kept[i] = (Mask)(words[i] >> 1) > last_dropped;
  }

  const float scale;  // of the elements that are kept

 private:
  static constexpr int ROUNDS = 10;
  const uint64_t first_row;
  const int32_t last_dropped;  // the largest 31-bit word whose element is dropped; -1 where none is
  uint64_t keys[ROUNDS][2];
  Words group_of_lane;
};

}  // namespace
}  // namespace fastgpt
