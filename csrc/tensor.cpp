// What tensor.h declares: the allocation of results, the threshold for stores past the caches, the check of indices.
#include "tensor.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "large_blocks.h"
#include "stable.h"

namespace fastgpt {

static std::vector<int64_t> packed_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return strides;
}

static int64_t bytes_of(const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (int64_t size : sizes)
    FASTGPT_CHECK(!__builtin_mul_overflow(bytes, size, &bytes), "a result of more bytes than an int64 counts");
  return bytes;
}

Tensor new_small(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const std::vector<int64_t> strides = packed_strides(sizes);
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type,
                                              aoti_torch_device_type_cpu(), 0, &handle);
  // The stable ABI does not say why the allocation failed. For sizes that are valid, the reason is a lack of memory.
  FASTGPT_CHECK(error == 0, "not enough memory: cannot allocate ", bytes_of(sizes, dtype), " bytes");
  return Tensor(handle);
}

Tensor new_buffer(const Tensor& like, const std::vector<int64_t>& sizes, bool zeros, std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(like.scalar_type());
  const int64_t bytes = bytes_of(sizes, type);
  if (bytes >= SMALLEST_LARGE_BLOCK) {
    const LargeBlock block = take_block(bytes);
    if (block.memory != nullptr) {
      if (zeros && !block.is_fresh) {
        constexpr int64_t PIECE = int64_t{1} << 20;
        torch::stable::parallel_for(0, (bytes + PIECE - 1) / PIECE, 1, [&](int64_t begin, int64_t end) {
          const int64_t last = std::min(end * PIECE, bytes);
          std::memset(static_cast<char*>(block.memory) + begin * PIECE, 0, static_cast<size_t>(last - begin * PIECE));
        });
      }
      const std::vector<int64_t> strides = packed_strides(sizes);
      return torch::stable::from_blob(block.memory, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
                                      like.device(), type, [block](void*) { give_back_block(block); });
    }
  }
  Tensor buffer = new_small(sizes, type);
  if (zeros) std::memset(buffer.mutable_data_ptr(), 0, static_cast<size_t>(bytes));
  return buffer;
}

Tensor new_like(const Tensor& like, std::optional<ScalarType> dtype) {
  std::vector<int64_t> sizes(static_cast<size_t>(like.dim()));
  for (int64_t d = 0; d < like.dim(); ++d) sizes[static_cast<size_t>(d)] = like.size(d);
  return new_buffer(like, sizes, /*zeros=*/false, dtype);
}

InFloat32::InFloat32(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return;
  kept = packed(*tensor);
  const Storage storage = storage_of(*kept, "a tensor");
  if (storage == FLOAT32) {
    values = kept->const_data_ptr<float>();
    return;
  }
  widened.reset(new float[static_cast<size_t>(kept->numel())]);
  kernels().widen[storage](kept->const_data_ptr(), widened.get(), kept->numel());
  values = widened.get();
}

// Atomic, because a test may set it while another thread reads it.
static std::atomic<int64_t> threshold{STREAM_THRESHOLD};

int64_t stream_threshold() { return threshold.load(std::memory_order_relaxed); }

void set_stream_threshold(int64_t bytes) { threshold.store(bytes, std::memory_order_relaxed); }

int64_t check_range(const char* name, const int64_t* indices, int64_t n, int64_t limit, const int64_t* ignore) {
  const int64_t counted = kernels().count_indices(indices, n, limit, ignore);
  if (counted >= 0) return counted;
  int64_t i = 0;  // the position of the first index that is outside
  while (static_cast<uint64_t>(indices[i]) < static_cast<uint64_t>(limit) || (ignore && indices[i] == *ignore)) ++i;
  throw std::out_of_range(std::string(name) + ": value " + std::to_string(indices[i]) + " at flat position " +
                          std::to_string(i) + " is outside [0, " + std::to_string(limit) + ")");
}

}  // namespace fastgpt
