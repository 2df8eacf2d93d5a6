// Token and position embedding on the GPU, and the gradients of the two tables. embedding_rows.h has the formulas.
//
// What is fused, forward: both look-ups and the addition. A thread reads 16 bytes of a token row and of a position row,
// and writes their sum once.
//
// Backward has no atomic operations. PyTorch sorts the tokens with a stable sort, and the sorted tokens are cut into
// chunks of 64. A block of threads takes one chunk and adds up the gradient rows of each run of equal tokens in it, in
// float32 and in order. The sum of a run inside one chunk is written to the gradient at once. A run that crosses chunks
// leaves a partial sum for each of them, and a second kernel adds these up in order. So a token that is half of the
// text keeps as many blocks busy as any other text of that length does, and the same inputs always give the same bits.
#include "device.cuh"

#include <type_traits>

namespace fastgpt {
namespace {

constexpr int THREADS = 128;
constexpr int64_t CHUNK = 64;  // sorted tokens of a block: enough to hide the latency of loads, and many blocks

// The columns of one thread: WIDTH is as many as fit a vector of 16 bytes, or 1 where rows are not aligned to 16 bytes.
template <class T, int WIDTH>
struct Columns {
  float values[WIDTH];

  __device__ __forceinline__ void add(const T* p) {
    if constexpr (WIDTH == 1) {
      values[0] += to_float(*p);
    } else {
      const Vec16<T> v = load16(p);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) values[j] += to_float(v.values[j]);
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (WIDTH == 1) {
      *p = from_float<T>(values[0]);
    } else {
      Vec16<T> v;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) v.values[j] = from_float<T>(values[j]);
      store16(p, v);
    }
  }
};

// A block writes one row of the output.
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    gather_kernel(const int64_t* tokens, const T* token_table, const T* position_table, T* out, int64_t rows,
                  int64_t length, int64_t columns, int64_t vocab_size, int64_t token_stride, int64_t position_stride) {
  const int64_t row = blockIdx.x;
  const int64_t token = tokens[row];
  assert(token >= 0 && token < vocab_size && "token out of range");
  const T* position = position_table ? position_table + row % length * position_stride : nullptr;
  for (int64_t c = threadIdx.x * WIDTH; c < columns; c += THREADS * WIDTH) {
    Columns<T, WIDTH> sum = {};
    sum.add(token_table + token * token_stride + c);
    if (position) sum.add(position + c);
    sum.store(out + row * columns + c);
  }
}

// Sums the runs of equal tokens of a chunk. partial (chunks, 2, columns) float32 gets the sums of runs that cross
// chunks: partial[chunk][0] is that of a run that began in an earlier chunk, and partial[chunk][1] that of a run that
// begins in this chunk and goes on in the next one.
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    sum_runs_kernel(const T* grad, const int64_t* sorted, const int64_t* order, T* token_grad, float* partial, int64_t n,
                    int64_t columns, int64_t vocab_size) {
  const int64_t chunk = blockIdx.x, begin = chunk * CHUNK, end = min(begin + CHUNK, n);
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * WIDTH;
  if (c >= columns) return;
  int64_t run = begin;  // where the current run begins
  Columns<T, WIDTH> sum = {};
  for (int64_t i = begin; i < end; ++i) {
    sum.add(grad + order[i] * columns + c);
    const int64_t token = sorted[i];
    if (i + 1 < end && sorted[i + 1] == token) continue;
    assert(token >= 0 && token < vocab_size && "token out of range");
    const bool from_before = run == begin && begin > 0 && sorted[begin - 1] == token;
    const bool goes_on = i + 1 == end && end < n && sorted[end] == token;
    if (from_before || goes_on) {
      float* to = partial + (2 * chunk + (from_before ? 0 : 1)) * columns + c;
      for (int j = 0; j < WIDTH; ++j) to[j] = sum.values[j];
    } else {
      sum.store(token_grad + token * columns + c);
    }
    sum = {};
    run = i + 1;
  }
}

// Adds up the partial sums of each run that crosses chunks. The block of the chunk in which the run begins does so.
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    join_runs_kernel(const int64_t* sorted, T* token_grad, const float* partial, int64_t n, int64_t columns) {
  const int64_t chunk = blockIdx.x, begin = chunk * CHUNK, end = begin + CHUNK;
  if (end >= n) return;
  const int64_t token = sorted[end - 1];
  if (sorted[end] != token) return;  // no run goes on in the next chunk
  if (begin > 0 && sorted[begin] == token && sorted[begin - 1] == token) return;  // the run began in an earlier chunk
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * WIDTH;
  if (c >= columns) return;
  Columns<T, WIDTH> sum;
  for (int j = 0; j < WIDTH; ++j) sum.values[j] = partial[(2 * chunk + 1) * columns + c + j];
  for (int64_t next = chunk + 1; next * CHUNK < n && sorted[next * CHUNK] == token; ++next)
    for (int j = 0; j < WIDTH; ++j) sum.values[j] += partial[2 * next * columns + c + j];
  sum.store(token_grad + token * columns + c);
}

// The gradient of a row of the position table: the sum over the batch, in order.
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    sum_batch_kernel(const T* grad, T* position_grad, int64_t batch, int64_t length, int64_t columns) {
  const int64_t t = blockIdx.x;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * WIDTH;
  if (c >= columns) return;
  Columns<T, WIDTH> sum = {};
#pragma unroll 4
  for (int64_t b = 0; b < batch; ++b) sum.add(grad + (b * length + t) * columns + c);
  sum.store(position_grad + t * columns + c);
}

dim3 grid(int64_t rows, int64_t columns, int width) {
  STD_TORCH_CHECK(rows < (int64_t{1} << 31), "tokens: expected fewer than 2^31");
  return {static_cast<unsigned>(rows), static_cast<unsigned>((columns + THREADS * width - 1) / (THREADS * width))};
}

// Calls `run` as by_type() does, with the WIDTH of `Columns` as a second argument, a constant.
template <class Run>
void by_width(const Tensor& tensor, bool vectors, const Run& run) {
  by_type(tensor, "token_table", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (vectors)
      run(type, std::integral_constant<int, Vec16<T>::SIZE>{});
    else
      run(type, std::integral_constant<int, 1>{});
  });
}

Tensor with_contiguous_rows(const Tensor& table) {
  return table.size(1) > 1 && table.stride(1) != 1 ? torch::stable::contiguous(table) : table;
}

}  // namespace

Tensor embedding(const Tensor& tokens, const Tensor& token_table, const std::optional<Tensor>& position_table,
                 int64_t position_offset) {
  const auto guard = guard_device({"token_table", token_table}, {{"tokens", tokens}, {"position_table", position_table}});
  STD_TORCH_CHECK(tokens.dim() == 2 && tokens.scalar_type() == ScalarType::Long, "tokens: expected int64 (B, T)");
  STD_TORCH_CHECK(token_table.dim() == 2, "token_table: expected (V, C)");
  STD_TORCH_CHECK(!position_table.has_value() || position_table->dim() == 2, "position_table: expected (P, C)");
  const int64_t B = tokens.size(0), T = tokens.size(1), C = token_table.size(1);
  const Tensor indices = torch::stable::contiguous(tokens);
  const Tensor table = with_contiguous_rows(token_table);
  Tensor out = torch::stable::new_empty(token_table, {B, T, C});
  if (out.numel() == 0) return out;
  Tensor positions = position_table.has_value() ? with_contiguous_rows(*position_table) : table;
  STD_TORCH_CHECK(!position_table.has_value() || (positions.scalar_type() == table.scalar_type() &&
                                                  positions.size(1) == C && position_offset >= 0 &&
                                                  position_offset <= positions.size(0) - T),
                  "position_table: expected rows up to position_offset + T, like those of token_table");
  const int64_t per_vector = 16 / static_cast<int64_t>(table.element_size());
  const bool vectors = C % per_vector == 0 && table.stride(0) % per_vector == 0 && is_aligned(table.const_data_ptr()) &&
                       positions.stride(0) % per_vector == 0 && is_aligned(positions.const_data_ptr());
  by_width(table, vectors, [&](auto* type, auto width) {
    using Value = std::remove_pointer_t<decltype(type)>;
    const auto* position = static_cast<const Value*>(positions.const_data_ptr());
    gather_kernel<Value, width.value><<<grid(B * T, 1, 1), THREADS, 0, current_stream(table)>>>(
        indices.const_data_ptr<int64_t>(), static_cast<const Value*>(table.const_data_ptr()),
        position_table.has_value() ? position + position_offset * positions.stride(0) : nullptr,
        static_cast<Value*>(out.mutable_data_ptr()), B * T, T, C, token_table.size(0), table.stride(0),
        positions.stride(0));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// The gradient of the token table (vocab_size, C), from grad (N, C), the tokens in ascending order, and for each of
// them the row of grad that it belongs to.
Tensor sum_sorted(const Tensor& grad, const Tensor& sorted, const Tensor& order, int64_t vocab_size) {
  const auto guard = guard_device({"grad", grad}, {{"sorted", sorted}, {"order", order}});
  STD_TORCH_CHECK(grad.dim() == 2 && grad.is_contiguous() && sorted.is_contiguous() && order.is_contiguous() &&
                      sorted.scalar_type() == ScalarType::Long && order.scalar_type() == ScalarType::Long &&
                      sorted.numel() == grad.size(0) && order.numel() == grad.size(0),
                  "grad, sorted, order: expected contiguous (N, C) and int64 (N,)");
  const int64_t n = grad.size(0), C = grad.size(1), chunks = (n + CHUNK - 1) / CHUNK;
  Tensor token_grad = torch::stable::new_zeros(grad, {vocab_size, C});
  if (n == 0 || C == 0) return token_grad;
  Tensor partial = torch::stable::new_empty(grad, {chunks, 2, C}, ScalarType::Float);
  const bool vectors = C % (16 / static_cast<int64_t>(grad.element_size())) == 0 && is_aligned(grad.const_data_ptr());
  by_width(grad, vectors, [&](auto* type, auto width) {
    using Value = std::remove_pointer_t<decltype(type)>;
    const dim3 blocks = grid(chunks, C, width.value);
    const cudaStream_t stream = current_stream(grad);
    auto* out = static_cast<Value*>(token_grad.mutable_data_ptr());
    sum_runs_kernel<Value, width.value><<<blocks, THREADS, 0, stream>>>(
        static_cast<const Value*>(grad.const_data_ptr()), sorted.const_data_ptr<int64_t>(),
        order.const_data_ptr<int64_t>(), out, partial.mutable_data_ptr<float>(), n, C, vocab_size);
    join_runs_kernel<Value, width.value><<<blocks, THREADS, 0, stream>>>(
        sorted.const_data_ptr<int64_t>(), out, partial.const_data_ptr<float>(), n, C);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return token_grad;
}

// The gradient of the position table (n_positions, C): grad (B, T, C) summed over the batch, in the rows from
// position_offset on, and zeros in the others.
Tensor sum_positions(const Tensor& grad, int64_t n_positions, int64_t position_offset) {
  const auto guard = guard_device({"grad", grad}, {});
  const int64_t B = grad.size(0), T = grad.size(1), C = grad.size(2);
  STD_TORCH_CHECK(grad.is_contiguous() && position_offset >= 0 && position_offset <= n_positions - T,
                  "grad: expected contiguous (B, T, C) that fits n_positions");
  Tensor position_grad = torch::stable::new_zeros(grad, {n_positions, C});
  if (grad.numel() == 0) return position_grad;
  const bool vectors = C % (16 / static_cast<int64_t>(grad.element_size())) == 0 && is_aligned(grad.const_data_ptr());
  by_width(grad, vectors, [&](auto* type, auto width) {
    using Value = std::remove_pointer_t<decltype(type)>;
    sum_batch_kernel<Value, width.value><<<grid(T, C, width.value), THREADS, 0, current_stream(grad)>>>(
        static_cast<const Value*>(grad.const_data_ptr()),
        static_cast<Value*>(position_grad.mutable_data_ptr()) + position_offset * C, B, T, C);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return position_grad;
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("embedding_native", TORCH_BOX(&fastgpt::embedding));
  m.impl("embedding_sum_sorted", TORCH_BOX(&fastgpt::sum_sorted));
  m.impl("embedding_sum_positions", TORCH_BOX(&fastgpt::sum_positions));
}
