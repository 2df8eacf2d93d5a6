// Large result buffers on the CPU that are reused, so that not every call waits for the page faults of a new one.
//
// Writing to a new buffer of 200 MB for the first time takes longer than cross-entropy on it, because of 50,000 page
// faults, each of which zeroes 4 KB. With huge pages there are 100 faults, and with pages that are used again there are
// none. A block that is given back is kept for the next call that needs about its size. It is marked MADV_FREE: the
// operating system may take its pages when memory is short, and until then they are used again without a fault.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

// In bytes. malloc itself reuses smaller blocks. For larger ones it would ask the system for new pages at every call.
constexpr int64_t SMALLEST_LARGE_BLOCK = int64_t{8} << 20;

struct LargeBlock {
  void* memory;  // starts at the boundary of a huge page; null where there is no memory
  void* mapping;
  size_t length;  // of the mapping
  bool is_fresh;  // its pages are zeros
};

LargeBlock take_block(int64_t bytes);  // one that was given back, or a new one
void give_back_block(const LargeBlock& block);

}  // namespace fastgpt
