// The large result buffers of large_blocks.h, for Linux. On other systems take_block() has no memory to give, and
// results are allocated like any other tensor.
#include "large_blocks.h"

#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgpt {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)

namespace {

constexpr uintptr_t HUGE_PAGE = uintptr_t{2} << 20;
constexpr size_t KEPT_BLOCKS = 4;  // a training step has one logits gradient and a few activations of this size

struct Kept {
  std::mutex mutex;
  std::vector<LargeBlock> blocks;  // oldest first
};

Kept& kept() {
  static Kept* const blocks = new Kept;  // never destroyed, because tensors may be freed after static objects
  return *blocks;
}

}  // namespace

static LargeBlock new_block(int64_t bytes) {
  const size_t length = static_cast<size_t>(bytes) + HUGE_PAGE;
  void* mapping = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return {nullptr, nullptr, 0, false};
  const uintptr_t address = (reinterpret_cast<uintptr_t>(mapping) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  void* memory = reinterpret_cast<void*>(address);
  madvise(memory, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // where this is refused, the block has small pages
  return {memory, mapping, length, true};
}

LargeBlock take_block(int64_t bytes) {
  const size_t length = static_cast<size_t>(bytes) + HUGE_PAGE;
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    auto& blocks = kept().blocks;
    for (auto block = blocks.begin(); block != blocks.end(); ++block)
      if (block->length >= length && block->length <= length + length / 4) {
        LargeBlock found = *block;
        found.is_fresh = false;
        blocks.erase(block);
        return found;
      }
  }
  return new_block(bytes);
}

void give_back_block(const LargeBlock& block) {
  LargeBlock oldest = block;
  if (madvise(block.mapping, block.length, MADV_FREE) == 0) {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    auto& blocks = kept().blocks;
    blocks.push_back(block);
    if (blocks.size() <= KEPT_BLOCKS) return;
    oldest = blocks.front();
    blocks.erase(blocks.begin());
  }
  munmap(oldest.mapping, oldest.length);
}

#else

LargeBlock take_block(int64_t) { return {nullptr, nullptr, 0, false}; }
void give_back_block(const LargeBlock&) {}

#endif

}  // namespace fastgpt
