// What the CUDA kernels share: conversions to and from float32, vectors of 16 bytes, the device and the stream of a
// call, and the choice of a template by a tensor's dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cassert>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "stable.h"

namespace fastgpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// 16 bytes of values, which a thread loads or stores by one instruction.
template <class T>
struct alignas(16) Vec16 {
  static constexpr int SIZE = 16 / sizeof(T);
  T values[SIZE];
};

template <class T>
__device__ __forceinline__ Vec16<T> load16(const T* p) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  return *reinterpret_cast<const Vec16<T>*>(&bits);
}

template <class T>
__device__ __forceinline__ void store16(T* p, const Vec16<T>& v) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&v);
}

// How many values lie between p and the first multiple of 16 bytes from p on.
template <class T>
__device__ __forceinline__ int64_t values_before_alignment(const T* p) {
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// An argument of an op, and its name in errors; null where the caller left it out.
struct Argument {
  const char* name;
  const Tensor* tensor;

  Argument(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  Argument(const char* name, const std::optional<Tensor>& tensor) : name(name), tensor(tensor ? &*tensor : nullptr) {}
};

// Makes the device of `first` the current one while the result lives. The other arguments must be on that device, too:
// a kernel that reads the memory of another one stops the process with an error that names no argument.
inline torch::stable::accelerator::DeviceGuard guard_device(const Argument& first,
                                                            std::initializer_list<Argument> others) {
  for (const Argument& other : others)
    STD_TORCH_CHECK(!other.tensor || other.tensor->device() == first.tensor->device(), other.name,
                    ": expected on the device of ", first.name);
  return torch::stable::accelerator::DeviceGuard(first.tensor->get_device_index());
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls `run` with a null pointer to the C++ type of the tensor's values, by which `run` chooses a kernel's template.
template <class Run>
void by_type(const Tensor& tensor, const char* name, const Run& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return run(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Half:
      return run(static_cast<__half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace fastgpt
