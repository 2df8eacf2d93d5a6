// Large result buffers on the CPU, without paying for their page faults at every call.
//
// The first touch of a fresh 200 MB buffer costs more than cross-entropy on it: 50,000 faults, each of which zeroes 4
// KB. Two remedies: huge pages (100 faults), and reuse. A block that comes back is kept for the next call of about its
// size, marked MADV_FREE: the kernel may take its pages when memory is short, and until then they are reused without a
// fault.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

// Bytes: below, malloc reuses its own heap; above, it would ask the kernel for fresh pages at every call.
constexpr int64_t SMALLEST_LARGE_BLOCK = int64_t{8} << 20;

struct LargeBlock {
  void* memory;  // on a huge page's boundary; null where there is none
  void* mapping;
  size_t length;  // of the mapping
  bool is_fresh;  // its pages are zeros
};

LargeBlock take_block(int64_t bytes);  // kept or fresh
void give_back_block(const LargeBlock& block);

}  // namespace fastgpt
