// One new token through a GPT (decode.h): checks the arguments, lists the steps, and divides each among the threads.
//
// A token of a small model takes less time than the calls of thirty ops, and than waking the threads for each of them.
// Here they are woken once, and take the tasks of one step after the other. A step begins when the one before is done.
#include "decode.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <thread>

namespace fastgpt {
namespace {

constexpr int64_t TASKS_PER_THREAD = 2;  // of a step; each reads a part of a weight, and with more it reads slower
constexpr int64_t TENSORS_PER_BLOCK = 12;

struct Step {
  int64_t size;   // of what is divided into tasks
  int64_t grain;  // the size of a task
  std::function<void(int64_t begin, int64_t end)> run;
  std::function<void()> after;  // run once, by the thread that completes the last task; may be empty
  std::atomic<int64_t> taken{0}, done{0};
  std::atomic<bool> finished{false};

  Step(int64_t size, int64_t tasks, std::function<void(int64_t, int64_t)> run, std::function<void()> after)
      : size(size), grain((size + tasks - 1) / tasks), run(std::move(run)), after(std::move(after)) {}
};

// What each thread does. Threads that come late, or never, hold nobody up: a task that is not done has been taken by a
// thread that runs it.
void take_tasks(std::deque<Step>& steps) {
  for (Step& step : steps) {
    for (int64_t begin; (begin = step.taken.fetch_add(step.grain)) < step.size;) {
      const int64_t end = std::min(begin + step.grain, step.size);
      step.run(begin, end);
      if (step.done.fetch_add(end - begin) + (end - begin) < step.size) continue;
      if (step.after) step.after();
      step.finished.store(true, std::memory_order_release);
    }
    for (int64_t spins = 0; !step.finished.load(std::memory_order_acquire); ++spins)
      if (spins > 4096) std::this_thread::yield();
  }
}

void check(const Tensor& tensor, Storage storage, std::initializer_list<int64_t> sizes) {
  bool fits = tensor.is_contiguous() && tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && tensor.size(d++) == size;
  FASTGPT_CHECK(fits && storage_of(tensor, "weights") == storage,
                "weights: expected contiguous tensors of one dtype, in the order and the shapes of a GPT's");
}

// The tensors of one layer after the other. A bias that a layer does not have is a tensor without values.
class Weights {
 public:
  Weights(const std::vector<Tensor>& tensors, Storage storage) : tensors_(tensors), storage_(storage) {}

  const void* table(int64_t rows, int64_t columns) {
    check(tensors_[next_], storage_, {rows, columns});
    return tensors_[next_++].const_data_ptr();
  }
  const void* vector(int64_t size, bool optional) {
    const Tensor& tensor = tensors_[next_++];
    if (optional && tensor.numel() == 0) return nullptr;
    check(tensor, storage_, {size});
    return tensor.const_data_ptr();
  }
  int64_t rows_of_next() const { return tensors_[next_].size(0); }

 private:
  const std::vector<Tensor>& tensors_;
  const Storage storage_;
  size_t next_ = 0;
};

// The steps of one token, and the values between them.
class Decoding {
 public:
  Decoding(Storage storage, int64_t rows, float eps) : kernels_(kernels()), storage_(storage), rows_(rows), eps_(eps) {}

  std::deque<Step>& steps() { return steps_; }

  // (rows, columns), where a vector does not lie in two cache lines: every product reads them again and again.
  float* values(int64_t columns) {
    buffers_.emplace_back(static_cast<size_t>(rows_ * columns + 16));
    const auto address = reinterpret_cast<uintptr_t>(buffers_.back().data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

  // Layer norm of x (rows, columns), to be run after a step.
  std::function<void()> norm(Weights& weights, const float* x, float* out, int64_t columns) {
    NormFloats a{};
    a.x = x, a.out = out, a.rows = rows_, a.columns = columns, a.eps = eps_;
    a.weight = weights.vector(columns, false);
    a.bias = weights.vector(columns, true);
    return [a, run = kernels_.norm_floats[storage_]] { run(a); };
  }

  LinearRows linear(Weights& weights, const float* x, void* out, int64_t depth, int64_t columns) {
    LinearRows a{};
    a.x = x, a.out = out, a.rows = rows_, a.depth = depth, a.columns = columns, a.weight_stride = depth;
    a.weight = weights.table(columns, depth);
    a.bias = weights.vector(columns, true);
    return a;
  }

  void add(int64_t size, std::function<void(int64_t, int64_t)> run, std::function<void()> after = nullptr) {
    steps_.emplace_back(size, TASKS_PER_THREAD * torch::stable::get_num_threads(), std::move(run), std::move(after));
  }

  void add_linear(const LinearRows& a, std::function<void()> after = nullptr) {
    add(a.columns,
        [a, run = kernels_.linear_to_floats[storage_]](int64_t begin, int64_t end) { run(a, begin, end); },
        std::move(after));
  }

 private:
  const Kernels& kernels_;
  const Storage storage_;
  const int64_t rows_;
  const float eps_;
  std::deque<Step> steps_;
  std::deque<std::vector<float>> buffers_;
};

// The place of each of n new tokens: row i and `length`, or what `rows` (n, 2) says.
std::vector<CachePlace> places_of(const std::optional<Tensor>& rows, int64_t n, const Tensor& cache, int64_t length) {
  std::vector<CachePlace> places;
  const int64_t B = cache.size(2), T = cache.size(4);
  if (!rows.has_value()) {
    FASTGPT_CHECK(n == B && length >= 0 && length < T, "cache: expected one for n sequences, not full");
    for (int64_t i = 0; i < n; ++i) places.push_back({i, length});
    return places;
  }
  FASTGPT_CHECK(rows->dim() == 2 && rows->size(0) == n && rows->size(1) == 2 &&
                    rows->scalar_type() == ScalarType::Long && rows->is_cpu(),
                "rows: expected int64 (n, 2), on the CPU");
  const Tensor whole = packed(*rows);
  std::vector<bool> taken(static_cast<size_t>(B));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = whole.const_data_ptr<int64_t>()[2 * i], filled = whole.const_data_ptr<int64_t>()[2 * i + 1];
    FASTGPT_CHECK(row >= 0 && row < B && !taken[static_cast<size_t>(row)],
                  "rows: expected rows of the cache, each once");
    FASTGPT_CHECK(filled >= 0 && filled < T, "rows: expected lengths below ", T, ", the tokens that a row holds");
    taken[static_cast<size_t>(row)] = true;
    places.push_back({row, filled});
  }
  return places;
}

}  // namespace

Tensor decode(const Tensor& tokens, const std::vector<Tensor>& tensors, Tensor cache, int64_t length,
              const std::optional<Tensor>& rows, int64_t activation, double eps) {
  FASTGPT_CHECK(tokens.dim() == 2 && tokens.size(1) == 1 && tokens.scalar_type() == ScalarType::Long,
                "tokens: expected int64 (n, 1)");
  FASTGPT_CHECK(cache.dim() == 6 && cache.size(0) == 2 && cache.is_contiguous(),
                "cache: expected (2, L, B, H, block_size, D), contiguous");
  const int64_t L = cache.size(1), B = tokens.size(0), H = cache.size(3), T = cache.size(4), D = cache.size(5);
  const int64_t C = H * D;
  const std::vector<CachePlace> places = places_of(rows, B, cache, length);
  FASTGPT_CHECK(static_cast<int64_t>(tensors.size()) == 6 + TENSORS_PER_BLOCK * L && tensors[0].dim() == 2,
                "weights: expected ", 6 + TENSORS_PER_BLOCK * L, " tensors");
  FASTGPT_CHECK(activation >= GELU && activation <= RELU2, "activation: unknown");
  const Storage storage = storage_of(cache, "cache");
  const Kernels& run = kernels();
  const int64_t V = tensors[0].size(0);
  Tensor logits = new_buffer(cache, {B, V}, /*zeros=*/false);

  const Tensor indices = packed(tokens);
  check_range("tokens", indices.const_data_ptr<int64_t>(), B, V, nullptr);
  Decoding decoding(storage, B, static_cast<float>(eps));
  Weights weights(tensors, storage);
  float* x = decoding.values(C);  // the residual stream
  float* normed = decoding.values(C);
  float* qkv = decoding.values(3 * C);
  float* attended = decoding.values(C);

  GatherRows embedding{};
  embedding.tokens = indices.const_data_ptr<int64_t>();
  embedding.token_table = weights.table(V, C);
  const int64_t P = weights.rows_of_next();
  const void* positions = weights.table(P, C);
  const int64_t row_bytes = C * (storage == FLOAT32 ? 4 : 2);
  embedding.token_stride = embedding.position_stride = embedding.columns = C;
  embedding.length = 1;
  std::vector<char> embedded(static_cast<size_t>(B * row_bytes));
  embedding.out = embedded.data();
  for (int64_t i = 0; i < B; ++i) {
    const int64_t position = places[static_cast<size_t>(i)].length;
    FASTGPT_CHECK(position < P, "weights: expected a position table with a row for this token");
    embedding.position_table = static_cast<const char*>(positions) + position * row_bytes;
    run.gather[storage](embedding, i, i + 1);
  }
  run.widen[storage](embedded.data(), x, B * C);

  std::function<void()> next_norm = decoding.norm(weights, x, normed, C);
  next_norm();
  const int64_t layer_bytes = cache.size(2) * T * row_bytes;
  char* cached = static_cast<char*>(cache.mutable_data_ptr());
  for (int64_t layer = 0; layer < L; ++layer) {
    decoding.add_linear(decoding.linear(weights, normed, qkv, C, 3 * C));
    AttendNewest attend{};
    attend.qkv = qkv, attend.out = attended, attend.heads = H, attend.head_size = D;
    attend.capacity = T, attend.places = places.data();
    attend.keys = cached + layer * layer_bytes;
    attend.values = cached + (L + layer) * layer_bytes;
    decoding.add(B * H, [attend, kernel = run.attend_newest[storage]](int64_t begin, int64_t end) {
      kernel(attend, begin, end);
    });
    LinearRows proj = decoding.linear(weights, attended, x, C, C);
    proj.accumulate = true;
    decoding.add_linear(proj, decoding.norm(weights, x, normed, C));

    const int64_t F = weights.rows_of_next();
    float* hidden = decoding.values(F);
    const LinearRows up = decoding.linear(weights, normed, hidden, C, F);
    decoding.add(F, [&run, up, storage, activation, B, F](int64_t begin, int64_t end) {
      run.linear_to_floats[storage](up, begin, end);
      for (int64_t row = 0; row < B; ++row) {
        ActivationRows a{};
        a.kind = static_cast<Activation>(activation);
        a.x = a.out = static_cast<float*>(up.out) + row * F + begin;
        a.values = a.columns = end - begin;
        run.activation[FLOAT32](a, 0, 1);
      }
    });
    LinearRows down = decoding.linear(weights, hidden, x, F, C);
    down.accumulate = true;
    decoding.add_linear(down, decoding.norm(weights, x, normed, C));
  }
  const LinearRows head = decoding.linear(weights, normed, logits.mutable_data_ptr(), C, V);
  decoding.add(V, [head, kernel = run.linear[storage]](int64_t begin, int64_t end) {
    kernel(head, begin, end);
  });

  std::deque<Step>& steps = decoding.steps();
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) { take_tasks(steps); });
  return logits;
}

}  // namespace fastgpt
