// Kernels that do what CUDA forbids, or read too early. tests/test_cuda_emulated.py says what the emulator has to answer.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace {

alignas(16) const float numbers[8] = {1, 2, 3, 4, 5, 6, 7, 8};
std::string read;  // what reads_too_early has read

__global__ void two_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffle_without_a_lane() {
  if (threadIdx.x != 5) __shfl_xor_sync(~0u, 1.0f, 16);
}

__global__ void wait_without_arriving() { cooperative_groups::this_cluster().barrier_wait(); }

__global__ void remote_write_before_all_have_begun() {
  __shared__ float value;
  const auto cluster = cooperative_groups::this_cluster();
  *cluster.map_shared_rank(&value, cluster.block_rank() == 0 ? 1 : 0) = 1.0f;
}

__global__ void write_past_the_end() {
  __shared__ float values[31];
  values[threadIdx.x] = 1.0f;
}

__global__ void too_many_variables() {
  __shared__ float values[1 << 20];
  values[threadIdx.x] = 1.0f;
}

__global__ void copy_without_wait() {
  __shared__ uint4 value;
  __pipeline_memcpy_async(&value, numbers, 16);
  __pipeline_commit();
}

__global__ void misaligned_copy() {
  __shared__ uint4 value;
  __pipeline_memcpy_async(&value, numbers + 1, 16);
}

__global__ void nothing() {}

__global__ void reads_too_early() {
  __shared__ float values[8];
  const auto note = [&](int i) { read += std::isnan(values[i]) ? "nan " : std::to_string(int(values[i])) + " "; };
  for (int i : {0, 4}) {
    note(i);  // nothing has been written
    __pipeline_memcpy_async(&values[i], &numbers[i], 16);
    __pipeline_commit();
  }
  __pipeline_wait_prior(1);
  for (int i : {0, 4}) note(i);  // the second copy may still be on its way
  __pipeline_wait_prior(0);
  note(4);
}

void launch_cluster(void (*kernel)(), unsigned blocks, unsigned blocks_of_a_cluster) {
  cudaLaunchAttribute shape{cudaLaunchAttributeClusterDimension, {{blocks_of_a_cluster, 1, 1}}};
  const cudaLaunchConfig_t config{dim3(blocks), dim3(32), 0, nullptr, &shape, 1};
  cudaLaunchKernelEx(&config, kernel);
}

const struct {
  const char* name;
  void (*run)();
} CASES[] = {
    {"two barriers", [] { two_barriers<<<1, 64>>>(); }},
    {"shuffle without a lane", [] { shuffle_without_a_lane<<<1, 32>>>(); }},
    {"wait without arriving", [] { launch_cluster(wait_without_arriving, 2, 2); }},
    {"remote write before all have begun", [] { launch_cluster(remote_write_before_all_have_begun, 2, 2); }},
    {"write past the end", [] { write_past_the_end<<<1, 32>>>(); }},
    {"too many variables", [] { too_many_variables<<<1, 32>>>(); }},
    {"copy without wait", [] { copy_without_wait<<<1, 1>>>(); }},
    {"misaligned copy", [] { misaligned_copy<<<1, 1>>>(); }},
    {"too many threads", [] { nothing<<<1, 1056>>>(); }},
    {"no blocks", [] { nothing<<<0, 32>>>(); }},
    {"shared memory not asked for", [] { nothing<<<1, 32, 64 << 10>>>(); }},
    {"part of a cluster", [] { launch_cluster(nothing, 3, 2); }},
    {"reads too early", [] { reads_too_early<<<1, 1>>>(); }},
};

}  // namespace

// The emulator's error for a case, or what the kernel has read.
extern "C" __attribute__((visibility("default"))) const char* misuse(const char* name) {
  read.clear();
  for (const auto& misuse : CASES) {
    if (std::strcmp(misuse.name, name) != 0) continue;
    try {
      misuse.run();
    } catch (const std::runtime_error& error) {
      read = error.what();
    }
  }
  return read.c_str();
}
