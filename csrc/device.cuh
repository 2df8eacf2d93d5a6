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

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "check.h"
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

// `N` values that lie together, and that a thread loads or stores by one instruction, of up to 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  static constexpr int SIZE = N;
  T values[N];
};

template <class T>
using Vec16 = Vec<T, 16 / sizeof(T)>;

template <int BYTES>
struct Bits;
template <>
struct Bits<2> {
  using Type = uint16_t;
};
template <>
struct Bits<4> {
  using Type = uint32_t;
};
template <>
struct Bits<8> {
  using Type = uint64_t;
};
template <>
struct Bits<16> {
  using Type = uint4;
};

template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* p) {
  const auto bits = *reinterpret_cast<const typename Bits<N * sizeof(T)>::Type*>(p);
  return *reinterpret_cast<const Vec<T, N>*>(&bits);
}

template <class T, int N>
__device__ __forceinline__ void store(T* p, const Vec<T, N>& v) {
  using Type = typename Bits<N * sizeof(T)>::Type;
  *reinterpret_cast<Type*>(p) = *reinterpret_cast<const Type*>(&v);
}

template <class T>
__device__ __forceinline__ Vec16<T> load16(const T* p) {
  return load<Vec16<T>::SIZE>(p);
}

template <class T>
__device__ __forceinline__ void store16(T* p, const Vec16<T>& v) {
  store(p, v);
}

// The functions in which nvcc and a C++ compiler differ: the second one compiles these files to run the kernels without
// a GPU, and has no such instructions. A function does the same in both.
#ifdef __CUDACC__

// 2^x by one instruction: with a relative error of 2^-22, and 0 where the result is below 2^-126. exp2f() takes three
// instructions more for the results below that.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x by one instruction, with an error of one unit in the last place.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The values as float32. Two values of 16 bits are taken from their word of 32 bits: a shift for one, a mask for the
// other.
__device__ __forceinline__ void to_floats(const Vec16<float>& v, float (&values)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) values[j] = v.values[j];
}
__device__ __forceinline__ void to_floats(const Vec16<__half>& v, float (&values)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) values[j] = __half2float(v.values[j]);
}
__device__ __forceinline__ void to_floats(const Vec16<__nv_bfloat16>& v, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned word = reinterpret_cast<const unsigned*>(&v)[i];
    values[2 * i] = __uint_as_float(word << 16);
    values[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
  }
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
__device__ __forceinline__ __half2 larger(__half2 a, __half2 b) { return __hmax2(a, b); }

template <class T>
struct PairOf {
  using Type = T;
};
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

// The larger value of each place. A NaN counts as less than any number, as for fmaxf().
template <class T>
__device__ __forceinline__ Vec16<T> larger(const Vec16<T>& a, const Vec16<T>& b) {
  using Pair = typename PairOf<T>::Type;  // one instruction for two values of 16 bits
  Vec16<T> result;
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(Pair)); ++i)
    reinterpret_cast<Pair*>(&result)[i] =
        larger(reinterpret_cast<const Pair*>(&a)[i], reinterpret_cast<const Pair*>(&b)[i]);
  return result;
}

#else

inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

template <class T>
void to_floats(const Vec16<T>& v, float (&values)[Vec16<T>::SIZE]) {
  for (int j = 0; j < Vec16<T>::SIZE; ++j) values[j] = to_float(v.values[j]);
}

template <class T>
Vec16<T> larger(const Vec16<T>& a, const Vec16<T>& b) {
  Vec16<T> result;
  for (int i = 0; i < Vec16<T>::SIZE; ++i)
    result.values[i] = from_float<T>(fmaxf(to_float(a.values[i]), to_float(b.values[i])));
  return result;
}

#endif

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
    FASTGPT_CHECK(!other.tensor || other.tensor->device() == first.tensor->device(), other.name,
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
      FASTGPT_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

}  // namespace fastgpt
