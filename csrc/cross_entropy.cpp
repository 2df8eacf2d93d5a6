// Cross-entropy on the CPU (cross_entropy.h): checks the arguments, divides the rows among threads and adds up the
// losses. The formulas and kernels are in cross_entropy_rows.h.
#include "cross_entropy.h"

#include <cmath>
#include <memory>

namespace fastgpt {
namespace {

constexpr int64_t VALUES_PER_TASK = 16384;  // about 10 us of work; for less, waking a thread takes longer than it saves

// What changes the loss of a row.
struct Options {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

// The rows of a call in the form that the kernels take, and the tensors that they point into.
struct Call {
  Tensor logits, targets;
  std::optional<Tensor> weight, token_weight;
  CrossEntropyRows rows{};
  int64_t n, counted;  // the number of rows, and of those that are not ignored
  Storage storage;
  std::unique_ptr<float[]> scales;  // of each row, where they are not given as a tensor

  Call(const Tensor& given_logits, const Tensor& given_targets, const std::optional<Tensor>& given_weight,
       const std::optional<Tensor>& given_token_weight, const Options& options)
      : logits(given_logits), targets(given_targets), storage(storage_of(given_logits, "logits")) {
    FASTGPT_CHECK(logits.dim() == 2 && targets.dim() == 1 && targets.size(0) == logits.size(0),
                  "logits: expected (N, C) with targets (N,)");
    FASTGPT_CHECK(targets.scalar_type() == ScalarType::Long, "targets: expected int64");
    n = logits.size(0);
    rows.classes = logits.size(1);
    FASTGPT_CHECK(rows.classes > 0, "logits: expected at least one class");
    if (rows.classes > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
    targets = packed(targets);
    rows.logits = logits.const_data_ptr();
    rows.logits_stride = logits.stride(0);
    rows.targets = targets.const_data_ptr<int64_t>();
    rows.ignore_index = options.ignore_index;
    rows.label_smoothing = static_cast<float>(options.label_smoothing);
    rows.z_loss = static_cast<float>(options.z_loss);
    rows.softcap = static_cast<float>(options.softcap);
    rows.class_weight_sum = static_cast<float>(rows.classes);
    if (given_weight.has_value()) {
      weight = packed(*given_weight);
      FASTGPT_CHECK(weight->scalar_type() == ScalarType::Float && weight->dim() == 1 && weight->size(0) == rows.classes,
                    "weight: expected float32 (C,)");
      rows.class_weight = weight->const_data_ptr<float>();
      double sum = 0.0;
      for (int64_t c = 0; c < rows.classes; ++c) sum += rows.class_weight[c];
      rows.class_weight_sum = static_cast<float>(sum);
    }
    if (given_token_weight.has_value()) {
      token_weight = packed(*given_token_weight);
      FASTGPT_CHECK(token_weight->scalar_type() == ScalarType::Float && token_weight->numel() == n,
                    "token_weight: expected float32, one value per target");
    }
    counted = check_range("targets", rows.targets, n, rows.classes, &options.ignore_index);
  }

  bool counts(int64_t i) const { return rows.targets[i] != rows.ignore_index; }

  // The divisor of the reduction "mean": the sum of the weights of the targets that are not ignored.
  double denominator() const {
    if (!rows.class_weight && !token_weight) return static_cast<double>(counted);
    const float* of_token = token_weight ? token_weight->const_data_ptr<float>() : nullptr;
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      if (!counts(i)) continue;
      const double of_class = rows.class_weight ? rows.class_weight[rows.targets[i]] : 1.0;
      sum += of_token ? of_class * of_token[i] : of_class;
    }
    return sum;
  }

  // The scale of every row is scale[i * stride], times its token's weight.
  void scale_rows(const float* scale, int64_t stride) {
    rows.row_scale = scale;
    rows.row_scale_stride = stride;
    if (!token_weight) return;
    scales.reset(new float[static_cast<size_t>(n)]);
    const float* of_token = token_weight->const_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i) scales[static_cast<size_t>(i)] = scale[i * stride] * of_token[i];
    rows.row_scale = scales.get();
    rows.row_scale_stride = 1;
  }

  void weigh_losses() const {
    if (!token_weight) return;
    const float* of_token = token_weight->const_data_ptr<float>();
    for (int64_t i = 0; i < n; ++i)
      if (counts(i)) rows.loss[i] *= of_token[i];
  }

  Tensor start_correct(bool wanted) {
    Tensor correct = new_small({wanted ? n : 0}, ScalarType::Float);
    if (wanted) rows.correct = correct.mutable_data_ptr<float>();
    return correct;
  }

  Tensor start_gradient() {
    Tensor gradient = new_buffer(logits, {n, rows.classes}, /*zeros=*/false);
    rows.gradient = gradient.mutable_data_ptr();
    rows.gradient_stride = rows.classes;
    rows.stream = n * rows.classes * static_cast<int64_t>(gradient.element_size()) > stream_threshold();
    return gradient;
  }

  void run() const {
    const auto kernel = kernels().cross_entropy[storage];
    const int64_t grain = (VALUES_PER_TASK + rows.classes - 1) / rows.classes;
    const auto scratch_size = static_cast<size_t>(kernels().cross_entropy_scratch(rows));
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> scratch(scratch_size > 0 ? new float[scratch_size] : nullptr);
      kernel(rows, begin, end, scratch.get());
    });
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& token_weight, int64_t ignore_index,
                                                 int64_t reduction, double label_smoothing, double z_loss,
                                                 double softcap, bool with_grad, bool with_correct) {
  FASTGPT_CHECK(reduction == NONE || reduction == MEAN || reduction == SUM, "reduction: expected 0, 1 or 2");
  FASTGPT_CHECK(!with_grad || reduction != NONE, "with_grad: a gradient for each loss comes from backward alone");
  Call call(logits, targets, weight, token_weight, {ignore_index, label_smoothing, z_loss, softcap});
  Tensor loss = new_small(reduction == NONE ? std::vector<int64_t>{call.n} : std::vector<int64_t>{}, ScalarType::Float);
  std::unique_ptr<float[]> losses(reduction == NONE ? nullptr : new float[static_cast<size_t>(call.n)]);
  call.rows.loss = losses ? losses.get() : loss.mutable_data_ptr<float>();

  const double denominator = reduction == MEAN ? call.denominator() : 1.0;
  const float row_scale = static_cast<float>(1.0 / denominator);
  call.scale_rows(&row_scale, 0);
  Tensor saved = with_grad ? call.start_gradient() : new_small({call.n, 2}, ScalarType::Float);
  if (!with_grad) call.rows.statistics = saved.mutable_data_ptr<float>();
  Tensor correct = call.start_correct(with_correct);
  call.run();
  call.weigh_losses();
  if (reduction == NONE) return {loss, saved, correct};

  // Four sums, so that an addition does not wait for the one before. They do not depend on the number of threads.
  double sums[4] = {};
  const float* loss_of = call.rows.loss;
  int64_t i = 0;
  for (; i + 4 <= call.n; i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += loss_of[i + k];
  for (; i < call.n; ++i) sums[0] += loss_of[i];
  const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  *loss.mutable_data_ptr<float>() = denominator == 0.0 ? NAN : static_cast<float>(sum / denominator);
  return {loss, saved, correct};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& targets,
                              const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
                              const std::optional<Tensor>& statistics, int64_t ignore_index, int64_t reduction,
                              double label_smoothing, double z_loss, double softcap) {
  Call call(logits, targets, weight, token_weight, {ignore_index, label_smoothing, z_loss, softcap});
  FASTGPT_CHECK(grad_loss.scalar_type() == ScalarType::Float && grad_loss.numel() == (reduction == NONE ? call.n : 1),
                "grad_loss: expected float32, one value per loss");
  const Tensor grad = packed(grad_loss);
  float shared = 0.0f;
  if (reduction == NONE) {
    call.scale_rows(grad.const_data_ptr<float>(), 1);
  } else {
    const float upstream = *grad.const_data_ptr<float>();
    shared = static_cast<float>(reduction == MEAN ? upstream / call.denominator() : upstream);
    call.scale_rows(&shared, 0);
  }
  std::optional<Tensor> known;
  if (statistics.has_value()) {
    FASTGPT_CHECK(statistics->scalar_type() == ScalarType::Float && statistics->numel() == 2 * call.n,
                  "statistics: expected float32, two per row");
    known = packed(*statistics);
    call.rows.known_statistics = known->const_data_ptr<float>();
  }
  Tensor gradient = call.start_gradient();
  call.run();
  return gradient;
}

std::tuple<Tensor, Tensor> cross_entropy_chunk(Tensor logits, const Tensor& targets, const Tensor& row_scale,
                                               int64_t ignore_index, double label_smoothing, double z_loss,
                                               double softcap, bool with_grad, bool with_correct) {
  FASTGPT_CHECK(logits.is_contiguous(), "logits: expected a contiguous chunk");
  FASTGPT_CHECK(row_scale.scalar_type() == ScalarType::Float && row_scale.is_contiguous() &&
                    row_scale.numel() == targets.numel(),
                "row_scale: expected contiguous float32 (n,)");
  Call call(logits, targets, std::nullopt, std::nullopt, {ignore_index, label_smoothing, z_loss, softcap});
  Tensor losses = new_small({call.n}, ScalarType::Float), correct = call.start_correct(with_correct);
  call.rows.loss = losses.mutable_data_ptr<float>();
  call.rows.row_scale = row_scale.const_data_ptr<float>();
  call.rows.row_scale_stride = 1;
  if (with_grad) {  // in place; the gradient stays in the caches, where the products that follow read it
    call.rows.gradient = logits.mutable_data_ptr();
    call.rows.gradient_stride = call.rows.classes;
  }
  call.run();
  return {losses, correct};
}

}  // namespace fastgpt
