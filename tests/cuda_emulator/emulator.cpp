// The machine behind cuda_emulator.h: the launch of a grid, the scheduler of its threads, and what threads call.
//
// This file is compiled without -fsanitize=thread. What it does to its own data is no race of a kernel.
#include <dlfcn.h>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

// --- the life of a thread --------------------------------------------------------------------------------------------

void end_of_thread() {
  Block& block = *self->block;
  if (!self->copies.empty()) fail("a thread ends before its asynchronous copies", 0);
  if (--block.running == 0)
    for (const Variable& variable : block.variables)
      if (!variable.red_zones_unchanged()) fail("a thread has written past the end of a shared variable", 0);
  leave(block.barrier);
  leave(block.cluster->barrier);
  --block.cluster->running;
  idle.push_back(self->fiber);
}

void fiber_main() {
  self->fiber->entered();
  for (;;) {  // a thread at each turn of the loop
    self->block->has_begun = true;
    acquire(grid_begins);
    become_thread();
    (*body)();
    become_machine();
    release(grid_ends);
    end_of_thread();
    self->fiber->give_way();
  }
}

uint64_t priority_of(uint64_t number) { return order == 0 ? number : order == 1 ? ~number : random_numbers(); }

uint3 index_of(unsigned number, dim3 sizes) {
  return {number % sizes.x, number / sizes.x % sizes.y, number / sizes.x / sizes.y};
}

Fiber* idle_fiber() {
  if (idle.empty()) {
    fibers.push_back(std::make_unique<Fiber>(fiber_main));
    return fibers.back().get();
  }
  // Any of them: ThreadSanitizer sees no race between two threads that one fiber runs.
  std::swap(idle[random_numbers() % idle.size()], idle.back());
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

std::unique_ptr<Cluster> begin_cluster(unsigned first_block, unsigned size) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  auto cluster = std::make_unique<Cluster>();
  cluster->running = cluster->barrier.expected = size * threads;
  cluster->blocks.resize(size);
  for (unsigned rank = 0; rank < size; ++rank) {
    Block& block = cluster->blocks[rank];
    block.index = index_of(first_block + rank, gridDim);
    block.cluster = cluster.get();
    block.rank = rank;
    block.running = block.barrier.expected = threads;
    for (unsigned i = 0; i < threads; ++i) {
      const uint64_t number = uint64_t{first_block + rank} * threads + i;
      block.threads.push_back({&block, i, index_of(i, blockDim), priority_of(number), idle_fiber(), 0, {}, 0});
    }
    for (Thread& thread : block.threads) ready.emplace(thread.priority, &thread);
  }
  return cluster;
}

std::string describe_waiting(const std::vector<std::unique_ptr<Cluster>>& clusters) {
  std::map<std::string, size_t> places;
  const auto add = [&](const Barrier& barrier, const char* kind) {
    if (!barrier.waiting.empty())
      places[std::string(kind) + " of line " + std::to_string(barrier.line)] += barrier.waiting.size();
  };
  for (const auto& cluster : clusters) {
    add(cluster->barrier, "the barrier of a cluster");
    for (const Block& block : cluster->blocks) {
      add(block.barrier, "the barrier of a block");
      for (const auto& warp : block.warps) add(warp.second.barrier, "an operation of a warp");
    }
  }
  std::string text = "deadlock:";
  for (const auto& [place, count] : places) text += " " + std::to_string(count) + " threads wait at " + place + ";";
  return text;
}

// --- a grid ----------------------------------------------------------------------------------------------------------

unsigned cluster_size_of(const cudaLaunchConfig_t& config) {
  unsigned size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) size = config.attrs[i].val.clusterDim.x;
  return size;
}

size_t dynamic_limit(const void* kernel) {
  const auto found = shared_limits.find(kernel);
  return static_cast<size_t>(found == shared_limits.end() ? DEFAULT_SHARED_LIMIT : found->second);
}

const char* reason_to_refuse(const void* kernel, const cudaLaunchConfig_t& config, unsigned cluster_size) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return "a block has 1 to 1024 threads";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "a grid has at least one block";
  if (grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX) return "the grid is too large";
  if (config.dynamicSmemBytes > dynamic_limit(kernel)) return "the kernel has not asked for so much shared memory";
  if (cluster_size == 0 || cluster_size > 8 || grid.x % cluster_size != 0) return "the grid is not made of such clusters";
  if (cluster_size > 1 && !device.has_clusters) return "the device has no clusters";
  return nullptr;
}

void record(const void* kernel, const cudaLaunchConfig_t& config, unsigned cluster_size) {
  Dl_info library;
  dladdr(kernel, &library);
  const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
  for (const size_t value : {static_cast<size_t>(offset), size_t{config.gridDim.x}, size_t{config.gridDim.y},
                             size_t{config.blockDim.x}, size_t{cluster_size}, config.dynamicSmemBytes})
    launches += std::to_string(value) + " ";
  launches.back() = '\n';
}

void run_until_one_ends(unsigned& running) {
  const unsigned before = running;
  while (running == before && failure.empty() && !ready.empty()) {
    self = ready.begin()->second;
    ready.erase(ready.begin());
    threadIdx = self->index;
    blockIdx = self->block->index;
    Cluster& cluster = *self->block->cluster;
    self->fiber->take_turn();
    if (cluster.running == 0) --running;
  }
  self = nullptr;
}

void forget_the_grid() {  // threads that have not ended stay where they are, and their fibers begin anew
  ready.clear();
  idle.clear();
  for (const auto& fiber : fibers) {
    IF_TSAN(__tsan_switch_to_fiber(fiber->tsan(), 1); __tsan_release(&grid_ends);)
    become_machine();
    fiber->restart();
    idle.push_back(fiber.get());
  }
}

}  // namespace

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const unsigned size = cluster_size_of(config);
  if (const char* reason = reason_to_refuse(kernel, config, size))
    throw std::runtime_error(std::string("CUDA would refuse the launch: ") + reason);
  record(kernel, config, size);
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  dynamic_bytes = config.dynamicSmemBytes;
  shared_limit = static_cast<size_t>(std::max(DEFAULT_SHARED_LIMIT, device.shared_per_block));
  body = &thread;
  failure.clear();
  random_numbers.seed(static_cast<unsigned>(order));
  IF_TSAN(scheduler.tsan = __tsan_get_current_fiber(); __tsan_release(&grid_begins);)

  std::vector<unsigned> first_blocks(gridDim.x * gridDim.y * gridDim.z / size);
  for (unsigned i = 0; i < first_blocks.size(); ++i) first_blocks[i] = i * size;
  if (order == 1) std::reverse(first_blocks.begin(), first_blocks.end());
  if (order > 1) std::shuffle(first_blocks.begin(), first_blocks.end(), random_numbers);

  // Memory that were freed before the grid ends, and used again, would look like a race to ThreadSanitizer.
  std::vector<std::unique_ptr<Cluster>> clusters;
  unsigned at_a_time = 1 + static_cast<unsigned>(order) % 3;
  IF_TSAN(at_a_time = 1;)  // it has memory for about 4000 fibers
  unsigned running = 0;
  do {
    for (; running < at_a_time && clusters.size() < first_blocks.size(); ++running)
      clusters.push_back(begin_cluster(first_blocks[clusters.size()], size));
    if (ready.empty()) failure = describe_waiting(clusters);
    if (failure.empty()) run_until_one_ends(running);
  } while (failure.empty() && (running > 0 || clusters.size() < first_blocks.size()));

  if (!failure.empty()) forget_the_grid();
  IF_TSAN(__tsan_acquire(&grid_ends);)
  if (failure.empty()) return cudaSuccess;
  throw std::runtime_error(failure);
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > device.shared_per_block) return cudaErrorInvalidValue;
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t count_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t& config) {
  if (reason_to_refuse(kernel, config, cluster_size_of(config)) != nullptr) return cudaErrorClusterOutOfResources;
  *clusters = 1;
  return cudaSuccess;
}

// --- what a thread calls ---------------------------------------------------------------------------------------------

// An exception must not pass from one stack to another: the scheduler throws it.
void fail(const char* what, int line) {
  become_machine();
  failure = what;
  if (line > 0) failure += ", line " + std::to_string(line);
  const uint3 block = self->block->index;
  failure += " (block " + std::to_string(block.x) + ", " + std::to_string(block.y) + ", thread " +
             std::to_string(self->index.x) + ")";
  for (;;) self->fiber->give_way();
}

unsigned rank_in_warp() { return self->rank % 32; }
unsigned rank_in_cluster() { return self->block->rank; }
unsigned blocks_in_cluster() { return static_cast<unsigned>(self->block->cluster->blocks.size()); }

void sync_block(int line) {
  const InMachine in_machine;
  Barrier& barrier = self->block->barrier;
  wait(barrier, arrive(barrier, line));
}

void sync_warp(unsigned mask, int line) {
  const InMachine in_machine;
  Barrier& barrier = warp_of(mask, line).barrier;
  wait(barrier, arrive(barrier, line));
}

uint64_t exchange(unsigned mask, uint64_t bits, unsigned lane, int line) {
  const InMachine in_machine;
  if (lane >= 32 || !(mask >> lane & 1)) fail("the mask does not name the lane that is read", line);
  Warp& warp = warp_of(mask, line);
  auto& values = warp.values[warp.exchanges[rank_in_warp()]++ % 2];
  values[rank_in_warp()] = bits;
  wait(warp.barrier, arrive(warp.barrier, line, false), false);  // an exchange orders no accesses to memory
  return values[lane];
}

// The variable of a block, made where the block has none yet. It is NaN for each thread that asks for it.
static char* variable_of(Block& block, const void* key, size_t bytes, int line) {
  const auto same = [&](const Variable& variable) { return variable.key == key; };
  auto found = std::find_if(block.variables.begin(), block.variables.end(), same);
  if (found == block.variables.end()) {
    size_t sum = bytes;
    for (const Variable& variable : block.variables) sum += variable.bytes;
    if (sum > shared_limit) fail("the variables do not fit the shared memory of a block", line);
    found = block.variables.emplace(found, key, bytes);
  }
  acquire(*found->memory);
  return found->data();
}

void* shared_variable(const void* key, size_t bytes, int line) {
  const InMachine in_machine;
  return variable_of(*self->block, key, bytes, line);
}

void* dynamic_shared_memory() {
  static const char key = 0;
  return shared_variable(&key, dynamic_bytes, 0);
}

void* map_shared_rank(const void* address, unsigned rank, int line) {
  const InMachine in_machine;
  if (rank >= blocks_in_cluster()) fail("the cluster has no such block", line);
  Block& other = self->block->cluster->blocks[rank];
  if (!other.has_begun) fail("the shared memory of a block that has not begun", line);
  if (other.running == 0) fail("the shared memory of a block that has ended", line);
  for (const Variable& variable : self->block->variables) {
    const auto offset = static_cast<const char*>(address) - variable.data();
    if (offset >= 0 && static_cast<size_t>(offset) < variable.bytes)
      return variable_of(other, variable.key, variable.bytes, line) + offset;
  }
  fail("not an address in shared memory", line);
}

void arrive_at_cluster(int line) {
  const InMachine in_machine;
  if (self->cluster_phase != 0) fail("a thread arrives at the cluster's barrier twice", line);
  Barrier& barrier = self->block->cluster->barrier;
  self->cluster_phase = arrive(barrier, line) + 1;
  if (barrier.arrived == barrier.expected) let_pass(barrier);
}

void wait_for_cluster(int line) {
  const InMachine in_machine;
  if (self->cluster_phase == 0) fail("a thread waits at the cluster's barrier without having arrived", line);
  wait(self->block->cluster->barrier, self->cluster_phase - 1);
  self->cluster_phase = 0;
}

void begin_copy(const Copy& copy, int line) {
  const InMachine in_machine;
  const auto addresses = reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from);
  if (copy.size != 4 && copy.size != 8 && copy.size != 16) fail("an asynchronous copy has 4, 8 or 16 bytes", line);
  if (addresses % copy.size != 0) fail("an asynchronous copy is not aligned", line);
  self->copies.push_back({copy, self->groups});
}

void commit_copies() { ++self->groups; }

bool next_copy(size_t groups_left, Copy& copy) {
  const InMachine in_machine;
  auto& copies = self->copies;
  if (copies.empty() || copies.front().group + groups_left >= self->groups) return false;
  copy = copies.front().copy;
  copies.erase(copies.begin());
  return true;
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = device.shared_per_block, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = device.shared_per_multiprocessor, cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return *value = device.shared_reserved, cudaSuccess;
    case cudaDevAttrClusterLaunch:
      return *value = device.has_clusters, cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

// --- libtorch's functions for CUDA, and the assertions of kernels ----------------------------------------------------

#define EXPORTED extern "C" __attribute__((visibility("default")))

static const void* elsewhere;  // the memory of the tensor that is said to be on another device

EXPORTED AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }
EXPORTED AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  return *index = data == elsewhere && data != nullptr ? 0 : -1, 0;  // the two indices that a CPU may have
}
EXPORTED AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) { return *guard = nullptr, 0; }
EXPORTED AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
EXPORTED AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char* function, uint32_t line, bool,
                                                 char** message) {
  const std::string text =
      "CUDA error " + std::to_string(error) + " in " + function + ", line " + std::to_string(line);
  if (error != 0) *message = strdup(text.c_str());
  return 0;
}
EXPORTED void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }
extern "C" __attribute__((visibility("hidden"))) void __assert_fail(const char* assertion, const char*, unsigned line,
                                                                    const char*) noexcept {
  emulator::fail(assertion, static_cast<int>(line));
}

// --- what checks.py calls --------------------------------------------------------------------------------------------

EXPORTED void emulator_set_order(int number) { order = number; }

EXPORTED void emulator_set_device(int shared_per_block, int shared_per_multiprocessor, int reserved, int has_clusters) {
  device = {shared_per_block, shared_per_multiprocessor, reserved, has_clusters};
}

EXPORTED void emulator_set_elsewhere(const void* data) { elsewhere = data; }

// The launches since the last call, a line for each: the kernel's address in the library, the grid's width and height,
// the threads of a block, the blocks of a cluster, and the bytes of dynamic shared memory.
EXPORTED const char* emulator_launches() {
  static std::string taken;
  taken.clear();
  taken.swap(launches);
  return taken.c_str();
}
