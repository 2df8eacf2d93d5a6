// How many threads and blocks compute a row of cross_entropy.cu, and what the device allows of that.
//
// A plan says it for calls of one kind. set() replaces the plans of a device, which a table of measured ones may name;
// where none fits a call, default_plan() of cross_entropy.cu chooses. Plans differ in the order of additions alone.
//
// What the CUDA runtime says of a device and of a kernel is asked for once, because the questions take longer than the
// launch.
#pragma once

#include "device.cuh"

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace fastgpt {
namespace {

constexpr int64_t STATIC_BYTES = 1024;  // more than the arrays of `reduce` and `join` take of the shared memory
constexpr int LARGEST_CLUSTER = 8;      // the largest that every chip with clusters takes

// The row is kept in the shared memories of `blocks` blocks, which are a cluster where they are more than one. With 0,
// one block computes it and keeps it nowhere. With 32 threads, it is in their registers.
struct Plan {
  int threads, blocks;

  bool in_registers() const { return threads == 32; }
  // The shared memory of a block, for rows of at most so many bytes.
  int64_t shared_bytes(int64_t row_bytes) const {
    if (in_registers() || blocks == 0) return 0;
    const int64_t vectors = (row_bytes + 15) / 16;
    return (vectors + blocks - 1) / blocks * 16;
  }
};

// The configuration of a launch of `rows` rows.
struct Launch {
  cudaLaunchAttribute shape{};
  cudaLaunchConfig_t config{};

  Launch(Plan plan, int64_t rows, int64_t row_bytes, cudaStream_t stream = nullptr) {
    const int blocks = std::max(plan.blocks, 1);
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim.x = static_cast<unsigned>(blocks);
    shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(rows * blocks));
    config.blockDim = dim3(static_cast<unsigned>(plan.threads));
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes(row_bytes));
    config.stream = stream;
    config.attrs = &shape;
    config.numAttrs = blocks > 1;
  }
  Launch(const Launch&) = delete;  // config points to shape
};

// Calls with values of so many bytes, a row of at most so many classes and more than half of that, and one pass over it
// or (2) more than one.
struct PlannedCalls {
  int64_t element_size, passes, most_classes;
  Plan plan;

  static constexpr size_t NUMBERS = 5;
  std::string text() const {
    std::string result = "(";
    for (const int64_t number : {element_size, passes, most_classes, int64_t{plan.threads}, int64_t{plan.blocks}})
      result += (result.size() > 1 ? ", " : "") + std::to_string(number);
    return result + ")";
  }
};

class PlanDevice {
 public:
  // The current one of the thread.
  static PlanDevice& current() {
    static std::mutex guard;
    static std::map<int, PlanDevice> devices;
    int device = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    const std::lock_guard<std::mutex> lock(guard);
    return devices.try_emplace(device, device).first->second;
  }

  explicit PlanDevice(int device)
      : of_block(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - STATIC_BYTES),
        of_half(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) / 2 -
                attribute(cudaDevAttrReservedSharedMemoryPerBlock, device) - STATIC_BYTES),
        has_clusters(attribute(cudaDevAttrClusterLaunch, device) != 0) {}

  // The shared memory that a block may have, alone and where a multiprocessor has room for two such blocks.
  const int64_t of_block, of_half;

  // Lets the kernel have as much shared memory as a block may have.
  void prepare(const void* kernel) {
    const std::lock_guard<std::mutex> lock(guard_);
    if (!prepared_.insert(kernel).second) return;
    const auto bytes = static_cast<int>(of_block);
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }

  // Whether such clusters can run. The chip must have clusters, the kernel's code must be compiled for a chip that has
  // them (not for sm_80, and then translated for this chip), and the chip must have room for one.
  bool can_cluster(const void* kernel, Plan plan, int64_t row_bytes) {
    prepare(kernel);
    const std::lock_guard<std::mutex> lock(guard_);
    const auto [known, is_new] = can_cluster_.try_emplace({kernel, plan.blocks, plan.shared_bytes(row_bytes)}, false);
    if (is_new) known->second = ask_for_clusters(kernel, plan, row_bytes);
    return known->second;
  }

  void set(std::vector<PlannedCalls> calls) {
    const std::lock_guard<std::mutex> lock(guard_);
    planned_ = std::move(calls);
  }

  // The first plan that was set for such a call, if any.
  std::optional<Plan> planned(int64_t element_size, int64_t passes, int64_t classes) {
    const std::lock_guard<std::mutex> lock(guard_);
    for (const PlannedCalls& calls : planned_)
      if (calls.element_size == element_size && calls.passes == passes && classes <= calls.most_classes &&
          2 * classes > calls.most_classes)
        return calls.plan;
    return std::nullopt;
  }

 private:
  static int64_t attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  }

  bool ask_for_clusters(const void* kernel, Plan plan, int64_t row_bytes) const {
    cudaFuncAttributes code{};
    STD_CUDA_CHECK(cudaFuncGetAttributes(&code, kernel));
    if (!has_clusters || code.ptxVersion < 90) return false;
    int clusters = 0;
    const Launch one_row(plan, 1, row_bytes);
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &one_row.config) == cudaSuccess) return clusters > 0;
    cudaGetLastError();  // clears the error, which the next check would report otherwise
    return false;
  }

  const bool has_clusters;
  std::mutex guard_;  // of everything below
  std::set<const void*> prepared_;
  std::map<std::tuple<const void*, int, int64_t>, bool> can_cluster_;
  std::vector<PlannedCalls> planned_;
};

}  // namespace
}  // namespace fastgpt
