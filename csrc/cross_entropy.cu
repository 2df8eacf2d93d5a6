// Cross-entropy on the GPU: one block per row, online softmax, loss and gradient from one read and one write.
//
// Between the statistics and the gradient a row is held where it fits: a short one in registers, one vector a thread, a
// long one in the block's shared memory: 227 KB on an H100, GPT-2's vocabulary in float32. A thread reads back only
// what it wrote, so that costs no barrier. (Eight vectors a thread in registers were tried first: they spilled.) A
// still longer row is read twice; the second time comes from the L2 cache where it is large enough. Rows of odd length
// start at any 2- or 4-byte boundary: up to the first 16-byte boundary, and after the last, values go one by one.
#include "device.cuh"

#include <algorithm>
#include <cmath>

namespace fastgpt {
namespace {

struct Rows {
  const void* logits;  // (rows, classes)
  void* gradient;      // (rows, classes), contiguous, or null; may be the logits
  int64_t logits_stride, classes;
  const int64_t* targets;
  int64_t ignore_index;
  const float* class_weight;      // (classes), or null for 1
  const float* class_weight_sum;  // null: classes
  float label_smoothing;
  const float* row_scale;  // d(result) / d(loss of the row), or null for 1
  int64_t row_scale_stride;
  const float* denominator;  // null: 1
  float* loss;               // (rows), or null
  float* statistics;         // (rows, 2): maximum, log of the sum of exp(x - maximum); written, or read where known
  bool statistics_known;
};

struct Online {
  float max, sum;
};

__device__ __forceinline__ void merge(Online& a, float max, float sum) {
  const float larger = fmaxf(a.max, max);
  const float base = larger == -INFINITY ? 0.0f : larger;  // exp(-inf - -inf) would be NaN
  a.sum = a.sum * __expf(a.max - base) + sum * __expf(max - base);
  a.max = larger;
}

// Both return the block's value to every thread, combined in a fixed order.
template <int THREADS>
__device__ Online reduce(Online own) {
  for (int offset = 16; offset > 0; offset /= 2)
    merge(own, __shfl_xor_sync(~0u, own.max, offset), __shfl_xor_sync(~0u, own.sum, offset));
  if constexpr (THREADS > 32) {
    __shared__ Online warps[THREADS / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    own = {-INFINITY, 0.0f};
    for (int warp = 0; warp < THREADS / 32; ++warp) merge(own, warps[warp].max, warps[warp].sum);
  }
  return own;
}

template <int THREADS>
__device__ float reduce(float own) {
  for (int offset = 16; offset > 0; offset /= 2) own += __shfl_xor_sync(~0u, own, offset);
  if constexpr (THREADS > 32) {
    __shared__ float warps[THREADS / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    own = 0.0f;
    for (int warp = 0; warp < THREADS / 32; ++warp) own += warps[warp];
  }
  return own;
}

enum Held { IN_REGISTERS, IN_SHARED_MEMORY, NOWHERE };

template <class T, int THREADS, Held HELD>
__global__ void __launch_bounds__(THREADS, THREADS == 512 ? 2 : 16) cross_entropy_kernel(const Rows a) {
  constexpr int SIZE = Vec16<T>::SIZE;
  const int64_t row = blockIdx.x, n = a.classes;
  const T* x = static_cast<const T*>(a.logits) + row * a.logits_stride;
  T* out = a.gradient ? static_cast<T*>(a.gradient) + row * n : nullptr;
  const int64_t target = a.targets[row];
  const int tid = threadIdx.x;

  if (target == a.ignore_index) {
    if (tid == 0 && a.loss) a.loss[row] = 0.0f;
    if (tid < 2 && !a.statistics_known) a.statistics[2 * row + tid] = 0.0f;
    if (out)
      for (int64_t i = tid; i < n; i += THREADS) out[i] = from_float<T>(0.0f);
    return;
  }
  assert(target >= 0 && target < n && "target out of range");

  // [0, head) one by one, vectors, [end, n) one by one. A gradient that is not aligned like the logits goes one by one.
  const bool together = out == nullptr || (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int64_t head = together ? min(past == 0 ? int64_t{0} : SIZE - past, n) : n;
  const int64_t vectors = (n - head) / SIZE;
  const int64_t end = head + vectors * SIZE;
  const T* body = x + head;
  const auto odd = [&](const auto& visit) {  // this thread's share of the values outside the vectors
    for (int64_t i = tid; i < head; i += THREADS) visit(i);
    for (int64_t i = end + tid; i < n; i += THREADS) visit(i);
  };

  extern __shared__ uint4 shared[];
  auto* held = reinterpret_cast<Vec16<T>*>(shared);
  Vec16<T> own_vector;
  if constexpr (HELD == IN_REGISTERS) {
    if (tid < vectors) own_vector = load16(body + tid * SIZE);
  } else if constexpr (HELD == IN_SHARED_MEMORY) {
#pragma unroll 4
    for (int64_t v = tid; v < vectors; v += THREADS) held[v] = load16(body + v * SIZE);
  }
  const auto each_vector = [&](const auto& visit) {
    if constexpr (HELD == IN_REGISTERS) {
      if (tid < vectors) visit(static_cast<int64_t>(tid), own_vector);
    } else {
      for (int64_t v = tid; v < vectors; v += THREADS) visit(v, HELD == NOWHERE ? load16(body + v * SIZE) : held[v]);
    }
  };

  const float x_target = to_float(x[target]);
  Online own{-INFINITY, 0.0f};
  float log_sum;
  if (a.statistics_known) {
    own.max = a.statistics[2 * row];
    log_sum = a.statistics[2 * row + 1];
  } else {
    each_vector([&](int64_t, const Vec16<T>& v) {
      float largest = to_float(v.values[0]);
#pragma unroll
      for (int j = 1; j < SIZE; ++j) largest = fmaxf(largest, to_float(v.values[j]));
      const float base = largest == -INFINITY ? 0.0f : largest;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < SIZE; ++j) sum += __expf(to_float(v.values[j]) - base);
      merge(own, largest, sum);
    });
    odd([&](int64_t i) {
      const float value = to_float(x[i]);  // not NaN - NaN where it is infinite
      merge(own, value, value == -INFINITY ? 0.0f : __expf(value - value));
    });
    own = reduce<THREADS>(own);
    log_sum = own.max == -INFINITY ? NAN : logf(own.sum);
    if (tid == 0) {
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
      each_vector([&](int64_t v, const Vec16<T>& vec) {
#pragma unroll
        for (int j = 0; j < SIZE; ++j) term(to_float(vec.values[j]), head + v * SIZE + j);
      });
      odd([&](int64_t i) { term(to_float(x[i]), i); });
      smoothing = reduce<THREADS>(smoothing) * smooth_each;
    }
    if (tid == 0) a.loss[row] = smoothing - weight * log_p;
  }
  if (out == nullptr) return;

  if constexpr (THREADS == 32) __syncwarp();  // in place: every lane has read x[target], as behind a barrier of `reduce`
  float g = a.row_scale ? a.row_scale[row * a.row_scale_stride] : 1.0f;
  if (a.denominator) g /= *a.denominator;
  const float weights = a.class_weight_sum ? *a.class_weight_sum : static_cast<float>(n);
  const float scale = g * (weight + smooth_each * weights);
  const float smooth = g * smooth_each;
  const auto gradient = [&](float value, int64_t i) {
    float d = __expf((value - max) - log_sum) * scale;
    if (a.label_smoothing > 0.0f) d -= smooth * (a.class_weight ? a.class_weight[i] : 1.0f);
    if (i == target) d -= g * weight;
    return from_float<T>(d);
  };
  each_vector([&](int64_t v, const Vec16<T>& vec) {
    Vec16<T> result;
#pragma unroll
    for (int j = 0; j < SIZE; ++j) result.values[j] = gradient(to_float(vec.values[j]), head + v * SIZE + j);
    store16(out + head + v * SIZE, result);
  });
  odd([&](int64_t i) { out[i] = gradient(to_float(x[i]), i); });
}

// The weight of each row in the mean; a target out of range stops here, before anything is read by it.
__global__ void row_weights_kernel(const int64_t* targets, const float* class_weight, float* weights, int64_t n,
                                   int64_t classes, int64_t ignore_index) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n) return;
  const int64_t target = targets[row];
  const bool counted = target != ignore_index;
  assert((!counted || (target >= 0 && target < classes)) && "target out of range");
  weights[row] = !counted ? 0.0f : class_weight ? class_weight[target] : 1.0f;
}

__global__ void divide_kernel(float* loss, const float* denominator) { *loss /= *denominator; }

// gradient *= scale; nothing at all where scale is 1, which only the device knows. Zeros stay, as in ignored rows.
template <class T>
__global__ void __launch_bounds__(256) scale_kernel(T* gradient, const float* scale, int64_t n) {
  const float factor = *scale;
  if (factor == 1.0f) return;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * 256, first = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t vectors = n / Vec16<T>::SIZE;
  for (int64_t v = first; v < vectors; v += stride) {
    Vec16<T> vec = load16(gradient + v * Vec16<T>::SIZE);
#pragma unroll
    for (int j = 0; j < Vec16<T>::SIZE; ++j) {
      const float value = to_float(vec.values[j]);
      vec.values[j] = value == 0.0f ? vec.values[j] : from_float<T>(value * factor);
    }
    store16(gradient + v * Vec16<T>::SIZE, vec);
  }
  for (int64_t i = vectors * Vec16<T>::SIZE + first; i < n; i += stride) {
    const float value = to_float(gradient[i]);
    if (value != 0.0f) gradient[i] = from_float<T>(value * factor);
  }
}

// Bytes a block may ask for, less what the reductions use statically.
int64_t largest_shared_memory() {
  int device = 0, bytes = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - 1024;
}

template <class T>
void launch(const Rows& rows, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const auto blocks = static_cast<unsigned>(n);
  const int64_t vectors = (rows.classes + Vec16<T>::SIZE - 1) / Vec16<T>::SIZE;
  const int64_t bytes = vectors * 16;
  if (vectors <= 32) {
    cross_entropy_kernel<T, 32, IN_REGISTERS><<<blocks, 32, 0, stream>>>(rows);
  } else if (bytes <= largest_shared_memory()) {
    const auto kernel = cross_entropy_kernel<T, 512, IN_SHARED_MEMORY>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    kernel<<<blocks, 512, static_cast<size_t>(bytes), stream>>>(rows);
  } else {
    cross_entropy_kernel<T, 512, NOWHERE><<<blocks, 512, 0, stream>>>(rows);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

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
      STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float && weight->numel() == rows.classes,
                      "weight: expected float32 (C,)");
      weight_sum = torch::stable::sum(*weight);
      rows.class_weight = weight->const_data_ptr<float>();
      rows.class_weight_sum = weight_sum->const_data_ptr<float>();
    }
  }

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

constexpr int64_t NONE = 0, MEAN = 1;  // PyTorch's numbers of the reductions

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets,
                                                 const std::optional<Tensor>& weight, int64_t ignore_index,
                                                 int64_t reduction, double label_smoothing, bool with_grad) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Call call(logits, targets, weight, ignore_index, label_smoothing);
  Tensor losses = torch::stable::new_empty(logits, {call.n}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(logits, {call.n, 2}, ScalarType::Float);
  Tensor gradient = torch::stable::new_empty(logits, {with_grad ? call.n : 0, call.rows.classes});
  call.rows.loss = losses.mutable_data_ptr<float>();
  call.rows.statistics = statistics.mutable_data_ptr<float>();
  if (with_grad) call.rows.gradient = gradient.mutable_data_ptr();
  if (reduction == MEAN) call.divide_by_weights();
  call.run();
  if (!with_grad) gradient = torch::stable::new_empty(logits, {0});
  if (reduction == NONE) return {losses, statistics, gradient};
  Tensor loss = torch::stable::sum(losses);
  if (reduction == MEAN) {
    divide_kernel<<<1, 1, 0, call.stream>>>(loss.mutable_data_ptr<float>(), call.rows.denominator);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {loss, statistics, gradient};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& targets,
                              const std::optional<Tensor>& weight, const Tensor& statistics, int64_t ignore_index,
                              int64_t reduction, double label_smoothing) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Call call(logits, targets, weight, ignore_index, label_smoothing);
  STD_TORCH_CHECK(grad_loss.scalar_type() == ScalarType::Float && statistics.scalar_type() == ScalarType::Float &&
                      grad_loss.numel() == (reduction == NONE ? call.n : 1) && statistics.numel() == 2 * call.n,
                  "grad_loss, statistics: expected float32, one value per loss and two per row");
  const Tensor grad = torch::stable::contiguous(grad_loss), known = torch::stable::contiguous(statistics);
  Tensor gradient = torch::stable::new_empty(logits, {call.n, call.rows.classes});
  call.rows.row_scale = grad.const_data_ptr<float>();
  call.rows.row_scale_stride = reduction == NONE ? 1 : 0;
  call.rows.statistics = const_cast<float*>(known.const_data_ptr<float>());  // only read: statistics_known
  call.rows.statistics_known = true;
  call.rows.gradient = gradient.mutable_data_ptr();
  if (reduction == MEAN) call.divide_by_weights();
  call.run();
  return gradient;
}

Tensor cross_entropy_chunk(Tensor logits, const Tensor& targets, const Tensor& row_scale, int64_t ignore_index,
                           double label_smoothing, bool with_grad) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  STD_TORCH_CHECK(logits.is_contiguous() && row_scale.scalar_type() == ScalarType::Float && row_scale.is_contiguous() &&
                      row_scale.numel() == targets.numel(),
                  "logits, row_scale: expected a contiguous chunk and float32 (n,)");
  Call call(logits, targets, std::nullopt, ignore_index, label_smoothing);
  Tensor losses = torch::stable::new_empty(logits, {call.n}, ScalarType::Float);
  Tensor statistics = torch::stable::new_empty(logits, {call.n, 2}, ScalarType::Float);
  call.rows.loss = losses.mutable_data_ptr<float>();
  call.rows.statistics = statistics.mutable_data_ptr<float>();
  call.rows.row_scale = row_scale.const_data_ptr<float>();
  call.rows.row_scale_stride = 1;
  if (with_grad) call.rows.gradient = logits.mutable_data_ptr();
  call.run();
  return losses;
}

void scale_gradient(Tensor gradient, const Tensor& scale) {
  const torch::stable::accelerator::DeviceGuard guard(gradient.get_device_index());
  STD_TORCH_CHECK(gradient.is_contiguous() && scale.numel() == 1 && scale.scalar_type() == ScalarType::Float,
                  "gradient, scale: expected a contiguous gradient and one float32");
  const int64_t n = gradient.numel();
  if (n == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((n + 2047) / 2048, 132 * 16));  // a few waves of any GPU
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
