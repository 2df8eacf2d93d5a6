// Cross-entropy on the GPU: the loss, and the logits' gradient, from one read and one write of main memory.
// cross_entropy_rows.h has the formulas.
//
// What is fused: the maximum and the sum of exp of a row, computed in one pass by the online softmax (Milakov and
// Gimelshein 2018), the loss and the gradient. The gradient needs the maximum and the sum of the whole row. Between the
// two passes, a row is kept where it fits:
//
//     IN_REGISTERS        a short row, in one block of 32 threads: each thread keeps a vector of 16 bytes
//     IN_SHARED_MEMORY    a long row, in the shared memory of one block
//     IN_CLUSTER          a longer row, from sm_90 on, in the shared memories of a cluster of up to eight blocks, each
//                         with a part of the row: up to 1.8 MB on an H100
//     NOWHERE             a row that is longer still is read twice, the second time from the L2 cache where that has
//                         room for it; a row that needs one pass only is not kept either
//
// A thread reads from shared memory only values of the row that it has written itself, so this needs no barrier. The
// blocks of a cluster exchange three numbers, the maximum, the sum of exp and the smoothing term, by writing them to
// each other's shared memory. Keeping eight vectors in the registers of each thread was tried first, and registers
// spilled.
//
// A row may start at any multiple of 2 or 4 bytes, because rows may have any length. Its values before the first
// multiple of 16 bytes, and after the last one, are computed one by one.
#include "device.cuh"

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace fastgpt {
namespace {

// The arguments of cross_entropy_kernel.
struct Rows {
  const void* logits;  // (rows, classes)
  void* gradient;      // (rows, classes), contiguous, or null; may be the logits
  int64_t logits_stride, classes;
  const int64_t* targets;
  int64_t ignore_index;
  const float* class_weight;      // (classes), or null for 1
  const float* class_weight_sum;  // null where class_weight is; then the sum is `classes`
  float label_smoothing;
  const float* row_scale;  // d(result) / d(loss of the row), or null for 1
  int64_t row_scale_stride;
  const float* denominator;  // divides row_scale; or null for 1
  float* loss;               // (rows), or null
  // (rows, 2): the maximum, and the log of the sum of exp(x - maximum). Where the known ones are not null, they are
  // read. Else they are computed, and written to `statistics` unless that is null.
  const float* known_statistics;
  float* statistics;
};

// The maximum of some values, and the sum of exp(value - max) over them.
struct Online {
  float max, sum;
};

__device__ __forceinline__ void merge(Online& a, Online b) {
  const float larger = fmaxf(a.max, b.max);
  const float base = larger == -INFINITY ? 0.0f : larger;  // exp(-inf - -inf) would be NaN
  a.sum = a.sum * __expf(a.max - base) + b.sum * __expf(b.max - base);
  a.max = larger;
}

__device__ __forceinline__ void merge(float& a, float b) { a += b; }

__device__ __forceinline__ float of_lane(float own, int offset) { return __shfl_xor_sync(~0u, own, offset); }

__device__ __forceinline__ Online of_lane(Online own, int offset) {
  return {of_lane(own.max, offset), of_lane(own.sum, offset)};
}

// The blocks of a row, where one block has the whole row.
struct OneBlock {
  __device__ static constexpr unsigned rank() { return 0; }
  __device__ static constexpr unsigned size() { return 1; }
  __device__ static void arrive() {}
  __device__ static void wait() {}
  template <class Part>
  __device__ static Part join(Part own) {
    return own;
  }
};

constexpr unsigned LARGEST_CLUSTER = 8;  // the largest that every chip with clusters takes

// The blocks of a row, where they are a cluster. Every block of the cluster calls these functions, in the same order.
#if __CUDA_ARCH__ >= 900
struct Cluster {
  cooperative_groups::cluster_group blocks = cooperative_groups::this_cluster();

  __device__ unsigned rank() const { return blocks.block_rank(); }
  __device__ unsigned size() const { return blocks.num_blocks(); }

  // After wait(), all blocks of the cluster have begun to run. Before that, the shared memory of another block must not
  // be written to.
  __device__ void arrive() const { blocks.barrier_arrive(); }
  __device__ void wait() const { blocks.barrier_wait(); }

  // Merges the values of the blocks to the value of the row. `own` is the block's value, the same in all of its
  // threads. Each type has one array, so this is called at most once for each type. Blocks write to each other's memory
  // before the barrier and read only their own after it, so a block may end while others still read.
  template <class Part>
  __device__ Part join(Part own) const {
    __shared__ Part parts[LARGEST_CLUSTER];
    if (threadIdx.x < size()) *blocks.map_shared_rank(&parts[rank()], static_cast<int>(threadIdx.x)) = own;
    blocks.sync();
    own = parts[0];
    for (unsigned block = 1; block < size(); ++block) merge(own, parts[block]);
    return own;
  }
};
#else
struct Cluster : OneBlock {
  __device__ Cluster() { __trap(); }  // never runs, because can_cluster() allows no such launch
};
#endif

// Merges the values of the threads to the value of the row, which every thread gets: first those of the lanes, then of
// the warps, then of the blocks, always in the same order.
template <int THREADS, class Blocks, class Part>
__device__ Part reduce(const Blocks& blocks, Part own) {
  for (int offset = 16; offset > 0; offset /= 2) merge(own, of_lane(own, offset));
  if constexpr (THREADS > 32) {
    __shared__ Part warps[THREADS / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    own = warps[0];
    for (int warp = 1; warp < THREADS / 32; ++warp) merge(own, warps[warp]);
  }
  return blocks.join(own);
}

// Where a row is kept between two passes: see the top of this file.
enum Held { IN_REGISTERS, IN_SHARED_MEMORY, IN_CLUSTER, NOWHERE };

constexpr int BLOCK = 512;  // threads of a block, except IN_REGISTERS, where it has 32

template <class T, int THREADS, Held HELD>
__global__ void __launch_bounds__(THREADS, THREADS == BLOCK ? 2 : 16) cross_entropy_kernel(const Rows a) {
  constexpr int SIZE = Vec16<T>::SIZE;
  const std::conditional_t<HELD == IN_CLUSTER, Cluster, OneBlock> blocks;
  const int64_t row = blockIdx.x / blocks.size(), n = a.classes;
  const T* x = static_cast<const T*>(a.logits) + row * a.logits_stride;
  T* out = a.gradient ? static_cast<T*>(a.gradient) + row * n : nullptr;
  const int64_t target = a.targets[row];
  const int tid = threadIdx.x;
  const bool first = tid == 0 && blocks.rank() == 0;  // writes the values of which a row has one
  const int64_t row_tid = blocks.rank() * THREADS + tid, row_threads = blocks.size() * THREADS;

  if (target == a.ignore_index) {
    if (first && a.loss) a.loss[row] = 0.0f;
    if (row_tid < 2 && a.statistics) a.statistics[2 * row + row_tid] = 0.0f;
    if (out)
      for (int64_t i = row_tid; i < n; i += row_threads) out[i] = from_float<T>(0.0f);
    return;
  }
  assert(target >= 0 && target < n && "target out of range");

  // The values [0, head) are computed one by one, then vectors of them, then [end, n) one by one. Where the gradient is
  // not aligned like the logits, all values are computed one by one.
  const bool together = out == nullptr || (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const int64_t head = together ? min(values_before_alignment(x), n) : n;
  const int64_t vectors = (n - head) / SIZE;
  const int64_t end = head + vectors * SIZE;
  const auto odd = [&](const auto& visit) {  // visits this thread's values outside the vectors
    for (int64_t i = row_tid; i < head; i += row_threads) visit(i);
    for (int64_t i = end + row_tid; i < n; i += row_threads) visit(i);
  };

  using Index = std::conditional_t<HELD == NOWHERE, int64_t, int>;  // an int counts the vectors of a kept row
  const int64_t part = (vectors + blocks.size() - 1) / blocks.size(), before = min(blocks.rank() * part, vectors);
  const int64_t origin = head + before * SIZE;                        // where the vectors of this block begin
  const auto mine = static_cast<Index>(min(part, vectors - before));  // how many they are, perhaps none
  extern __shared__ uint4 shared[];
  auto* held = reinterpret_cast<Vec16<T>*>(shared);
  Vec16<T> own_vector;
  blocks.arrive();
  if constexpr (HELD == IN_REGISTERS) {
    if (tid < mine) own_vector = load16(x + origin + tid * SIZE);
  } else if constexpr (HELD != NOWHERE) {
#pragma unroll 4
    for (Index v = tid; v < mine; v += THREADS)
      __pipeline_memcpy_async(&held[v], x + origin + v * SIZE, sizeof(Vec16<T>));  // bypasses registers
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
  blocks.wait();
  // Calls visit(i, v) for each vector v of this thread; i is the place in the row where v begins.
  const auto each_vector = [&](const auto& visit) {
    if constexpr (HELD == IN_REGISTERS) {
      if (tid < mine) visit(origin + tid * SIZE, own_vector);
    } else {
      for (Index v = tid; v < mine; v += THREADS)
        visit(origin + v * SIZE, HELD == NOWHERE ? load16(x + origin + v * SIZE) : held[v]);
    }
  };

  const float x_target = to_float(x[target]);
  Online own{-INFINITY, 0.0f};
  float log_sum;
  if (a.known_statistics) {
    own.max = a.known_statistics[2 * row];
    log_sum = a.known_statistics[2 * row + 1];
  } else {
    each_vector([&](int64_t, const Vec16<T>& v) {
      float largest = to_float(v.values[0]);
#pragma unroll
      for (int j = 1; j < SIZE; ++j) largest = fmaxf(largest, to_float(v.values[j]));
      const float base = largest == -INFINITY ? 0.0f : largest;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < SIZE; ++j) sum += __expf(to_float(v.values[j]) - base);
      merge(own, {largest, sum});
    });
    odd([&](int64_t i) {
      // exp(value - value) is 1, but NaN for NaN and for +inf, as it should be. It would be NaN for -inf, which adds 0.
      const float value = to_float(x[i]);
      merge(own, {value, value == -INFINITY ? 0.0f : __expf(value - value)});
    });
    own = reduce<THREADS>(blocks, own);
    log_sum = own.max == -INFINITY ? NAN : logf(own.sum);
    if (first && a.statistics) {
      a.statistics[2 * row] = own.max;
      a.statistics[2 * row + 1] = log_sum;
    }
  }
  const float max = own.max;
  const float smooth_each = a.label_smoothing / static_cast<float>(n);
  const float weight = (1.0f - a.label_smoothing) * (a.class_weight ? a.class_weight[target] : 1.0f);
  const float log_p = (x_target - max) - log_sum;

  if (a.loss) {
    float smoothing = 0.0f;
    if (a.label_smoothing > 0.0f) {
      const auto term = [&](float value, int64_t i) {
        smoothing += (log_sum - (value - max)) * (a.class_weight ? a.class_weight[i] : 1.0f);
      };
      each_vector([&](int64_t i, const Vec16<T>& vec) {
#pragma unroll
        for (int j = 0; j < SIZE; ++j) term(to_float(vec.values[j]), i + j);
      });
      odd([&](int64_t i) { term(to_float(x[i]), i); });
      smoothing = reduce<THREADS>(blocks, smoothing) * smooth_each;
    }
    if (first) a.loss[row] = smoothing - weight * log_p;
  }
  if (out == nullptr) return;

  // The gradient may overwrite the logits, so that all threads must have read x[target] before. Where there are more
  // threads than 32, a barrier of `reduce` has ensured that.
  if constexpr (THREADS == 32) __syncwarp();
  float g = a.row_scale ? a.row_scale[row * a.row_scale_stride] : 1.0f;
  if (a.denominator) g /= *a.denominator;
  const float weights = a.class_weight_sum ? *a.class_weight_sum : static_cast<float>(n);
  const float scale = g * (a.label_smoothing > 0.0f ? weight + smooth_each * weights : weight);
  const float smooth = g * smooth_each;
  const auto gradient = [&](float value, int64_t i) {
    float d = __expf((value - max) - log_sum) * scale;
    if (a.label_smoothing > 0.0f) d -= smooth * (a.class_weight ? a.class_weight[i] : 1.0f);
    if (i == target) d -= g * weight;
    return from_float<T>(d);
  };
  each_vector([&](int64_t i, const Vec16<T>& vec) {
    Vec16<T> result;
#pragma unroll
    for (int j = 0; j < SIZE; ++j) result.values[j] = gradient(to_float(vec.values[j]), i + j);
    store16(out + i, result);
  });
  odd([&](int64_t i) { out[i] = gradient(to_float(x[i]), i); });
}

// The weight of each row in the mean. A target out of range fails here, before memory is read at the place it names.
__global__ void row_weights_kernel(const int64_t* targets, const float* class_weight, float* weights, int64_t n,
                                   int64_t classes, int64_t ignore_index) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n) return;
  const int64_t target = targets[row];
  const bool counted = target != ignore_index;
  assert((!counted || (target >= 0 && target < classes)) && "target out of range");
  weights[row] = !counted ? 0.0f : class_weight ? class_weight[target] : 1.0f;
}

// The mean, from the sum of the losses; NaN where the weights add up to 0, as in PyTorch.
__global__ void divide_kernel(float* loss, const float* denominator) {
  *loss = *denominator == 0.0f ? NAN : *loss / *denominator;
}

// gradient *= scale. Where scale is 1, which only the device knows, the gradient is neither read nor written. Zeros
// stay zeros whatever the scale is, because those of ignored rows have to.
template <class T>
__global__ void __launch_bounds__(256) scale_kernel(T* gradient, const float* scale, int64_t n) {
  const float factor = *scale;
  if (factor == 1.0f) return;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * 256, first = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t head = min(values_before_alignment(gradient), n);
  const int64_t vectors = (n - head) / Vec16<T>::SIZE, in_vectors = vectors * Vec16<T>::SIZE;
  for (int64_t v = first; v < vectors; v += stride) {
    Vec16<T> vec = load16(gradient + head + v * Vec16<T>::SIZE);
#pragma unroll
    for (int j = 0; j < Vec16<T>::SIZE; ++j) {
      const float value = to_float(vec.values[j]);
      vec.values[j] = value == 0.0f ? vec.values[j] : from_float<T>(value * factor);
    }
    store16(gradient + head + v * Vec16<T>::SIZE, vec);
  }
  for (int64_t odd = first; odd < n - in_vectors; odd += stride) {
    T& at = gradient[odd < head ? odd : odd + in_vectors];
    const float value = to_float(at);
    if (value != 0.0f) at = from_float<T>(value * factor);
  }
}

int64_t attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

constexpr int64_t STATIC_BYTES = 1024;  // more than the arrays of `reduce` and `join` take of the shared memory

using Kernel = void (*)(Rows);

// The configuration of a launch: `blocks` blocks for each row, which are a cluster where they are more than one, and
// `bytes` of shared memory for each block.
struct Launch {
  cudaLaunchAttribute shape{};
  cudaLaunchConfig_t config{};

  Launch(int64_t rows, unsigned blocks, int64_t bytes, cudaStream_t stream) {
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim.x = blocks;
    shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(rows * blocks));
    config.blockDim = dim3(BLOCK);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    config.attrs = &shape;
    config.numAttrs = blocks > 1;
  }
  Launch(const Launch&) = delete;  // config points to shape
};

// Whether these clusters can run. The chip must have clusters, the kernel's code must be compiled for a chip that has
// them (not for sm_80, and then translated for this chip), and the chip must have room for a cluster of so many blocks
// with so much shared memory.
bool can_cluster(Kernel kernel, const Launch& grid) {
  cudaFuncAttributes code{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&code, kernel));
  if (attribute(cudaDevAttrClusterLaunch) == 0 || code.ptxVersion < 90) return false;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &grid.config) == cudaSuccess) return clusters > 0;
  cudaGetLastError();  // clears the error, which the next check would report otherwise
  return false;
}

// The kernel for rows that so many blocks keep in their shared memories; 0 is for rows that are kept nowhere.
template <class T>
Kernel kernel_for(unsigned blocks_of_a_row) {
  switch (blocks_of_a_row) {
    case 0:
      return cross_entropy_kernel<T, BLOCK, NOWHERE>;
    case 1:
      return cross_entropy_kernel<T, BLOCK, IN_SHARED_MEMORY>;
    default:
      return cross_entropy_kernel<T, BLOCK, IN_CLUSTER>;
  }
}

int64_t bytes_of_part(int64_t vectors, unsigned blocks) { return (vectors + blocks - 1) / blocks * 16; }

// How many blocks keep a row of so many vectors in their shared memories: the fewest such that a multiprocessor has
// room for two of these blocks, so that one of them computes, or waits for its cluster, while the other one moves
// memory. Where eight blocks are too few for that, the fewest such that a multiprocessor has room for one block.
// The result is 0 where eight are too few even for that. This choice was not timed.
template <class T>
unsigned blocks_to_hold(int64_t vectors, int64_t rows) {
  const int64_t one = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - STATIC_BYTES;
  const int64_t two = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 -
                      attribute(cudaDevAttrReservedSharedMemoryPerBlock) - STATIC_BYTES;
  for (const int64_t limit : {two, one}) {
    for (unsigned blocks = 1; blocks <= LARGEST_CLUSTER; blocks *= 2) {
      const int64_t bytes = bytes_of_part(vectors, blocks);
      if (bytes > limit || rows * blocks >= int64_t{1} << 31) continue;
      const Kernel kernel = kernel_for<T>(blocks);
      const auto allowed = static_cast<int>(one);
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed));
      if (blocks == 1 || can_cluster(kernel, Launch(rows, blocks, bytes, nullptr))) return blocks;
    }
  }
  return 0;
}

template <class T>
void launch(const Rows& rows, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const int64_t vectors = (rows.classes + Vec16<T>::SIZE - 1) / Vec16<T>::SIZE;
  if (vectors <= 32) {
    cross_entropy_kernel<T, 32, IN_REGISTERS><<<static_cast<unsigned>(n), 32, 0, stream>>>(rows);
  } else {
    const bool smooths = rows.loss && rows.label_smoothing > 0.0f;
    const int passes = (rows.known_statistics ? 0 : 1) + (smooths ? 1 : 0) + (rows.gradient ? 1 : 0);
    const unsigned blocks = passes > 1 ? blocks_to_hold<T>(vectors, n) : 0;
    const Launch grid(n, std::max(blocks, 1u), blocks == 0 ? 0 : bytes_of_part(vectors, blocks), stream);
    STD_CUDA_CHECK(cudaLaunchKernelEx(&grid.config, kernel_for<T>(blocks), rows));
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The rows of a call in the form that the kernel takes, and the tensors that they point into.
struct Call {
  Tensor logits, targets;
  std::optional<Tensor> weight, weight_sum, denominator;
  Rows rows{};
  int64_t n;
  cudaStream_t stream;

  Call(const Tensor& given_logits, const Tensor& given_targets, const std::optional<Tensor>& given_weight,
       int64_t ignore_index, double label_smoothing)
      : logits(given_logits), targets(torch::stable::contiguous(given_targets)), stream(current_stream(given_logits)) {
    STD_TORCH_CHECK(logits.dim() == 2 && targets.dim() == 1 && targets.size(0) == logits.size(0) && logits.size(1) > 0,
                    "logits: expected (N, C), at least one class, with targets (N,)");
    STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long, "targets: expected int64");
    n = logits.size(0);
    STD_TORCH_CHECK(n < (int64_t{1} << 31), "logits: expected fewer than 2^31 rows");
    rows.classes = logits.size(1);
    if (rows.classes > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
    rows.logits = logits.const_data_ptr();
    rows.logits_stride = logits.stride(0);
    rows.targets = targets.const_data_ptr<int64_t>();
    rows.ignore_index = ignore_index;
    rows.label_smoothing = static_cast<float>(label_smoothing);
    if (given_weight.has_value()) {
      weight = torch::stable::contiguous(*given_weight);
      STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float && weight->dim() == 1 && weight->size(0) == rows.classes,
                      "weight: expected float32 (C,)");
      weight_sum = torch::stable::sum(*weight);
      rows.class_weight = weight->const_data_ptr<float>();
      rows.class_weight_sum = weight_sum->const_data_ptr<float>();
    }
  }

  // For the reduction "mean": the denominator is the sum of the weights of the rows.
  void divide_by_weights() {
    Tensor weights = torch::stable::new_empty(logits, {n}, ScalarType::Float);
    if (n > 0) {
      row_weights_kernel<<<static_cast<unsigned>((n + 255) / 256), 256, 0, stream>>>(
          rows.targets, rows.class_weight, weights.mutable_data_ptr<float>(), n, rows.classes, rows.ignore_index);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    denominator = torch::stable::sum(weights);
    rows.denominator = denominator->const_data_ptr<float>();
  }

  void run() const {
    by_type(logits, "logits", [&](auto* type) { launch<std::remove_pointer_t<decltype(type)>>(rows, n, stream); });
  }
};

constexpr int64_t NONE = 0, MEAN = 1;  // the numbers that PyTorch gives the reductions

}  // namespace

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets,
                                         const std::optional<Tensor>& weight, int64_t ignore_index, int64_t reduction,
                                         double label_smoothing, bool with_grad) {
  const auto guard = guard_device({"logits", logits}, {{"targets", targets}, {"weight", weight}});
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0, 1 or 2");
  STD_TORCH_CHECK(!with_grad || reduction != NONE, "with_grad: a gradient for each loss comes from backward alone");
  Call call(logits, targets, weight, ignore_index, label_smoothing);
  Tensor losses = torch::stable::new_empty(logits, {call.n}, ScalarType::Float);
  Tensor saved = with_grad ? torch::stable::new_empty(logits, {call.n, call.rows.classes})
                           : torch::stable::new_empty(logits, {call.n, 2}, ScalarType::Float);
  call.rows.loss = losses.mutable_data_ptr<float>();
  if (with_grad) {
    call.rows.gradient = saved.mutable_data_ptr();
  } else {
    call.rows.statistics = saved.mutable_data_ptr<float>();
  }
  if (reduction == MEAN) call.divide_by_weights();
  call.run();
  if (reduction == NONE) return {losses, saved};
  Tensor loss = torch::stable::sum(losses);
  if (reduction == MEAN) {
    divide_kernel<<<1, 1, 0, call.stream>>>(loss.mutable_data_ptr<float>(), call.rows.denominator);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {loss, saved};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& targets,
                              const std::optional<Tensor>& weight, const std::optional<Tensor>& statistics,
                              int64_t ignore_index, int64_t reduction, double label_smoothing) {
  const auto guard = guard_device({"logits", logits}, {{"targets", targets},
                                                       {"weight", weight},
                                                       {"grad_loss", grad_loss},
                                                       {"statistics", statistics}});
  Call call(logits, targets, weight, ignore_index, label_smoothing);
  STD_TORCH_CHECK(grad_loss.scalar_type() == ScalarType::Float && grad_loss.numel() == (reduction == NONE ? call.n : 1),
                  "grad_loss: expected float32, one value per loss");
  const Tensor grad = torch::stable::contiguous(grad_loss);
  Tensor gradient = torch::stable::new_empty(logits, {call.n, call.rows.classes});
  call.rows.row_scale = grad.const_data_ptr<float>();
  call.rows.row_scale_stride = reduction == NONE ? 1 : 0;
  std::optional<Tensor> known;
  if (statistics.has_value()) {
    STD_TORCH_CHECK(statistics->scalar_type() == ScalarType::Float && statistics->numel() == 2 * call.n,
                    "statistics: expected float32, two per row");
    known = torch::stable::contiguous(*statistics);
    call.rows.known_statistics = known->const_data_ptr<float>();
  }
  call.rows.gradient = gradient.mutable_data_ptr();
  if (reduction == MEAN) call.divide_by_weights();
  call.run();
  return gradient;
}

Tensor cross_entropy_chunk(Tensor logits, const Tensor& targets, const Tensor& row_scale, int64_t ignore_index,
                           double label_smoothing, bool with_grad) {
  const auto guard = guard_device({"logits", logits}, {{"targets", targets}, {"row_scale", row_scale}});
  STD_TORCH_CHECK(logits.is_contiguous() && row_scale.scalar_type() == ScalarType::Float && row_scale.is_contiguous() &&
                      row_scale.numel() == targets.numel(),
                  "logits, row_scale: expected a contiguous chunk and float32 (n,)");
  Call call(logits, targets, std::nullopt, ignore_index, label_smoothing);
  Tensor losses = torch::stable::new_empty(logits, {call.n}, ScalarType::Float);
  call.rows.loss = losses.mutable_data_ptr<float>();
  call.rows.row_scale = row_scale.const_data_ptr<float>();
  call.rows.row_scale_stride = 1;
  if (with_grad) call.rows.gradient = logits.mutable_data_ptr();
  call.run();
  return losses;
}

void scale_gradient(Tensor gradient, const Tensor& scale) {
  const auto guard = guard_device({"gradient", gradient}, {{"scale", scale}});
  STD_TORCH_CHECK(gradient.is_contiguous() && scale.numel() == 1 && scale.scalar_type() == ScalarType::Float,
                  "gradient, scale: expected a contiguous gradient and one float32");
  const int64_t n = gradient.numel();
  if (n == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((n + 2047) / 2048, 132 * 16));  // a few waves at most
  by_type(gradient, "gradient", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    scale_kernel<T><<<blocks, 256, 0, current_stream(gradient)>>>(
        static_cast<T*>(gradient.mutable_data_ptr()), scale.const_data_ptr<float>(), n);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("cross_entropy_native", TORCH_BOX(&fastgpt::cross_entropy));
  m.impl("cross_entropy_native_backward", TORCH_BOX(&fastgpt::cross_entropy_backward));
  m.impl("cross_entropy_chunk_", TORCH_BOX(&fastgpt::cross_entropy_chunk));
  m.impl("scale_gradient_", TORCH_BOX(&fastgpt::scale_gradient));
}
