// Prints the words and the mask that csrc/philox.h draws, for test_philox.py: philox SEED ROW COLUMN PROBABILITY.
// Compiled once for each instruction set, which its flags choose.
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#if defined(FASTGPT_AVX512) || defined(FASTGPT_AVX2)
#include <immintrin.h>
#endif

#include "philox.h"

int main(int, char** arguments) {
  const uint64_t seed = std::strtoull(arguments[1], nullptr, 10), row = std::strtoull(arguments[2], nullptr, 10);
  const uint64_t column = std::strtoull(arguments[3], nullptr, 10);
  const uint64_t first_row = row / 3;
  const fastgpt::Dropout dropout(seed, std::strtod(arguments[4], nullptr), first_row);
  fastgpt::Bits words[2];
  fastgpt::Mask kept[2];
  dropout.draw(row - first_row, column, words);
  dropout.keep(row - first_row, column, kept);
  for (int i = 0; i < 2 * fastgpt::LANES; ++i)
    std::printf("%u %d\n", words[i / fastgpt::LANES][i % fastgpt::LANES], kept[i / fastgpt::LANES][i % fastgpt::LANES]);
}
