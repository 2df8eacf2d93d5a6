// Token and position embedding on the CPU (embedding.h): checks the arguments and divides the work among threads. The
// formulas and kernels are in embedding_rows.h.
#include "embedding.h"

#include <algorithm>
#include <utility>

namespace fastgpt {
namespace {

constexpr int64_t VALUES_PER_TASK = 16384;  // for fewer, waking a thread takes longer than it saves
constexpr int64_t STRIP = 128;  // columns that one task sums: 512 bytes of float32, long enough for the prefetcher

constexpr int64_t NARROWEST = 64;       // columns of a thread in the single pass, at least: four cache lines of a row
constexpr int64_t SMALL_TABLES = 512 << 10;  // bytes of float32 sums of a thread, at most: half a second-level cache

int64_t grain(int64_t columns) { return (VALUES_PER_TASK + columns - 1) / std::max<int64_t>(columns, 1); }

// Calls visit(row) for every row of (sequences, length), in the order in which gradient rows are added.
template <class Visit>
void in_order(int64_t sequences, int64_t length, const Visit& visit) {
  int64_t first = 0;
  for (; first + SIDE_BY_SIDE <= sequences; first += SIDE_BY_SIDE)
    for (int64_t t = 0; t < length; ++t)
      for (int64_t k = 0; k < SIDE_BY_SIDE; ++k) visit((first + k) * length + t);
  for (int64_t row = first * length; row < sequences * length; ++row) visit(row);
}

// The rows of each token that occurs, in the order of in_order(), by a stable counting sort.
struct Segments {
  std::vector<int64_t> order;   // (N): all rows, grouped by token
  std::vector<int64_t> starts;  // (U + 1): where in `order` the u-th group begins; N at the end
  std::vector<int64_t> token;   // (U): the token of the u-th group

  Segments(const int64_t* tokens, int64_t sequences, int64_t length, int64_t vocab_size) {
    const int64_t n = sequences * length;
    order.resize(static_cast<size_t>(n));
    std::vector<int64_t> next(static_cast<size_t>(vocab_size), 0);
    for (int64_t i = 0; i < n; ++i) ++next[static_cast<size_t>(tokens[i])];
    int64_t start = 0;
    for (int64_t v = 0; v < vocab_size; ++v) {
      int64_t& count = next[static_cast<size_t>(v)];
      if (count > 0) {
        starts.push_back(start);
        token.push_back(v);
      }
      start += std::exchange(count, start);
    }
    starts.push_back(n);
    in_order(sequences, length, [&](int64_t row) {
      order[static_cast<size_t>(next[static_cast<size_t>(tokens[row])]++)] = row;
    });
  }
};

}  // namespace

Tensor embedding(const Tensor& tokens, const Tensor& token_table, const std::optional<Tensor>& position_table,
                 int64_t position_offset) {
  FASTGPT_CHECK(tokens.dim() == 2 && tokens.scalar_type() == ScalarType::Long, "tokens: expected int64 (B, T)");
  FASTGPT_CHECK(token_table.dim() == 2, "token_table: expected (V, C)");
  FASTGPT_CHECK(!position_table.has_value() || position_table->dim() == 2, "position_table: expected (P, C)");
  const Storage storage = storage_of(token_table, "token_table");
  const int64_t B = tokens.size(0), T = tokens.size(1), C = token_table.size(1);
  const Tensor indices = packed(tokens);
  const Tensor table = with_contiguous_rows(token_table);

  GatherRows rows{};
  rows.tokens = indices.const_data_ptr<int64_t>();
  check_range("tokens", rows.tokens, B * T, token_table.size(0), nullptr);
  rows.token_table = table.const_data_ptr();
  rows.token_stride = table.stride(0);
  rows.length = T;
  rows.columns = C;
  Tensor positions = table;
  if (position_table.has_value()) {
    positions = with_contiguous_rows(*position_table);
    FASTGPT_CHECK(storage_of(positions, "position_table") == storage && positions.size(1) == C &&
                      position_offset >= 0 && position_offset <= positions.size(0) - T,
                  "position_table: expected rows up to position_offset + T, like those of token_table");
    rows.position_stride = positions.stride(0);
    rows.position_table = static_cast<const char*>(positions.const_data_ptr()) +
                          position_offset * rows.position_stride * static_cast<int64_t>(positions.element_size());
  }
  Tensor out = new_buffer(token_table, {B, T, C}, /*zeros=*/false);
  rows.out = out.mutable_data_ptr();
  rows.stream = out.numel() * static_cast<int64_t>(out.element_size()) > stream_threshold();
  const auto kernel = kernels().gather[storage];
  torch::stable::parallel_for(0, B * T, grain(C), [&](int64_t begin, int64_t end) { kernel(rows, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> embedding_backward(const Tensor& grad, const Tensor& tokens, int64_t vocab_size,
                                              int64_t n_positions, int64_t position_offset, bool with_tokens,
                                              bool with_positions) {
  FASTGPT_CHECK(tokens.dim() == 2 && tokens.scalar_type() == ScalarType::Long, "tokens: expected int64 (B, T)");
  FASTGPT_CHECK(grad.dim() == 3 && grad.size(0) == tokens.size(0) && grad.size(1) == tokens.size(1),
                "grad: expected (B, T, C)");
  const Storage storage = storage_of(grad, "grad");
  const auto kernel = kernels().sum_rows[storage];
  const Tensor g = packed(grad);
  const Tensor indices = packed(tokens);
  const int64_t B = tokens.size(0), T = tokens.size(1), C = grad.size(2), N = B * T;
  const int64_t value_bytes = static_cast<int64_t>(g.element_size());
  const char* values = static_cast<const char*>(g.const_data_ptr());
  const int64_t strips = (C + STRIP - 1) / STRIP;

  Tensor token_grad = new_buffer(grad, {with_tokens ? vocab_size : 0, C}, /*zeros=*/true);
  Tensor position_grad = new_buffer(grad, {with_positions ? n_positions : 0, C}, /*zeros=*/true);

  if (N == 0 || C == 0) return {token_grad, position_grad};
  if (with_tokens) check_range("tokens", indices.const_data_ptr<int64_t>(), N, vocab_size, nullptr);
  if (with_positions)
    FASTGPT_CHECK(position_offset >= 0 && position_offset <= n_positions - T, "position_offset: past n_positions");

  // Each column has sums of its own, so the sums do not depend on how columns are divided among threads.
  const int64_t sum_rows = (with_tokens ? vocab_size : 0) + (with_positions ? T : 0);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t width = (C + threads - 1) / threads;
  if (width >= NARROWEST && sum_rows * width * 4 <= SMALL_TABLES) {
    torch::stable::parallel_for(0, C, grain(N), [&](int64_t begin, int64_t end) {
      std::vector<float> sums(static_cast<size_t>(sum_rows * (end - begin)));
      AccumulateRows rows{};
      rows.rows = values;
      rows.tokens = indices.const_data_ptr<int64_t>();
      rows.count = N;
      rows.length = T;
      rows.vocab_size = vocab_size;
      rows.columns = C;
      rows.begin = begin;
      rows.end = end;
      if (with_tokens) rows.token_sums = sums.data();
      rows.token_grad = token_grad.mutable_data_ptr();
      if (with_positions) {
        rows.position_sums = sums.data() + (with_tokens ? vocab_size * (end - begin) : 0);
        rows.position_grad = static_cast<char*>(position_grad.mutable_data_ptr()) + position_offset * C * value_bytes;
      }
      kernels().accumulate_rows[storage](rows);
    });
    return {token_grad, position_grad};
  }

  if (with_tokens) {
    const Segments segments(indices.const_data_ptr<int64_t>(), B, T, vocab_size);
    char* out = static_cast<char*>(token_grad.mutable_data_ptr());
    // A task is one strip of columns of one token, and costs as much as the token has occurrences. Laid end to end, the
    // tasks fill [0, strips * N). A thread is given an equal part of this range and does the tasks that begin in it.
    // Even a token that is half of the text is shared by `strips` threads.
    torch::stable::parallel_for(0, strips * N, grain(STRIP), [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin / N; strip <= (end - 1) / N; ++strip) {
        const int64_t first = std::max(begin - strip * N, int64_t{0}), last = std::min(end - strip * N, N);
        const auto from = std::lower_bound(segments.starts.begin(), segments.starts.end() - 1, first);
        for (auto u = static_cast<size_t>(from - segments.starts.begin());
             u < segments.token.size() && segments.starts[u] < last; ++u) {
          SumRows rows{};
          rows.rows = values + strip * STRIP * value_bytes;
          rows.row_stride = C;
          rows.order = segments.order.data() + segments.starts[u];
          rows.count = segments.starts[u + 1] - segments.starts[u];
          rows.columns = std::min(STRIP, C - strip * STRIP);
          rows.out = out + (segments.token[u] * C + strip * STRIP) * value_bytes;
          kernel(rows);
        }
      }
    });
  }
  if (with_positions) {
    char* out = static_cast<char*>(position_grad.mutable_data_ptr()) + position_offset * C * value_bytes;
    torch::stable::parallel_for(0, T, grain(B * C), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        SumRows rows{};
        rows.rows = values + t * C * value_bytes;
        rows.row_stride = T * C;
        rows.count = B;
        rows.columns = C;
        rows.out = out + t * C * value_bytes;
        kernel(rows);
      }
    });
  }
  return {token_grad, position_grad};
}

}  // namespace fastgpt
