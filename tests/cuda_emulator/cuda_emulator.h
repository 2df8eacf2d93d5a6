// The part of CUDA that csrc/*.cu use, for one process without a GPU: g++ compiles the kernels, and the CPU runs them.
//
// emulate.py rewrites what C++ cannot read (shared variables, <<<>>>, the dispatch key) and includes this file first.
// Everything else of a .cu file is compiled as it stands. emulator.cpp has the machine behind these names.
//
// Where CUDA leaves something open, the machine does what is worst for a kernel that relies on it: shared memory is NaN
// until it is written, an asynchronous copy is made as late as it may be, and between two barriers one thread runs
// after the other, in an order that the test chooses.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern uint3 threadIdx, blockIdx;  // of the thread whose turn it is
extern dim3 blockDim, gridDim;

using __nv_bfloat16 = torch::headeronly::BFloat16;
using __half = torch::headeronly::Half;
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline float __half2float(__half value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __expf(float x) { return exp2f(x * 1.44269504f); }  // a GPU rounds the product, too

// --- the runtime -----------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorClusterOutOfResources = 912 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = struct Stream*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes {
  int ptxVersion;
};

namespace emulator {

// Runs `thread` once for each thread of the grid. Throws where CUDA would refuse the launch, and where a thread does
// what the machine does not allow.
cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& thread);
cudaError_t allow_shared_memory(const void* kernel, int bytes);
cudaError_t count_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t& config);

// What a thread calls; `line` is the line of the kernel, for error messages.
[[noreturn]] void fail(const char* what, int line);
unsigned rank_in_warp();
void sync_block(int line);
void sync_warp(unsigned mask, int line);
uint64_t exchange(unsigned mask, uint64_t bits, unsigned lane, int line);
void* shared_variable(const void* key, size_t bytes, int line);
void* dynamic_shared_memory();
unsigned rank_in_cluster();
unsigned blocks_in_cluster();
void arrive_at_cluster(int line);
void wait_for_cluster(int line);
void* map_shared_rank(const void* address, unsigned rank, int line);

struct Copy {  // an asynchronous one, from global to shared memory
  void* to;
  const void* from;
  size_t size;
};
void begin_copy(const Copy& copy, int line);
void commit_copies();
bool next_copy(size_t groups_left, Copy& copy);  // false where none is left that a wait has to make

// `static Shared<T> name` stands for `__shared__ T name`: one object for each declaration, and for each instantiation of
// the template around it. here() is the variable of the block whose turn it is.
template <class T>
struct Shared {
  char key;
  T& here(int line = __builtin_LINE()) const { return *static_cast<T*>(shared_variable(&key, sizeof(T), line)); }
};

// `Grid{blocks, threads, bytes, stream}.of(kernel)(...)` stands for `kernel<<<blocks, threads, bytes, stream>>>(...)`.
struct Grid {
  cudaLaunchConfig_t config;

  Grid(dim3 blocks, dim3 threads, size_t bytes = 0, cudaStream_t stream = nullptr)
      : config{blocks, threads, bytes, stream, nullptr, 0} {}
  template <class... Parameters>
  auto of(void (*kernel)(Parameters...)) const {
    return [this, kernel](const auto&... arguments) {
      run(reinterpret_cast<const void*>(kernel), config, [&] { kernel(static_cast<Parameters>(arguments)...); });
    };
  }
};

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return ::emulator::run(reinterpret_cast<const void*>(kernel), *config,
                         [&] { kernel(static_cast<Parameters>(arguments)...); });
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // a launch that fails throws
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return attributes->ptxVersion = __CUDA_ARCH__ / 10, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  return ::emulator::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel kernel, const cudaLaunchConfig_t* config) {
  return ::emulator::count_clusters(clusters, reinterpret_cast<const void*>(kernel), *config);
}
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
extern "C" AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char* file, const char* function, uint32_t line,
                                                   bool device_assertions, char** message);
extern "C" void torch_c10_cuda_free_error_msg(char* message);

// --- what a thread calls ---------------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { ::emulator::sync_block(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { ::emulator::sync_warp(mask, line); }
[[noreturn]] inline void __trap(int line = __builtin_LINE()) { ::emulator::fail("__trap()", line); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ::emulator::exchange(mask, bits, ::emulator::rank_in_warp() ^ static_cast<unsigned>(offset), line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, int line = __builtin_LINE()) {
  ::emulator::begin_copy({to, from, size}, line);
}
inline void __pipeline_commit() { ::emulator::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups_left) {
  // The copies are made here, not in emulator.cpp, so that the sanitizers see them as accesses of this thread.
  for (::emulator::Copy copy; ::emulator::next_copy(groups_left, copy);) std::memcpy(copy.to, copy.from, copy.size);
}

namespace cooperative_groups {

struct cluster_group {
  static unsigned block_rank() { return ::emulator::rank_in_cluster(); }
  static unsigned num_blocks() { return ::emulator::blocks_in_cluster(); }
  static void barrier_arrive(int line = __builtin_LINE()) { ::emulator::arrive_at_cluster(line); }
  static void barrier_wait(int line = __builtin_LINE()) { ::emulator::wait_for_cluster(line); }
  static void sync(int line = __builtin_LINE()) {
    ::emulator::arrive_at_cluster(line);
    ::emulator::wait_for_cluster(line);
  }
  template <class T>
  static T* map_shared_rank(T* address, int rank, int line = __builtin_LINE()) {
    return static_cast<T*>(::emulator::map_shared_rank(address, static_cast<unsigned>(rank), line));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
