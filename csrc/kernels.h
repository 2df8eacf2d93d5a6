// The row kernels, compiled once per instruction set, and the table through which the best one is called.
//
// This header and the row kernels know nothing of tensors: the sanitizer driver (tests/sanitize.cpp) links them alone.
#pragma once

#include <cstdint>

namespace fastgpt {

enum Storage { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, STORAGES = 3 };

// The losses of rows of logits, and the gradients where `gradient` is not null. The gradients may overwrite the logits.
struct CrossEntropyRows {
  const void* logits;  // (rows, classes), rows logits_stride values apart
  void* gradient;      // (rows, classes), or null
  int64_t logits_stride, gradient_stride, classes;
  const int64_t* targets;  // (rows), each in [0, classes) or ignore_index
  int64_t ignore_index;
  const float* class_weight;  // (classes), or null for 1
  float class_weight_sum;     // the number of classes where class_weight is null
  float label_smoothing;
  float z_loss;   // times the square of a row's logsumexp is added to its loss
  float softcap;  // the loss is that of softcap * tanh(logits / softcap); 0 for the logits as they are
  const float* row_scale;  // d(result) / d(loss of the row); stride 0 where all rows share one
  int64_t row_scale_stride;
  float* loss;  // (rows), or null where only gradients are wanted
  // (rows, 2): the maximum, and the log of the sum of exp(x - maximum). They are kept apart, because added to a large
  // maximum the log would lose the digits that the loss consists of. Where the known ones are not null, they are read.
  // Else they are computed, and written to `statistics` unless that is null.
  const float* known_statistics;
  float* statistics;
  float* correct;  // (rows): 1 where no logit is larger than the target's, and none before it is equal; else 0. Or null
  bool stream;  // the gradient is larger than the caches, and is written past them
};

// out[i] = token_table[tokens[i]] + position_table[i % length]
struct GatherRows {
  const int64_t* tokens;  // (rows), each a row of token_table
  const void* token_table;
  const void* position_table;  // begins with the row of the first position; or null
  int64_t token_stride, position_stride, length, columns;
  void* out;  // (rows, columns)
  bool stream;  // as in CrossEntropyRows
};

// Every kernel adds gradient rows in the same order: this many sequences at a time, position by position; the last few
// sequences, which are fewer than that, one after the other.
constexpr int SIDE_BY_SIDE = 8;

// out[0 .. columns) = sum over i < count of rows[order ? order[i] : i], added in that order in float32
struct SumRows {
  const void* rows;
  int64_t row_stride;
  const int64_t* order;
  int64_t count, columns;
  void* out;
};

// The gradients of both tables from one pass over columns [begin, end) of the rows, for tables whose sums stay in the
// second-level cache. token_sums (vocab_size, end - begin) and position_sums (length, end - begin) are zeros at first,
// and either may be null.
struct AccumulateRows {
  const void* rows;
  const int64_t* tokens;
  int64_t count, length, vocab_size, columns, begin, end;
  float* token_sums;
  float* position_sums;
  void* token_grad;  // (vocab_size, columns)
  void* position_grad;  // (length, columns)
};

// Rows of one of the storage types, one after the other. They are written to, or only read.
struct TypedRows {
  void* values;  // or null
  Storage type;
};

// h = residual + dropout(x), or without a residual h = x, and its layer norm y. x, residual, h and y are (rows, columns).
struct LayerNormRows {
  TypedRows x, residual, h, y;
  const float *weight, *bias;  // (columns); bias may be null
  float *mean, *rstd;          // (rows), written
  float eps;
  double dropout_p;
  uint64_t seed, first_row;  // the key of the dropout mask, see philox.h, and its row for row 0
  int64_t columns;
};

// The gradients of LayerNormRows. Those that are null are not wanted, and grad_h is null where h has none.
struct LayerNormGradients {
  TypedRows grad_y, grad_h, h, grad_residual, grad_x;
  const float* weight;
  const float *mean, *rstd;
  float *weight_sums, *bias_sums;  // (columns): the gradients of the rows are added
  double dropout_p;
  uint64_t seed, first_row;
  int64_t columns;
};

enum Activation { GELU = 0, GELU_TANH = 1, RELU = 2, RELU2 = 3 };

// out[i] = f(x[i] + bias[i % columns]) for i < values, or where grad is not null, out[i] = grad[i] f'(x[i] + bias[...])
struct ActivationRows {
  Activation kind;
  const void* x;
  const float* bias;  // (columns), or null
  const void* grad;   // or null
  void* out;         // null where only the sums are wanted
  float* bias_sums;  // (columns): sums of out over the rows are added; or null
  int64_t values, columns;
};

// c = a b + bias, or c += a b, in float32: a (rows, depth) and b (depth, columns) of any strides, c with contiguous rows.
struct Matmul {
  const float *a, *b;
  const float* bias;  // (columns), or null; null where c is added to
  float* c;
  int64_t a_row, a_depth, b_depth, b_column, c_row;  // strides, in values
  int64_t rows, columns, depth;
  bool accumulate;
  bool upper;        // leaves out tiles of c that are wholly below its diagonal, where i == j + diagonal
  int64_t diagonal;
};

// out[r][n] = x[r] . weight[n] + bias[n], for a few rows r
struct LinearRows {
  const float* x;      // (rows, depth)
  const void* weight;  // (columns, depth), rows weight_stride values apart
  const void* bias;    // (columns), or null
  void* out;           // (rows, columns), of the dtype of weight; in float32 for linear_to_floats
  int64_t rows, depth, columns, weight_stride;
  bool accumulate;  // out is added to
};

// out[r] = layer_norm(x[r]) in float32
struct NormFloats {
  const float* x;      // (rows, columns)
  const void* weight;  // (columns)
  const void* bias;    // (columns), or null
  float* out;          // (rows, columns)
  int64_t rows, columns;
  float eps;
};

// Where the newest token of a sequence belongs in a cache: in which row, and after how many tokens.
struct CachePlace {
  int64_t row, length;
};

// Causal attention of the newest token of every sequence, whose key and value are first added to a cache. The kernel
// takes pairs of a sequence and a head.
struct AttendNewest {
  const float* qkv;      // (sequences, 3, heads, head_size)
  void *keys, *values;   // (rows of the cache, heads, capacity, head_size)
  float* out;            // (sequences, heads, head_size)
  int64_t heads, head_size, capacity;
  const CachePlace* places;  // (sequences)
};

// out[j] = the sum over i < count of rows[i][j]
struct ColumnSums {
  const float* rows;  // (count, columns)
  float* out;
  int64_t count, columns;
};

// One step of AdamW for consecutive weights.
struct AdamWRows {
  float *weight, *exp_avg, *exp_avg_sq;
  const float* grad;
  float grad_scale;  // multiplies the gradients, which stay as they are
  float kept;        // of a weight: 1 - lr weight_decay
  float beta1, beta2, eps;
  float step_size, root_correction;  // lr / (1 - beta1^step) and 1 / sqrt(1 - beta2^step)
};

// A tensor (B, H, T, D) of which the D values of a row lie side by side; the strides are in values.
struct HeadRows {
  void* data;
  int64_t batch, head, row;
};

// Attention of q (batch, heads, queries, width) over k and v (batch, key_heads, keys, width), as ops/attention.py defines
// it, and its gradients, of which those without data are not asked for.
struct Attention {
  HeadRows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  float* lse;  // (batch, heads, queries): the logsumexp of a row of scores, -inf for a row without keys
  int64_t batch, heads, key_heads, queries, keys, width;
  bool is_causal;
  float scale;
  double dropout_p;
  uint64_t seed, first_row;
};

// The row kernels of one instruction set; those in arrays are one for each Storage.
struct Kernels {
  const char* name;
  int64_t (*count_indices)(const int64_t* indices, int64_t n, int64_t limit, const int64_t* ignored);
  int64_t (*cross_entropy_scratch)(const CrossEntropyRows&);  // the number of values in `scratch`
  void (*cross_entropy[STORAGES])(const CrossEntropyRows&, int64_t begin, int64_t end, float* scratch);
  void (*gather[STORAGES])(const GatherRows&, int64_t begin, int64_t end);
  void (*sum_rows[STORAGES])(const SumRows&);
  void (*accumulate_rows[STORAGES])(const AccumulateRows&);
  void (*layer_norm)(const LayerNormRows&, int64_t begin, int64_t end, float* scratch);  // of 2 * columns values
  void (*layer_norm_gradients)(const LayerNormGradients&, int64_t begin, int64_t end, float* scratch);  // 4 * columns
  void (*activation[STORAGES])(const ActivationRows&, int64_t begin, int64_t end);
  void (*linear[STORAGES])(const LinearRows&, int64_t begin, int64_t end);
  void (*linear_to_floats[STORAGES])(const LinearRows&, int64_t begin, int64_t end);
  void (*norm_floats[STORAGES])(const NormFloats&);
  void (*attend_newest[STORAGES])(const AttendNewest&, int64_t begin, int64_t end);
  void (*widen[STORAGES])(const void* from, float* to, int64_t count);
  void (*narrow[STORAGES])(const float* from, void* to, int64_t count);
  void (*column_sums)(const ColumnSums&, int64_t begin, int64_t end);
  void (*adamw)(const AdamWRows&, int64_t begin, int64_t end);
  double (*sum_of_squares)(const float* values, int64_t count);
  int64_t (*matmul_workspace)(const Matmul&);  // the number of values in `workspace`
  void (*matmul)(const Matmul&, float* workspace);
  int64_t (*attention_tasks)(const Attention&);
  int64_t (*attention_workspace)(const Attention&);  // the number of values; it begins with a line of the cache
  void (*attention[STORAGES])(const Attention&, int64_t begin, int64_t end, float* workspace);
  int64_t (*attention_backward_workspace)(const Attention&);
  void (*attention_backward[STORAGES])(const Attention&, int64_t begin, int64_t end, float* workspace);
};

// The first two are empty, with a null name, where the compiler cannot make such code.
extern const Kernels AVX512_KERNELS;
extern const Kernels AVX2_KERNELS;
extern const Kernels GENERIC_KERNELS;

// The kernels with the widest vectors that this processor has, found once. Tests and benchmarks ask for others by name.
const Kernels& kernels();
bool use_kernels(const char* name);  // false where no kernels of this name run on this processor

// The maker of the processor: "amd", "intel" or "other".
const char* cpu_maker();

}  // namespace fastgpt
