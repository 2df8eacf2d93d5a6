// Token and position embedding on the GPU, and the gradients of the two tables. embedding_rows.h has the formulas.
//
// What is fused, forward: both look-ups and the addition. A thread reads 16 bytes of a token row and of a position row,
// and writes their sum once.
//
// Backward has no atomic operations. PyTorch sorts the tokens with a stable sort, and the sorted tokens are cut into
// chunks of equal length. A block of threads takes one chunk and adds up the gradient rows of each run of equal tokens
// in it, in float32 and in order. The sum of a run inside one chunk is written to the gradient at once. A run that
// crosses chunks leaves a partial sum for each of them, and a second kernel adds these up in order. So a token that is
// half of the text keeps as many blocks busy as any other text of that length does, and the same inputs always give the
// same bits, for one length of the chunks.
//
// The rows of a run lie anywhere in memory. Each thread has AHEAD of them on their way at a time.
#include "device.cuh"

#include <type_traits>

namespace fastgpt {
namespace {

constexpr int THREADS = 128;
constexpr int AHEAD = 8;
constexpr int MOST_CHUNK = 128;  // sorted tokens of a block, which shared memory holds

// The columns of one thread: WIDTH values that it loads by one instruction.
template <class T, int WIDTH>
struct Columns {
  using Row = Vec<T, WIDTH>;
  float values[WIDTH];

  __device__ __forceinline__ void add(const Row& row) {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) values[j] += to_float(row.values[j]);
  }
  __device__ __forceinline__ void add(const Columns& other) {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) values[j] += other.values[j];
  }
  __device__ __forceinline__ void store_to(T* p) const {
    Row row;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) row.values[j] = from_float<T>(values[j]);
    store(p, row);
  }

  // In float32 the columns may take two vectors.
  static constexpr int PIECE = WIDTH < 4 ? WIDTH : 4;
  using Piece = Vec<float, PIECE>;

  __device__ __forceinline__ static Columns of_partial(const float* p) {
    Columns result;
#pragma unroll
    for (int j = 0; j < WIDTH; j += PIECE) *reinterpret_cast<Piece*>(&result.values[j]) = load<PIECE>(p + j);
    return result;
  }
  __device__ __forceinline__ void store_partial(float* p) const {
#pragma unroll
    for (int j = 0; j < WIDTH; j += PIECE) store(p + j, *reinterpret_cast<const Piece*>(&values[j]));
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
    sum.add(load<WIDTH>(token_table + token * token_stride + c));
    if (position) sum.add(load<WIDTH>(position + c));
    sum.store_to(out + row * columns + c);
  }
}

// Sums the runs of equal tokens of a chunk. partial (chunks, 2, columns) float32 gets the sums of runs that cross
// chunks: partial[chunk][0] is that of a run that began in an earlier chunk, and partial[chunk][1] that of a run that
// begins in this chunk and goes on in the next one.
template <class T, int WIDTH, class Token>
__global__ void __launch_bounds__(THREADS)
    sum_runs_kernel(const T* grad, const Token* sorted, const int64_t* order, T* token_grad, float* partial, int64_t n,
                    int64_t columns, int64_t vocab_size, int chunk_length) {
  __shared__ Token tokens_around[MOST_CHUNK + 2];  // also the token before the chunk and the one after it, or -1
  __shared__ int64_t rows[MOST_CHUNK];
  const int64_t chunk = blockIdx.x, begin = chunk * chunk_length;
  const int length = static_cast<int>(min(static_cast<int64_t>(chunk_length), n - begin));
  for (int i = threadIdx.x; i < length + 2; i += THREADS) {
    const int64_t at = begin + i - 1;
    tokens_around[i] = at >= 0 && at < n ? sorted[at] : Token{-1};
    if (i < length) rows[i] = order[begin + i];
  }
  __syncthreads();
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * WIDTH;
  if (c >= columns) return;
  const Token* tokens = tokens_around + 1;
  bool from_before = tokens[-1] == tokens[0];  // whether the current run began in an earlier chunk
  Columns<T, WIDTH> sum = {};
  for (int start = 0; start < length; start += AHEAD) {
    Vec<T, WIDTH> ahead[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) ahead[k] = load<WIDTH>(grad + rows[min(start + k, length - 1)] * columns + c);
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int i = start + k;
      if (i >= length) break;
      sum.add(ahead[k]);
      const int64_t token = tokens[i];
      const bool goes_on = tokens[i + 1] == token;
      if (goes_on && i + 1 < length) continue;
      assert(token >= 0 && token < vocab_size && "token out of range");
      if (from_before || goes_on)
        sum.store_partial(partial + (2 * chunk + (from_before ? 0 : 1)) * columns + c);
      else
        sum.store_to(token_grad + token * columns + c);
      sum = {};
      from_before = false;
    }
  }
}

// Adds up the partial sums of each run that crosses chunks. The block of the chunk in which the run begins does so.
template <class T, int WIDTH, class Token>
__global__ void __launch_bounds__(THREADS)
    join_runs_kernel(const Token* sorted, T* token_grad, const float* partial, int64_t n, int64_t columns,
                     int chunk_length) {
  const int64_t chunk = blockIdx.x, begin = chunk * chunk_length, end = begin + chunk_length;
  if (end >= n) return;
  const Token token = sorted[end - 1];
  if (sorted[end] != token) return;  // no run goes on in the next chunk
  if (begin > 0 && sorted[begin] == token && sorted[begin - 1] == token) return;  // the run began in an earlier chunk
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * WIDTH;
  if (c >= columns) return;
  auto sum = Columns<T, WIDTH>::of_partial(partial + (2 * chunk + 1) * columns + c);
  for (int64_t next = chunk + 1;; next += AHEAD) {
    bool is_part[AHEAD];
    Columns<T, WIDTH> parts[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64_t first = (next + k) * chunk_length;
      is_part[k] = first < n && sorted[first] == token;
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
      if (is_part[k]) parts[k] = Columns<T, WIDTH>::of_partial(partial + 2 * (next + k) * columns + c);
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      if (!is_part[k]) return sum.store_to(token_grad + token * columns + c);
      sum.add(parts[k]);
    }
  }
}

// The gradient of a row of the position table: the sum over the batch, in order.
template <class T, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    sum_batch_kernel(const T* grad, T* position_grad, int64_t batch, int64_t length, int64_t columns) {
  const int64_t t = blockIdx.x;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * WIDTH;
  if (c >= columns) return;
  Columns<T, WIDTH> sum = {};
#pragma unroll AHEAD
  for (int64_t b = 0; b < batch; ++b) sum.add(load<WIDTH>(grad + (b * length + t) * columns + c));
  sum.store_to(position_grad + t * columns + c);
}

dim3 grid(int64_t rows, int64_t columns, int width) {
  FASTGPT_CHECK(rows < (int64_t{1} << 31), "tokens: expected fewer than 2^31");
  return {static_cast<unsigned>(rows), static_cast<unsigned>((columns + THREADS * width - 1) / (THREADS * width))};
}

// Calls `run` as by_type() does, with the WIDTH of `Columns` as a second argument, a constant: a vector of 16 bytes, or
// two values, or one, whatever divides all of `counts`. These are numbers of values: the columns, how far apart the
// rows lie, and values_before().
template <class Run>
void by_width(const Tensor& tensor, std::initializer_list<int64_t> counts, const Run& run) {
  int64_t all = 0;
  for (const int64_t count : counts) all |= count;  // it has as many zeros at its end as all of them have
  by_type(tensor, "token_table", [&](auto* type) {
    constexpr int vector = Vec16<std::remove_pointer_t<decltype(type)>>::SIZE;
    if (all % vector == 0)
      run(type, std::integral_constant<int, vector>{});
    else if (all % 2 == 0)
      run(type, std::integral_constant<int, 2>{});
    else
      run(type, std::integral_constant<int, 1>{});
  });
}

// How many values the tensor lies behind an address that every vector may have.
int64_t values_before(const Tensor& tensor) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 / tensor.element_size());
}

Tensor with_contiguous_rows(const Tensor& table) {
  return table.size(1) > 1 && table.stride(1) != 1 ? torch::stable::contiguous(table) : table;
}

}  // namespace

Tensor embedding(const Tensor& tokens, const Tensor& token_table, const std::optional<Tensor>& position_table,
                 int64_t position_offset) {
  const auto guard =
      guard_device({"token_table", token_table}, {{"tokens", tokens}, {"position_table", position_table}});
  FASTGPT_CHECK(tokens.dim() == 2 && tokens.scalar_type() == ScalarType::Long, "tokens: expected int64 (B, T)");
  FASTGPT_CHECK(token_table.dim() == 2, "token_table: expected (V, C)");
  FASTGPT_CHECK(!position_table.has_value() || position_table->dim() == 2, "position_table: expected (P, C)");
  const int64_t B = tokens.size(0), T = tokens.size(1), C = token_table.size(1);
  const Tensor indices = torch::stable::contiguous(tokens);
  const Tensor table = with_contiguous_rows(token_table);
  Tensor out = torch::stable::new_empty(token_table, {B, T, C});
  if (out.numel() == 0) return out;
  Tensor positions = position_table.has_value() ? with_contiguous_rows(*position_table) : table;
  FASTGPT_CHECK(!position_table.has_value() || (positions.scalar_type() == table.scalar_type() &&
                                                positions.size(1) == C && position_offset >= 0 &&
                                                position_offset <= positions.size(0) - T),
                "position_table: expected rows up to position_offset + T, like those of token_table");
  const auto counts = {C, table.stride(0), values_before(table), positions.stride(0), values_before(positions)};
  by_width(table, counts, [&](auto* type, auto width) {
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
// them the row of grad that it belongs to. A block takes `chunk` tokens.
Tensor sum_sorted(const Tensor& grad, const Tensor& sorted, const Tensor& order, int64_t vocab_size, int64_t chunk) {
  const auto guard = guard_device({"grad", grad}, {{"sorted", sorted}, {"order", order}});
  const bool is_long = sorted.scalar_type() == ScalarType::Long;
  FASTGPT_CHECK(grad.dim() == 2 && grad.is_contiguous() && sorted.is_contiguous() && order.is_contiguous() &&
                    (is_long || sorted.scalar_type() == ScalarType::Int) && order.scalar_type() == ScalarType::Long &&
                    sorted.numel() == grad.size(0) && order.numel() == grad.size(0),
                "grad, sorted, order: expected contiguous (N, C), int32 or int64 (N,), and int64 (N,)");
  FASTGPT_CHECK(is_long || vocab_size <= INT32_MAX, "sorted: expected int64 for ", vocab_size, " tokens");
  FASTGPT_CHECK(chunk > 0 && chunk <= MOST_CHUNK && chunk % AHEAD == 0, "chunk: expected a multiple of ", AHEAD,
                " up to ", MOST_CHUNK, ", got ", chunk);
  const int64_t n = grad.size(0), C = grad.size(1), chunks = (n + chunk - 1) / chunk;
  Tensor token_grad = torch::stable::new_zeros(grad, {vocab_size, C});
  if (n == 0 || C == 0) return token_grad;
  Tensor partial = torch::stable::new_empty(grad, {chunks, 2, C}, ScalarType::Float);
  by_width(grad, {C, values_before(grad)}, [&](auto* type, auto width) {
    using Value = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&](const auto* tokens) {
      using Token = std::remove_const_t<std::remove_pointer_t<decltype(tokens)>>;
      const dim3 blocks = grid(chunks, C, width.value);
      const cudaStream_t stream = current_stream(grad);
      auto* out = static_cast<Value*>(token_grad.mutable_data_ptr());
      const auto length = static_cast<int>(chunk);
      sum_runs_kernel<Value, width.value, Token><<<blocks, THREADS, 0, stream>>>(
          static_cast<const Value*>(grad.const_data_ptr()), tokens, order.const_data_ptr<int64_t>(), out,
          partial.mutable_data_ptr<float>(), n, C, vocab_size, length);
      join_runs_kernel<Value, width.value, Token><<<blocks, THREADS, 0, stream>>>(
          tokens, out, partial.const_data_ptr<float>(), n, C, length);
    };
    if (is_long)
      launch(sorted.const_data_ptr<int64_t>());
    else
      launch(sorted.const_data_ptr<int32_t>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return token_grad;
}

// The gradient of the position table (n_positions, C): grad (B, T, C) summed over the batch, in the rows from
// position_offset on, and zeros in the others.
Tensor sum_positions(const Tensor& grad, int64_t n_positions, int64_t position_offset) {
  const auto guard = guard_device({"grad", grad}, {});
  const int64_t B = grad.size(0), T = grad.size(1), C = grad.size(2);
  FASTGPT_CHECK(grad.is_contiguous() && position_offset >= 0 && position_offset <= n_positions - T,
                "grad: expected contiguous (B, T, C) that fits n_positions");
  Tensor position_grad = torch::stable::new_zeros(grad, {n_positions, C});
  if (grad.numel() == 0) return position_grad;
  by_width(grad, {C, values_before(grad)}, [&](auto* type, auto width) {
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
