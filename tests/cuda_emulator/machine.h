// What the machine consists of: threads, barriers, shared memory, blocks and clusters, and which thread's turn it is.
#pragma once

#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "fibers.h"

namespace emulator {
namespace {

struct Device {  // an H100's values
  int shared_per_block = 232448, shared_per_multiprocessor = 233472, shared_reserved = 1024;
  int has_clusters = 1;
} device;

// The order in which threads take their turns: 0 is ascending, 1 is descending, each other number is a seed. A thread
// goes as far as it gets. Random priorities, drawn once for each thread, find more than a random choice at each step
// would: threads are further apart.
int order = 0;

constexpr int DEFAULT_SHARED_LIMIT = 48 << 10;  // dynamic shared memory of a kernel that has asked for no more
std::map<const void*, int> shared_limits;       // of those that have
std::string launches;                           // a line for each launch: see emulator_launches()

// --- threads, blocks, clusters ---------------------------------------------------------------------------------------

struct Thread;
struct Block;
struct Cluster;

struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t phase = 0;  // how often it was passed
  int line = 0;        // where the threads of this phase arrive
  std::vector<Thread*> waiting;
  char tokens[2];  // by which ThreadSanitizer knows the two latest phases
};

struct Warp {  // the threads of a warp that one mask names
  Barrier barrier;
  uint64_t values[2][32];  // by parity of the exchange: a lane may begin the next one before others have read
  unsigned exchanges[32] = {};
};

struct PendingCopy {
  Copy copy;
  size_t group;
};

struct Thread {
  Block* block;
  unsigned rank;  // in the block
  uint3 index;
  uint64_t priority;  // the least is first
  Fiber* fiber;
  uint64_t cluster_phase = 0;  // at which it arrived at the cluster's barrier, + 1
  std::vector<PendingCopy> copies;
  size_t groups = 0;  // of copies, committed so far
};

// Under AddressSanitizer the variable ends where its allocation ends. Otherwise it lies between zones of 0xff that must
// not change.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t RED_ZONE = 0;
#else
constexpr size_t RED_ZONE = 128;
#endif

struct Variable {  // in shared memory
  const void* key;
  size_t bytes;
  std::unique_ptr<char, void (*)(void*)> memory;

  Variable(const void* key, size_t bytes) : key(key), bytes(bytes), memory(nullptr, std::free) {
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 128, bytes + 2 * RED_ZONE) != 0) throw std::bad_alloc();
    memory.reset(static_cast<char*>(allocated));
    std::memset(memory.get(), 0xff, bytes + 2 * RED_ZONE);  // NaN, in all three types
    IF_TSAN(__tsan_release(memory.get());)                  // see variable_of()
  }
  char* data() const { return memory.get() + RED_ZONE; }
  bool red_zones_unchanged() const {
    for (size_t i = 0; i < RED_ZONE; ++i)
      if (memory.get()[i] != '\xff' || data()[bytes + i] != '\xff') return false;
    return true;
  }
};

struct Block {
  uint3 index;
  Cluster* cluster;
  unsigned rank, running;  // rank in the cluster; threads that have not ended
  bool has_begun = false;
  Barrier barrier;
  std::map<std::pair<unsigned, unsigned>, Warp> warps;  // by number and mask
  std::vector<Thread> threads;
  std::vector<Variable> variables;
};

struct Cluster {
  Barrier barrier;
  unsigned running;  // threads that have not ended
  std::vector<Block> blocks;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
std::set<std::pair<uint64_t, Thread*>> ready;
Thread* self;  // the thread whose turn it is, null while no kernel runs
const std::function<void()>* body;
size_t dynamic_bytes, shared_limit;
std::string failure;
std::mt19937_64 random_numbers;
[[maybe_unused]] char grid_begins, grid_ends;  // what ThreadSanitizer knows the two moments by

// For ThreadSanitizer, the code of a kernel belongs to its own thread, and that of the machine to one more.
void become_machine() { IF_TSAN(__tsan_switch_to_fiber(scheduler.tsan, 1);) }
void become_thread() { IF_TSAN(__tsan_switch_to_fiber(self->fiber->tsan(), 1);) }

struct InMachine {  // what a thread calls begins with one of these
  InMachine() { become_machine(); }
  ~InMachine() { become_thread(); }
};

// What a thread did before it releases a token is visible to those that acquire the token later.
void release([[maybe_unused]] char& token) {
  become_thread();
  IF_TSAN(__tsan_release(&token);)
  become_machine();
}

void acquire([[maybe_unused]] char& token) {
  become_thread();
  IF_TSAN(__tsan_acquire(&token);)
  become_machine();
}

// --- barriers --------------------------------------------------------------------------------------------------------

void let_pass(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.phase;
  for (Thread* thread : barrier.waiting) ready.emplace(thread->priority, thread);
  barrier.waiting.clear();
}

// `orders_memory`: whether what threads did before the barrier is visible to all of them after it.
uint64_t arrive(Barrier& barrier, int line, bool orders_memory = true) {
  if (barrier.arrived > 0 && barrier.line != line)
    fail(("the barrier is met here, and by other threads in line " + std::to_string(barrier.line)).c_str(), line);
  barrier.line = line;
  if (orders_memory) release(barrier.tokens[barrier.phase % 2]);
  ++barrier.arrived;
  return barrier.phase;
}

void wait(Barrier& barrier, uint64_t phase, bool orders_memory = true) {
  if (barrier.phase == phase) {
    barrier.waiting.push_back(self);
    if (barrier.arrived == barrier.expected) let_pass(barrier);
    self->fiber->give_way();
  }
  if (orders_memory) acquire(barrier.tokens[phase % 2]);
}

void leave(Barrier& barrier) {  // threads that have ended are waited for no longer
  --barrier.expected;
  if (barrier.expected > 0 && barrier.arrived == barrier.expected) let_pass(barrier);
}

Warp& warp_of(unsigned mask, int line) {
  if (!(mask >> rank_in_warp() & 1)) fail("the mask does not name the thread that calls", line);
  Warp& warp = self->block->warps[{self->rank / 32, mask}];
  warp.barrier.expected = static_cast<unsigned>(__builtin_popcount(mask));
  return warp;
}

}  // namespace
}  // namespace emulator
