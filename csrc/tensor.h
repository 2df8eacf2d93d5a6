// What the CPU ops share: the tensor type of libtorch's stable ABI, the three storage types, the allocation of results,
// the threshold for stores past the caches, and the check of indices.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "kernels.h"

namespace fastgpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FLOAT32;
    case ScalarType::BFloat16:
      return BFLOAT16;
    case ScalarType::Half:
      return FLOAT16;
    default:
      FASTGPT_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

// An uninitialised tensor on the CPU, made without the dispatcher, which takes longer than a small op.
Tensor new_small(const std::vector<int64_t>& sizes, ScalarType dtype);

// The tensor itself where its values are contiguous, else a copy.
inline Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// The matrix itself where the values of each row are contiguous, with or without gaps between the rows; else a copy.
inline Tensor with_contiguous_rows(const Tensor& matrix) {
  return matrix.size(1) > 1 && matrix.stride(1) != 1 ? torch::stable::contiguous(matrix) : matrix;
}

// The values of a tensor in float32, side by side: its own, or a copy of them. There are none without a tensor.
class InFloat32 {
 public:
  explicit InFloat32(const std::optional<Tensor>& tensor);
  const float* data() const { return values; }

 private:
  std::optional<Tensor> kept;
  std::unique_ptr<float[]> widened;
  const float* values = nullptr;
};

// A tensor on the CPU, uninitialised or zeros, with the dtype of `like` or with `dtype`. Large ones are blocks of
// large_blocks.h.
Tensor new_buffer(const Tensor& like, const std::vector<int64_t>& sizes, bool zeros,
                  std::optional<ScalarType> dtype = std::nullopt);

// The same with the shape of `like`, uninitialised.
Tensor new_like(const Tensor& like, std::optional<ScalarType> dtype = std::nullopt);

// A result of more bytes than this threshold is written past the caches, because together with its inputs it would not
// stay in them. The default is half of the last cache of the processors that it was measured on, not of the cache that
// the system reports: on a virtual machine that is the cache of a whole socket, which other machines share.
constexpr int64_t STREAM_THRESHOLD = int64_t{16} << 20;
int64_t stream_threshold();
void set_stream_threshold(int64_t bytes);  // for tests and comparisons

// The number of indices that are not `*ignore`. If any of these lies outside [0, limit), Python raises an IndexError
// that names the first one.
int64_t check_range(const char* name, const int64_t* indices, int64_t n, int64_t limit, const int64_t* ignore);

}  // namespace fastgpt
