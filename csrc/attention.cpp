// Attention on the CPU (attention.h): checks the arguments and divides the heads among threads. The formulas and kernels
// are in attention_rows.h.
#include "attention.h"

#include <algorithm>
#include <memory>

namespace fastgpt {
namespace {

constexpr int64_t SUMS_PER_TASK = int64_t{1} << 18;  // multiply-adds, about 5 us; for fewer, a thread is not woken

// The tensor itself where the values of a head's row lie side by side, else a copy.
Tensor with_rows_of_heads(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) > 1 && x.stride(last) != 1 ? torch::stable::contiguous(x) : x;
}

HeadRows heads_of(const Tensor& x) {  // (B, H, T, D)
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// Part `part` of those that lie side by side in x (B, T, parts * n_head * width).
HeadRows packed_heads_of(const Tensor& x, int64_t part, int64_t n_head, int64_t width) {
  char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  data += part * n_head * width * static_cast<int64_t>(x.element_size());
  return {data, x.stride(0), width, x.stride(1)};
}

Attention options(const std::optional<Tensor>& seed, bool is_causal, double scale, double dropout_p) {
  FASTGPT_CHECK(dropout_p == 0.0 || (seed.has_value() && seed->dim() == 0 && seed->scalar_type() == ScalarType::Long),
                "seed: expected a 0-dim int64 tensor");
  Attention a{};
  a.is_causal = is_causal;
  a.scale = static_cast<float>(scale);
  a.dropout_p = dropout_p;
  if (dropout_p > 0.0) a.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  return a;
}

void set_sizes(Attention& a, const Tensor& q, const Tensor& k, const Tensor& v) {
  FASTGPT_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k, v: expected (B, H, T, D)");
  a.batch = q.size(0), a.heads = q.size(1), a.queries = q.size(2), a.width = q.size(3);
  a.key_heads = k.size(1), a.keys = k.size(2);
  bool fits = k.size(0) == a.batch && k.size(3) == a.width;
  for (int64_t d = 0; d < 4; ++d) fits = fits && v.size(d) == k.size(d);
  FASTGPT_CHECK(fits, "k, v: expected (B, Hkv, Tk, D) to fit q");
  FASTGPT_CHECK(a.heads == 0 ? a.key_heads == 0 : a.key_heads > 0 && a.heads % a.key_heads == 0,
                "k: its heads do not divide those of q");
  FASTGPT_CHECK(storage_of(k, "k") == storage_of(q, "q") && storage_of(v, "v") == storage_of(q, "q"),
                "k, v: expected the dtype of q");
}

// The mask's row of the first query, in a batch of which this call has the sequences from `first_sequence` on.
void set_first_row(Attention& a, int64_t first_sequence) {
  a.first_row = static_cast<uint64_t>(first_sequence * a.heads * a.queries);
}

void set_packed_sizes(Attention& a, const Tensor& qkv, int64_t n_head) {
  FASTGPT_CHECK(qkv.dim() == 3 && n_head > 0 && qkv.size(2) % (3 * n_head) == 0, "qkv: expected (B, T, 3 C)");
  a.batch = qkv.size(0), a.heads = a.key_heads = n_head, a.queries = a.keys = qkv.size(1);
  a.width = qkv.size(2) / (3 * n_head);
}

void check_width(const Attention& a) { FASTGPT_CHECK(a.width > 0 && a.width <= 256, "q: expected a head size in 1..256"); }

using Kernel = void (*)(const Attention&, int64_t, int64_t, float*);

// Calls the kernel for all tasks, each thread with a workspace that begins with a line of the cache.
void run(Kernel kernel, const Attention& a, int64_t tasks, int64_t workspace, int64_t products) {
  if (tasks == 0) return;
  const int64_t sums = products * a.batch * a.heads * a.queries * a.keys * a.width;
  const int64_t grain = std::max<int64_t>(1, SUMS_PER_TASK * tasks / std::max<int64_t>(sums, 1));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t LINE_BYTES = 64;
    size_t bytes = sizeof(float) * static_cast<size_t>(workspace) + LINE_BYTES;
    const std::unique_ptr<char[]> memory(new char[bytes]);
    void* aligned = memory.get();
    std::align(LINE_BYTES, sizeof(float), aligned, bytes);
    kernel(a, begin, end, static_cast<float*>(aligned));
  });
}

void run_forward(const Attention& a, Storage storage) {
  check_width(a);
  run(kernels().attention[storage], a, kernels().attention_tasks(a), kernels().attention_workspace(a), 2);
}

void run_backward(const Attention& a, Storage storage) {
  check_width(a);
  if (a.batch * a.key_heads == 0) return;
  run(kernels().attention_backward[storage], a, a.batch * a.key_heads, kernels().attention_backward_workspace(a), 5);
}

Tensor new_heads(const Tensor& like) {  // (B, H, T, D), in memory (B, T, H, D)
  const Tensor rows = new_buffer(like, {like.size(0), like.size(2), like.size(1), like.size(3)}, /*zeros=*/false);
  return torch::stable::transpose(rows, 1, 2);
}

Tensor new_lse(const Attention& a) { return new_small({a.batch, a.heads, a.queries}, ScalarType::Float); }

void set_lse(Attention& a, const Tensor& lse) {
  FASTGPT_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == a.batch * a.heads * a.queries,
                "lse: expected contiguous float32 (B, H, Tq)");
  a.lse = const_cast<float*>(lse.const_data_ptr<float>());
}

void check_outputs(const Tensor& grad_out, const Tensor& out, const Tensor& like, int64_t count) {
  FASTGPT_CHECK(grad_out.dim() == like.dim() && out.dim() == like.dim() && grad_out.numel() == count && out.numel() == count &&
                    storage_of(grad_out, "grad_out") == storage_of(like, "q") &&
                    storage_of(out, "out") == storage_of(like, "q"),
                "grad_out, out: expected the shape and the dtype of the output");
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& seed,
                                     bool is_causal, double scale, double dropout_p, int64_t first_sequence) {
  Attention a = options(seed, is_causal, scale, dropout_p);
  set_sizes(a, q, k, v);
  set_first_row(a, first_sequence);
  const Tensor q_rows = with_rows_of_heads(q), k_rows = with_rows_of_heads(k), v_rows = with_rows_of_heads(v);
  Tensor out = new_heads(q), lse = new_lse(a);
  a.q = heads_of(q_rows), a.k = heads_of(k_rows), a.v = heads_of(v_rows), a.out = heads_of(out);
  set_lse(a, lse);
  run_forward(a, storage_of(q, "q"));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const std::optional<Tensor>& seed, bool is_causal, double scale,
                                                      double dropout_p, int64_t first_sequence, bool needs_q, bool needs_k,
                                                      bool needs_v) {
  Attention a = options(seed, is_causal, scale, dropout_p);
  set_sizes(a, q, k, v);
  set_first_row(a, first_sequence);
  check_outputs(grad_out, out, q, q.numel());
  const Tensor q_rows = with_rows_of_heads(q), k_rows = with_rows_of_heads(k), v_rows = with_rows_of_heads(v);
  const Tensor grad_rows = with_rows_of_heads(grad_out), out_rows = with_rows_of_heads(out);
  const auto gradient = [](bool needed, const Tensor& x) {
    return needed ? new_heads(x) : new_small({0}, x.scalar_type());
  };
  Tensor grad_q = gradient(needs_q, q), grad_k = gradient(needs_k, k), grad_v = gradient(needs_v, v);
  a.q = heads_of(q_rows), a.k = heads_of(k_rows), a.v = heads_of(v_rows), a.out = heads_of(out_rows);
  a.grad_out = heads_of(grad_rows);
  if (needs_q) a.grad_q = heads_of(grad_q);
  if (needs_k) a.grad_k = heads_of(grad_k);
  if (needs_v) a.grad_v = heads_of(grad_v);
  set_lse(a, lse);
  run_backward(a, storage_of(q, "q"));
  return {grad_q, grad_k, grad_v};
}

std::tuple<Tensor, Tensor> attention_packed(const Tensor& qkv, int64_t n_head, const std::optional<Tensor>& seed,
                                            bool is_causal, double scale, double dropout_p, int64_t first_sequence) {
  Attention a = options(seed, is_causal, scale, dropout_p);
  set_packed_sizes(a, qkv, n_head);
  set_first_row(a, first_sequence);
  const Tensor rows = with_rows_of_heads(qkv);
  Tensor out = new_buffer(qkv, {a.batch, a.queries, n_head * a.width}, /*zeros=*/false), lse = new_lse(a);
  a.q = packed_heads_of(rows, 0, n_head, a.width), a.k = packed_heads_of(rows, 1, n_head, a.width);
  a.v = packed_heads_of(rows, 2, n_head, a.width), a.out = packed_heads_of(out, 0, n_head, a.width);
  set_lse(a, lse);
  run_forward(a, storage_of(qkv, "qkv"));
  return {out, lse};
}

Tensor attention_packed_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                 int64_t n_head, const std::optional<Tensor>& seed, bool is_causal, double scale,
                                 double dropout_p, int64_t first_sequence) {
  Attention a = options(seed, is_causal, scale, dropout_p);
  set_packed_sizes(a, qkv, n_head);
  set_first_row(a, first_sequence);
  check_outputs(grad_out, out, qkv, qkv.numel() / 3);
  const Tensor rows = with_rows_of_heads(qkv), grad_rows = with_rows_of_heads(grad_out), out_rows = with_rows_of_heads(out);
  Tensor grad = new_buffer(qkv, {a.batch, a.queries, 3 * n_head * a.width}, /*zeros=*/false);
  a.q = packed_heads_of(rows, 0, n_head, a.width), a.k = packed_heads_of(rows, 1, n_head, a.width);
  a.v = packed_heads_of(rows, 2, n_head, a.width), a.out = packed_heads_of(out_rows, 0, n_head, a.width);
  a.grad_out = packed_heads_of(grad_rows, 0, n_head, a.width);
  a.grad_q = packed_heads_of(grad, 0, n_head, a.width), a.grad_k = packed_heads_of(grad, 1, n_head, a.width);
  a.grad_v = packed_heads_of(grad, 2, n_head, a.width);
  set_lse(a, lse);
  run_backward(a, storage_of(qkv, "qkv"));
  return grad;
}

}  // namespace fastgpt
