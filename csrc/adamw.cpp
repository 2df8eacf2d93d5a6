// The steps of adamw.h: checks the arguments and divides all tensors into pieces for threads. The kernels are in
// adamw_rows.h.
#include "adamw.h"

#include <algorithm>
#include <cmath>

namespace fastgpt {
namespace {

constexpr int64_t PIECE = 16384;  // values of a task

// A part of tensor number `tensor`.
struct Piece {
  size_t tensor;
  int64_t begin, end;
};

std::vector<Piece> pieces_of(const std::vector<Tensor>& tensors) {
  std::vector<Piece> pieces;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t begin = 0; begin < tensors[t].numel(); begin += PIECE)
      pieces.push_back({t, begin, std::min(begin + PIECE, tensors[t].numel())});
  return pieces;
}

void check(const std::vector<Tensor>& tensors, const std::vector<Tensor>& like, const char* name) {
  FASTGPT_CHECK(tensors.size() == like.size(), name, ": expected as many tensors as weights");
  for (size_t t = 0; t < tensors.size(); ++t)
    FASTGPT_CHECK(tensors[t].scalar_type() == ScalarType::Float && tensors[t].is_contiguous() &&
                      tensors[t].numel() == like[t].numel(),
                  name, ": expected contiguous float32 of the sizes of weights");
}

template <class Task>
void for_each_piece(const std::vector<Piece>& pieces, const Task& task) {
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(static_cast<size_t>(i));
  });
}

}  // namespace

Tensor total_norm(const std::vector<Tensor> tensors) {
  check(tensors, tensors, "tensors");
  const std::vector<Piece> pieces = pieces_of(tensors);
  std::vector<double> sums(pieces.size());
  for_each_piece(pieces, [&](size_t i) {
    const Piece& piece = pieces[i];
    sums[i] = kernels().sum_of_squares(tensors[piece.tensor].const_data_ptr<float>() + piece.begin, piece.end - piece.begin);
  });
  double sum = 0.0;
  for (const double of_piece : sums) sum += of_piece;
  Tensor norm = new_small({}, ScalarType::Float);
  norm.mutable_data_ptr<float>()[0] = static_cast<float>(std::sqrt(sum));
  return norm;
}

void adamw(const std::vector<Tensor> weights, const std::vector<Tensor> grads, const std::vector<Tensor> exp_avgs,
           const std::vector<Tensor> exp_avg_sqs, const std::vector<Tensor> steps, double lr, double weight_decay,
           double beta1, double beta2, double eps, double grad_scale) {
  check(weights, weights, "weights"), check(grads, weights, "grads");
  check(exp_avgs, weights, "exp_avgs"), check(exp_avg_sqs, weights, "exp_avg_sqs");
  FASTGPT_CHECK(steps.size() == weights.size(), "steps: expected as many tensors as weights");
  for (const Tensor& step : steps)
    FASTGPT_CHECK(step.scalar_type() == ScalarType::Float && step.numel() == 1, "steps: expected one float32 each");
  std::vector<AdamWRows> rows;
  for (size_t t = 0; t < weights.size(); ++t) {
    const double step = steps[t].mutable_data_ptr<float>()[0] += 1.0f;
    AdamWRows a{};
    a.weight = weights[t].mutable_data_ptr<float>(), a.grad = grads[t].const_data_ptr<float>();
    a.exp_avg = exp_avgs[t].mutable_data_ptr<float>(), a.exp_avg_sq = exp_avg_sqs[t].mutable_data_ptr<float>();
    a.grad_scale = static_cast<float>(grad_scale), a.kept = static_cast<float>(1.0 - lr * weight_decay);
    a.beta1 = static_cast<float>(beta1), a.beta2 = static_cast<float>(beta2), a.eps = static_cast<float>(eps);
    a.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
    a.root_correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
    rows.push_back(a);
  }
  const std::vector<Piece> pieces = pieces_of(weights);
  for_each_piece(pieces, [&](size_t i) { kernels().adamw(rows[pieces[i].tensor], pieces[i].begin, pieces[i].end); });
}

}  // namespace fastgpt
