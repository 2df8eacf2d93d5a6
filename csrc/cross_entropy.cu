// Cross-entropy on the GPU: the loss, and the logits' gradient, from one read and one write of main memory.
// cross_entropy_rows.h has the formulas.
//
// What is fused: the maximum and the sum of exp of a row, computed in one pass by the online softmax (Milakov and
// Gimelshein 2018), the loss and the gradient. The gradient needs the maximum and the sum of the whole row. Between the
// two passes, a row is kept where it fits:
//
//     IN_REGISTERS        a short row, in one block of 32 threads: each thread keeps a vector of 16 bytes
//     IN_SHARED_MEMORY    a long row, in the shared memory of one block
//     IN_CLUSTER          a longer row, from sm_90 on, in the shared memories of a cluster of up to eight blocks, each
//                         with a part of the row: up to 1.8 MB on an H100
//     NOWHERE             a row that is longer still is read twice, the second time from the L2 cache where that has
//                         room for it; a row that needs one pass only is not kept either
//
// cross_entropy_plans.cuh says how the number of threads and blocks is chosen.
//
// A row is copied to shared memory in four groups. The first pass goes through a group while later ones arrive, and
// reads only vectors that its own thread has copied, so this needs no barrier. The blocks of a cluster exchange up to
// four numbers, the maximum, the sum of exp, the smoothing term and whether a logit is larger than the target's, by
// writing them to each other's shared memory. Keeping eight vectors in the registers of each thread was tried first, and
// registers spilled.
//
// Both passes take one multiply-add and one exp2 for the exp of a value (struct Exp), and no comparison for each value:
// the first one compares four vectors at a time with the maximum so far, and the second one computes the target's entry
// like the others and corrects it afterwards.
//
// The options of the loss are part of the same passes. z_loss and the weights of tokens change factors of which a row
// has one. A softcap is computed each time a logit is loaded, and the logits are kept as they are: in 16 bits the capped
// ones would be rounded once more, and near the cap they no longer tell the slope of tanh. Its loops are apart from those
// without a softcap, which a call chooses by one branch for each row and pass. Whether the target's logit is the largest
// of its row takes another look at the row, but only where the target's logit is equal to the maximum.
//
// A row may start at any multiple of 2 or 4 bytes, because rows may have any length. Its values before the first
// multiple of 16 bytes, and after the last one, are computed one by one. Where the gradient is not aligned like the
// logits (a view of padded logits has such rows), it is written value by value, from the row that is kept.
#include "cross_entropy_plans.cuh"

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

namespace fastgpt {
namespace {

// The arguments of cross_entropy_kernel.
struct Rows {
  const void* logits;  // (rows, classes)
  void* gradient;      // (rows, classes), contiguous, or null; may be the logits
  int64_t logits_stride, classes;
  const int64_t* targets;
  int64_t ignore_index;
  const float* token_weight;      // (rows), or null for 1
  const float* class_weight;      // (classes), or null for 1
  const float* class_weight_sum;  // null where class_weight is; then the sum is `classes`
  float label_smoothing, z_loss;
  float softcap, one_over_softcap;  // 0 for none
  const float* row_scale;           // d(result) / d(loss of the row), or null for 1
  int64_t row_scale_stride;
  const float* denominator;  // divides row_scale; or null for 1
  float* loss;               // (rows), or null
  float* correct;            // (rows): 1 where the target's logit is the largest, of equal ones the first, or null
  // (rows, 2): the maximum, and the log of the sum of exp(x - maximum). Where the known ones are not null, they are
  // read. Else they are computed, and written to `statistics` unless that is null.
  const float* known_statistics;
  float* statistics;
};

constexpr float LOG2_E = 1.44269504f;

// exp(value - max) of a row's values, times a constant, by one multiply-add and one exp2. The constant is
// 2^exponent(max), and not 1, because max * LOG2_E is rounded.
//
// Two different numbers beyond 2^30 are at least 128 apart, and exp(-128) is 0 in float32. There the factor is 1: the
// difference is exact then, and the product cannot overflow.
struct Exp {
  float factor, base;

  __device__ explicit Exp(float max) : factor(fabsf(max) > 0x1p30f ? 1.0f : LOG2_E), base(max * factor) {}
  __device__ __forceinline__ float exponent(float value) const { return fmaf(value, factor, -base); }
  __device__ __forceinline__ float operator()(float value) const { return exp2_approx(exponent(value)); }
};

// The logits as they are given, or with a softcap, softcap * tanh(value / softcap). STEP is how many vectors a thread
// takes at a time in the first pass.
struct AsGiven {
  static constexpr int STEP = 4;

  __device__ __forceinline__ float operator()(float value) const { return value; }
};

// With e = exp(-2 |u|), tanh |u| is (1 - e) / (1 + e), and its derivative is 4 e / (1 + e)^2. Where tanh is near 1, this
// derivative has all its digits, and 1 - tanh^2 would have lost them. Where |u| is small, tanh itself would lose digits.
// There it is a polynomial, a minimax fit with a relative error of 4e-8.
struct Softcap {
  static constexpr int STEP = 1;  // so many instructions for each value hide the time of a load

  float cap, inverse;
  struct Capped {
    float value, slope;  // the slope is d(value) / d(logit)
  };

  __device__ explicit Softcap(const Rows& a) : cap(a.softcap), inverse(a.one_over_softcap) {}

  __device__ __forceinline__ Capped of(float value) const {
    const float u = value * inverse, square = u * u;
    const float e = exp2_approx(-2.0f * LOG2_E * fabsf(u));
    const float r = reciprocal_approx(1.0f + e), part = e * r;
    float small = fmaf(square, 0.016437383f, -0.052671712f);
    small = fmaf(square, small, 0.13320723f);
    small = fmaf(square, small, -0.33332947f);
    small = fmaf(square * small, u, u);
    return {cap * (fabsf(u) < 0.55f ? small : copysignf(r - part, u)), 4.0f * part * r};
  }
  __device__ __forceinline__ float operator()(float value) const { return of(value).value; }
};

// The maximum of some values, and the sum of exp(value - max) over them. Without values, the maximum is the least
// finite number: unlike -inf, it can be subtracted from everything.
struct Online {
  float max = -FLT_MAX, sum = 0.0f;
};

__device__ __forceinline__ void merge(Online& a, Online b) {
  const float larger = fmaxf(a.max, b.max);
  a.sum = a.sum * __expf(a.max - larger) + b.sum * __expf(b.max - larger);
  a.max = larger;
}

// The same of a thread's values, while it goes through them.
struct Running {
  float max = -FLT_MAX, sum = 0.0f;  // the sum is that of exp(value)
  Exp exp{max};

  __device__ __forceinline__ void raise_to(float largest) {
    if (!(largest > max)) return;  // almost always, after the first vectors
    const Exp next(largest);
    sum *= exp2_approx(next.exponent(max) - exp.exponent(max));
    max = largest;
    exp = next;
  }
  __device__ __forceinline__ void add(float value) {
    raise_to(value);
    sum += exp(value);
  }
  template <class Logit, class T, int COUNT>
  __device__ __forceinline__ void add(const Logit& logit, const Vec16<T> (&vectors)[COUNT]) {
    Vec16<T> most = vectors[0];
#pragma unroll
    for (int i = 1; i < COUNT; ++i) most = larger(most, vectors[i]);
    float values[Vec16<T>::SIZE];
    to_floats(most, values);
    float largest = values[0];
#pragma unroll
    for (int j = 1; j < Vec16<T>::SIZE; ++j) largest = fmaxf(largest, values[j]);
    raise_to(logit(largest));
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      to_floats(vectors[i], values);
      float part = exp(logit(values[0]));
#pragma unroll
      for (int j = 1; j < Vec16<T>::SIZE; ++j) part += exp(logit(values[j]));
      sum += part;
    }
  }
  __device__ Online result() const { return {max, sum * exp2_approx(-exp.exponent(max))}; }
};

__device__ __forceinline__ void merge(float& a, float b) { a += b; }
__device__ __forceinline__ void merge(int& a, int b) { a |= b; }

template <class Number>
__device__ __forceinline__ Number of_lane(Number own, int offset) {
  return __shfl_xor_sync(~0u, own, offset);
}

__device__ __forceinline__ Online of_lane(Online own, int offset) {
  return {of_lane(own.max, offset), of_lane(own.sum, offset)};
}

// The blocks of a row, where one block has the whole row.
struct OneBlock {
  __device__ static constexpr unsigned rank() { return 0; }
  __device__ static constexpr unsigned size() { return 1; }
  __device__ static void arrive() {}
  __device__ static void wait() {}
  template <class Part>
  __device__ static Part join(Part own) {
    return own;
  }
};

// The blocks of a row, where they are a cluster. Every block of the cluster calls these functions, in the same order.
#if __CUDA_ARCH__ >= 900
struct Cluster {
  cooperative_groups::cluster_group blocks = cooperative_groups::this_cluster();

  __device__ unsigned rank() const { return blocks.block_rank(); }
  __device__ unsigned size() const { return blocks.num_blocks(); }

  // After wait(), all blocks of the cluster have begun to run. Before that, the shared memory of another block must not
  // be written to.
  __device__ void arrive() const { blocks.barrier_arrive(); }
  __device__ void wait() const { blocks.barrier_wait(); }

  // Merges the values of the blocks to the value of the row. `own` is the block's value, the same in all of its
  // threads. Each type has one array, so this is called at most once for each type. Blocks write to each other's memory
  // before the barrier and read only their own after it, so a block may end while others still read.
  template <class Part>
  __device__ Part join(Part own) const {
    __shared__ Part parts[LARGEST_CLUSTER];
    if (threadIdx.x < size()) *blocks.map_shared_rank(&parts[rank()], static_cast<int>(threadIdx.x)) = own;
    blocks.sync();
    own = parts[0];
    for (unsigned block = 1; block < size(); ++block) merge(own, parts[block]);
    return own;
  }
};
#else
struct Cluster : OneBlock {
  __device__ Cluster() { __trap(); }  // never runs, because can_cluster() allows no such launch
};
#endif

// Merges the values of the threads to the value of the row, which every thread gets: first those of the lanes, then of
// the warps, then of the blocks, always in the same order.
template <int THREADS, class Blocks, class Part>
__device__ Part reduce(const Blocks& blocks, Part own) {
  for (int offset = 16; offset > 0; offset /= 2) merge(own, of_lane(own, offset));
  if constexpr (THREADS > 32) {
    __shared__ Part warps[THREADS / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
    __syncthreads();
    own = warps[0];
    for (int warp = 1; warp < THREADS / 32; ++warp) merge(own, warps[warp]);
  }
  return blocks.join(own);
}

// Where a row is kept between two passes: see the top of this file.
enum Held { IN_REGISTERS, IN_SHARED_MEMORY, IN_CLUSTER, NOWHERE };

constexpr int COPY_GROUPS = 4;  // the first of them is computed while the others are being copied

// 64 registers for each thread of 1024 on a multiprocessor, where a warp has more than one vector for each lane.
template <class T, int THREADS, Held HELD>
__global__ void __launch_bounds__(THREADS, THREADS == 32 ? 32 : 1024 / THREADS) cross_entropy_kernel(const Rows a) {
  constexpr int SIZE = Vec16<T>::SIZE;
  constexpr bool COPIED = HELD == IN_SHARED_MEMORY || HELD == IN_CLUSTER;
  const std::conditional_t<HELD == IN_CLUSTER, Cluster, OneBlock> blocks;
  const int64_t row = blockIdx.x / blocks.size(), n = a.classes;
  const T* x = static_cast<const T*>(a.logits) + row * a.logits_stride;
  T* out = a.gradient ? static_cast<T*>(a.gradient) + row * n : nullptr;
  const int64_t target = a.targets[row];
  const int tid = threadIdx.x;
  const bool first = tid == 0 && blocks.rank() == 0;  // writes the values of which a row has one
  const int row_tid = blocks.rank() * THREADS + tid, row_threads = blocks.size() * THREADS;

  if (target == a.ignore_index) {
    if (first && a.loss) a.loss[row] = 0.0f;
    if (first && a.correct) a.correct[row] = 0.0f;
    if (row_tid < 2 && a.statistics) a.statistics[2 * row + row_tid] = 0.0f;
    if (out)
      for (int64_t i = row_tid; i < n; i += row_threads) out[i] = from_float<T>(0.0f);
    return;
  }
  assert(target >= 0 && target < n && "target out of range");

  // The row is [0, head), then vectors, then [end, n). The values outside the vectors are few, and are computed one by
  // one. So are all values of a short row whose gradient is not aligned like its logits.
  const bool together = out == nullptr || (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(out)) % 16 == 0;
  const int64_t head = HELD != IN_REGISTERS || together ? min(values_before_alignment(x), n) : n;
  const int64_t vectors = (n - head) / SIZE, in_vectors = vectors * SIZE;
  const int outside = n - in_vectors;
  const auto odd = [&](const auto& visit) {  // visits this thread's values outside the vectors
#pragma unroll 1
    for (int o = row_tid; o < outside; o += row_threads) visit(o < head ? o : o + in_vectors);
  };

  using Index = std::conditional_t<HELD == NOWHERE, int64_t, int>;  // an int counts the vectors of a kept row
  const int64_t part = (vectors + blocks.size() - 1) / blocks.size(), before = min(blocks.rank() * part, vectors);
  const int64_t origin = head + before * SIZE;                        // where the vectors of this block begin
  const auto mine = static_cast<Index>(min(part, vectors - before));  // how many they are, perhaps none
  extern __shared__ uint4 shared[];
  auto* held = reinterpret_cast<Vec16<T>*>(shared);
  Vec16<T> own_vector;
  if (HELD == IN_REGISTERS && tid < mine) own_vector = load16(x + origin + tid * SIZE);
  const auto vector_at = [&](Index v) {
    return HELD == IN_REGISTERS ? own_vector : HELD == NOWHERE ? load16(x + origin + v * SIZE) : held[v];
  };

  // Visits this thread's values one by one, for what is not computed in most calls.
  const auto each_value = [&](const auto& visit) {
#pragma unroll 1
    for (Index v = tid; v < mine; v += THREADS) {
      const Vec16<T> vec = vector_at(v);
#pragma unroll
      for (int j = 0; j < SIZE; ++j) visit(to_float(vec.values[j]), origin + v * SIZE + j);
    }
    odd([&](int64_t i) { visit(to_float(x[i]), i); });
  };
  const auto capped = [&](float value) { return a.softcap > 0.0f ? Softcap(a)(value) : value; };

  const float x_target = to_float(x[target]), logit_target = capped(x_target);
  Online all;  // of the row
  float log_sum;
  if (!COPIED && a.known_statistics) {
    all.max = a.known_statistics[2 * row];
    log_sum = a.known_statistics[2 * row + 1];
    all.sum = expf(log_sum);
  } else {
    const auto first_pass = [&](const auto& logit) {
      constexpr int STEP = std::decay_t<decltype(logit)>::STEP;
      Running own;
      const auto add = [&](Index v, Index stop) {  // adds the vectors v, v + THREADS, ... before `stop`
        if constexpr (STEP > 1 && HELD != IN_REGISTERS) {
          for (; v + (STEP - 1) * THREADS < stop; v += STEP * THREADS) {
            Vec16<T> step[STEP];
#pragma unroll
            for (int i = 0; i < STEP; ++i) step[i] = vector_at(v + i * THREADS);
            own.add(logit, step);
          }
        }
#pragma unroll 1
        for (; v < stop; v += THREADS) {
          const Vec16<T> step[1] = {vector_at(v)};
          own.add(logit, step);
        }
      };
      if constexpr (COPIED) {
        const Index step = STEP * THREADS, group = (mine + COPY_GROUPS * step - 1) / (COPY_GROUPS * step) * step;
        blocks.arrive();
        for (int i = 0; i < COPY_GROUPS; ++i) {
          for (Index v = i * group + tid; v < min((i + 1) * group, mine); v += THREADS)
            __pipeline_memcpy_async(&held[v], x + origin + v * SIZE, sizeof(Vec16<T>));  // bypasses registers
          __pipeline_commit();
        }
        odd([&](int64_t i) { own.add(logit(to_float(x[i]))); });
        for (int i = 0; i < COPY_GROUPS; ++i) {
          __pipeline_wait_prior(COPY_GROUPS - 1 - i);
          add(i * group + tid, min((i + 1) * group, mine));
        }
        blocks.wait();
      } else {
        add(tid, mine);
        odd([&](int64_t i) { own.add(logit(to_float(x[i]))); });
      }
      return own.result();
    };
    all = reduce<THREADS>(blocks, a.softcap == 0.0f ? first_pass(AsGiven()) : first_pass(Softcap(a)));
    log_sum = logf(all.sum);
    if (first && a.statistics) {
      a.statistics[2 * row] = all.max;
      a.statistics[2 * row + 1] = log_sum;
    }
  }
  const float smooth_each = a.label_smoothing / static_cast<float>(n);
  const float weight = (1.0f - a.label_smoothing) * (a.class_weight ? a.class_weight[target] : 1.0f);
  const float token_weight = a.token_weight ? a.token_weight[row] : 1.0f;
  const float log_sum_exp = all.max + log_sum;

  if (a.loss) {
    float smoothing = 0.0f;
    if (a.label_smoothing > 0.0f) {
      each_value([&](float value, int64_t i) {
        smoothing += (log_sum - (capped(value) - all.max)) * (a.class_weight ? a.class_weight[i] : 1.0f);
      });
      smoothing = reduce<THREADS>(blocks, smoothing) * smooth_each;
    }
    float loss = smoothing - weight * ((logit_target - all.max) - log_sum);
    if (a.z_loss > 0.0f) loss += a.z_loss * log_sum_exp * log_sum_exp;
    if (first) a.loss[row] = token_weight * loss;
  }
  if (a.correct) {
    // A target below the maximum is not the largest. Capped, it must be below by more than rounding. A maximum of
    // -FLT_MAX may be that of no value. In a row with a NaN, no value is the largest.
    const bool below = logit_target < all.max - 1e-6f * a.softcap && all.max > -FLT_MAX;
    int beaten = below || x_target != x_target;
    if (!beaten) {
      each_value([&](float value, int64_t i) {
        if (i != target) beaten |= i < target ? !(value < x_target) : !(value <= x_target);
      });
      beaten = reduce<THREADS>(blocks, beaten);
    }
    if (first) a.correct[row] = beaten ? 0.0f : 1.0f;
  }
  if (out == nullptr) return;

  // The gradient may overwrite the logits, so that all threads must have read x[target] before. Where there are more
  // threads than 32, a barrier of `reduce` has ensured that.
  if constexpr (THREADS == 32) __syncwarp();
  float g = token_weight * (a.row_scale ? a.row_scale[row * a.row_scale_stride] : 1.0f);
  if (a.denominator) g /= *a.denominator;
  const float weights = a.class_weight_sum ? *a.class_weight_sum : static_cast<float>(n);
  float of_p = a.label_smoothing > 0.0f ? weight + smooth_each * weights : weight;  // the factor of p[j]
  if (a.z_loss > 0.0f) of_p += 2.0f * a.z_loss * log_sum_exp;
  const float scale = g * of_p;
  const float smooth = g * smooth_each;
  const Exp exp(all.max);
  const float each = scale / all.sum * exp2_approx(-exp.exponent(all.max));
  // Writes gradient(value, i, 0), and after that the target's entry again, which is smaller by the last argument.
  const auto write = [&](const auto& gradient) {
    bool has_target = false;  // whether this thread has written the target's entry
    if (together) {
      constexpr int UNROLLED = HELD == IN_REGISTERS ? 1 : 2;
#pragma unroll UNROLLED
      for (Index v = tid; v < mine; v += THREADS) {
        float values[SIZE];
        to_floats(vector_at(v), values);
        Vec16<T> result;
#pragma unroll
        for (int j = 0; j < SIZE; ++j)
          result.values[j] = from_float<T>(gradient(values[j], origin + v * SIZE + j, 0.0f));
        store16(out + origin + v * SIZE, result);
      }
      has_target = target >= origin && target < origin + mine * SIZE && (target - origin) / SIZE % THREADS == tid;
    } else if constexpr (HELD != IN_REGISTERS) {
      // Neighbouring threads write neighbouring values. Other threads have copied them, before a barrier of `reduce`.
      const T* values = COPIED ? held->values : x + origin;
#pragma unroll 4
      for (Index i = tid; i < mine * SIZE; i += THREADS)
        out[origin + i] = from_float<T>(gradient(to_float(values[i]), origin + i, 0.0f));
      has_target = target >= origin && target < origin + mine * SIZE && (target - origin) % THREADS == tid;
    }
    odd([&](int64_t i) {
      out[i] = from_float<T>(gradient(to_float(x[i]), i, 0.0f));
      has_target |= i == target;
    });
    if (has_target) out[target] = from_float<T>(gradient(x_target, target, g * weight));
  };
  const auto weighted = [&](int64_t i) { return smooth != 0.0f && a.class_weight ? a.class_weight[i] : 1.0f; };
  if (a.softcap > 0.0f)
    write([&](float value, int64_t i, float less) {
      const Softcap::Capped logit = Softcap(a).of(value);
      return (fmaf(exp(logit.value), each, -smooth * weighted(i)) - less) * logit.slope;
    });
  else if (smooth != 0.0f && a.class_weight)
    write([&](float value, int64_t i, float less) {
      return fmaf(exp(value), each, -smooth * a.class_weight[i]) - less;
    });
  else
    write([&](float value, int64_t, float less) { return fmaf(exp(value), each, -smooth) - less; });
}

// The weight of each row in the mean. A target out of range fails here, before memory is read at the place it names.
__global__ void row_weights_kernel(const int64_t* targets, const float* token_weight, const float* class_weight,
                                   float* weights, int64_t n, int64_t classes, int64_t ignore_index) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= n) return;
  const int64_t target = targets[row];
  const bool counted = target != ignore_index;
  assert((!counted || (target >= 0 && target < classes)) && "target out of range");
  const float weight = class_weight && counted ? class_weight[target] : 1.0f;
  weights[row] = !counted ? 0.0f : token_weight ? token_weight[row] * weight : weight;
}

// The mean, from the sum of the losses; NaN where the weights add up to 0, as in PyTorch.
__global__ void divide_kernel(float* loss, const float* denominator) {
  *loss = *denominator == 0.0f ? NAN : *loss / *denominator;
}

// gradient *= scale. Where scale is 1, which only the device knows, the gradient is neither read nor written. Zeros
// stay zeros whatever the scale is, because those of ignored rows have to.
template <class T>
__global__ void __launch_bounds__(256) scale_kernel(T* gradient, const float* scale, int64_t n) {
  const float factor = *scale;
  if (factor == 1.0f) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * 256;
  const int64_t head = min(values_before_alignment(gradient), n);
  const int64_t vectors = (n - head) / Vec16<T>::SIZE, in_vectors = vectors * Vec16<T>::SIZE;
  for (int64_t v = first; v < vectors; v += stride) {
    Vec16<T> vec = load16(gradient + head + v * Vec16<T>::SIZE);
#pragma unroll
    for (int j = 0; j < Vec16<T>::SIZE; ++j) {
      const float value = to_float(vec.values[j]);
      vec.values[j] = value == 0.0f ? vec.values[j] : from_float<T>(value * factor);
    }
    store16(gradient + head + v * Vec16<T>::SIZE, vec);
  }
  for (int64_t odd = first; odd < n - in_vectors; odd += stride) {
    T& at = gradient[odd < head ? odd : odd + in_vectors];
    const float value = to_float(at);
    if (value != 0.0f) at = from_float<T>(value * factor);
  }
}

using Kernel = void (*)(Rows);

// The kernel of a plan, or null where there is none.
template <class T>
Kernel kernel_of(Plan plan) {
  const bool in_cluster = plan.blocks == 2 || plan.blocks == 4 || plan.blocks == LARGEST_CLUSTER;
  switch (plan.threads) {
    case 32:
      return plan.blocks == 1 ? cross_entropy_kernel<T, 32, IN_REGISTERS> : nullptr;
    case 128:
      return plan.blocks == 0   ? cross_entropy_kernel<T, 128, NOWHERE>
             : plan.blocks == 1 ? cross_entropy_kernel<T, 128, IN_SHARED_MEMORY>
                                : nullptr;
    case 256:
      return plan.blocks == 0   ? cross_entropy_kernel<T, 256, NOWHERE>
             : plan.blocks == 1 ? cross_entropy_kernel<T, 256, IN_SHARED_MEMORY>
             : in_cluster       ? cross_entropy_kernel<T, 256, IN_CLUSTER>
                                : nullptr;
    case 512:
      return plan.blocks == 0   ? cross_entropy_kernel<T, 512, NOWHERE>
             : plan.blocks == 1 ? cross_entropy_kernel<T, 512, IN_SHARED_MEMORY>
             : in_cluster       ? cross_entropy_kernel<T, 512, IN_CLUSTER>
                                : nullptr;
    default:
      return nullptr;
  }
}

template <class T>
const void* code_of(Plan plan) {
  return reinterpret_cast<const void*>(kernel_of<T>(plan));
}

// Why a plan cannot compute rows of up to so many bytes here, or null.
template <class T>
const char* reason_against(Plan plan, int64_t passes, int64_t row_bytes) {
  PlanDevice& device = PlanDevice::current();
  if (!kernel_of<T>(plan))
    return "expected (threads, blocks) to be (32, 1), or 128, 256 or 512 threads with 0 blocks or 1, or 256 or 512 "
           "threads with 2, 4 or 8 blocks";
  if (plan.in_registers()) return row_bytes <= 32 * 16 ? nullptr : "32 threads keep at most 512 bytes of a row";
  if (passes == 1) return plan.blocks == 0 ? nullptr : "a row that is read once is not kept: expected 0 blocks";
  if (plan.shared_bytes(row_bytes) > device.of_block) return "this device has less shared memory for a block";
  if (plan.blocks > 1 && !device.can_cluster(code_of<T>(plan), plan, row_bytes))
    return "this device, or this build, has no such clusters";
  return nullptr;
}

// A warp for a row of up to 32 vectors, then 128 threads up to 512 vectors, which are four for each thread, then 512. A
// row that is read more than once is kept by the fewest blocks (1, 2, 4, 8) such that a multiprocessor has room for two
// of these blocks, so that one of them computes, or waits for its cluster, while the other one moves memory. Where
// eight blocks are too few for that, by the fewest such that a multiprocessor has room for one block, and where eight
// are too few even for that, nowhere. These choices follow from such arguments. On an H100, other plans were measured
// to be faster for two kinds of rows; triton_kernels/tuned_cuda.toml has those.
template <class T>
Plan default_plan(int64_t passes, int64_t row_bytes, int64_t rows) {
  if (row_bytes <= 32 * 16) return {32, 1};
  const int threads = row_bytes <= 512 * 16 ? 128 : 512;
  if (passes == 1) return {threads, 0};
  const PlanDevice& device = PlanDevice::current();
  for (const int64_t limit : {device.of_half, device.of_block}) {
    for (int blocks = 1; blocks <= LARGEST_CLUSTER && rows * blocks < int64_t{1} << 31; blocks *= 2) {
      const Plan plan{blocks == 1 ? threads : 512, blocks};
      if (plan.shared_bytes(row_bytes) <= limit && !reason_against<T>(plan, passes, row_bytes)) return plan;
    }
  }
  return {threads, 0};
}

template <class T>
Plan plan_for(int64_t passes, int64_t classes, int64_t rows) {
  constexpr int64_t size = sizeof(T);
  const std::optional<Plan> planned = PlanDevice::current().planned(size, passes, classes);
  if (planned && rows * planned->blocks < int64_t{1} << 31) return *planned;
  return default_plan<T>(passes, classes * size, rows);
}

template <class T>
void launch(const Rows& rows, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const bool smooths = rows.loss && rows.label_smoothing > 0.0f;
  const int passes =
      (rows.known_statistics ? 0 : 1) + (smooths ? 1 : 0) + (rows.correct ? 1 : 0) + (rows.gradient ? 1 : 0);
  const Plan plan = plan_for<T>(std::min(passes, 2), rows.classes, n);
  const Launch grid(plan, n, rows.classes * static_cast<int64_t>(sizeof(T)), stream);
  if (grid.config.dynamicSmemBytes > 0) PlanDevice::current().prepare(code_of<T>(plan));
  STD_CUDA_CHECK(cudaLaunchKernelEx(&grid.config, kernel_of<T>(plan), rows));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The options of a call that are numbers. A softcap of 0 is none.
struct Options {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

// The rows of a call in the form that the kernel takes, and the tensors that they point into.
struct Call {
  Tensor logits, targets;
  std::optional<Tensor> weight, weight_sum, token_weight, denominator;
  Rows rows{};
  int64_t n;
  cudaStream_t stream;

  Call(const Tensor& given_logits, const Tensor& given_targets, const std::optional<Tensor>& given_weight,
       const std::optional<Tensor>& given_token_weight, const Options& options)
      : logits(given_logits), targets(torch::stable::contiguous(given_targets)), stream(current_stream(given_logits)) {
    FASTGPT_CHECK(logits.dim() == 2 && targets.dim() == 1 && targets.size(0) == logits.size(0) && logits.size(1) > 0,
                  "logits: expected (N, C), at least one class, with targets (N,)");
    FASTGPT_CHECK(targets.scalar_type() == ScalarType::Long, "targets: expected int64");
    n = logits.size(0);
    FASTGPT_CHECK(n < (int64_t{1} << 31), "logits: expected fewer than 2^31 rows");
    rows.classes = logits.size(1);
    if (rows.classes > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
    rows.logits = logits.const_data_ptr();
    rows.logits_stride = logits.stride(0);
    rows.targets = targets.const_data_ptr<int64_t>();
    rows.ignore_index = options.ignore_index;
    rows.label_smoothing = static_cast<float>(options.label_smoothing);
    rows.z_loss = static_cast<float>(options.z_loss);
    rows.softcap = static_cast<float>(options.softcap);
    rows.one_over_softcap = rows.softcap > 0.0f ? 1.0f / rows.softcap : 0.0f;
    if (given_weight.has_value()) {
      weight = torch::stable::contiguous(*given_weight);
      FASTGPT_CHECK(weight->scalar_type() == ScalarType::Float && weight->dim() == 1 &&
                        weight->size(0) == rows.classes,
                    "weight: expected float32 (C,)");
      weight_sum = torch::stable::sum(*weight);
      rows.class_weight = weight->const_data_ptr<float>();
      rows.class_weight_sum = weight_sum->const_data_ptr<float>();
    }
    if (given_token_weight.has_value()) {
      token_weight = torch::stable::contiguous(*given_token_weight);
      FASTGPT_CHECK(
          token_weight->scalar_type() == ScalarType::Float && token_weight->dim() == 1 && token_weight->size(0) == n,
          "token_weight: expected float32 (N,)");
      rows.token_weight = token_weight->const_data_ptr<float>();
    }
  }

  // For each row 1 or 0, or no tensor of rows where nobody has asked for it.
  Tensor start_correct(bool with_correct) {
    Tensor correct = torch::stable::new_empty(logits, {with_correct ? n : 0}, ScalarType::Float);
    if (with_correct) rows.correct = correct.mutable_data_ptr<float>();
    return correct;
  }

  // For the reduction "mean": the denominator is the sum of the weights of the rows.
  void divide_by_weights() {
    Tensor weights = torch::stable::new_empty(logits, {n}, ScalarType::Float);
    if (n > 0) {
      row_weights_kernel<<<static_cast<unsigned>((n + 255) / 256), 256, 0, stream>>>(
          rows.targets, rows.token_weight, rows.class_weight, weights.mutable_data_ptr<float>(), n, rows.classes,
          rows.ignore_index);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    denominator = torch::stable::sum(weights);
    rows.denominator = denominator->const_data_ptr<float>();
  }

  void run() const {
    by_type(logits, "logits", [&](auto* type) { launch<std::remove_pointer_t<decltype(type)>>(rows, n, stream); });
  }
};

constexpr int64_t NONE = 0, MEAN = 1;  // the numbers that PyTorch gives the reductions

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets,
                                                 const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& token_weight, int64_t ignore_index,
                                                 int64_t reduction, double label_smoothing, double z_loss,
                                                 double softcap, bool with_grad, bool with_correct) {
  const auto guard = guard_device({"logits", logits},
                                  {{"targets", targets}, {"weight", weight}, {"token_weight", token_weight}});
  FASTGPT_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0, 1 or 2");
  FASTGPT_CHECK(!with_grad || reduction != NONE, "with_grad: a gradient for each loss comes from backward alone");
  Call call(logits, targets, weight, token_weight, {ignore_index, label_smoothing, z_loss, softcap});
  Tensor losses = torch::stable::new_empty(logits, {call.n}, ScalarType::Float);
  const Tensor correct = call.start_correct(with_correct);
  Tensor saved = with_grad ? torch::stable::new_empty(logits, {call.n, call.rows.classes})
                           : torch::stable::new_empty(logits, {call.n, 2}, ScalarType::Float);
  call.rows.loss = losses.mutable_data_ptr<float>();
  if (with_grad) {
    call.rows.gradient = saved.mutable_data_ptr();
  } else {
    call.rows.statistics = saved.mutable_data_ptr<float>();
  }
  if (reduction == MEAN) call.divide_by_weights();
  call.run();
  if (reduction == NONE) return {losses, saved, correct};
  Tensor loss = torch::stable::sum(losses);
  if (reduction == MEAN) {
    divide_kernel<<<1, 1, 0, call.stream>>>(loss.mutable_data_ptr<float>(), call.rows.denominator);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {loss, saved, correct};
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& targets,
                              const std::optional<Tensor>& weight, const std::optional<Tensor>& token_weight,
                              const std::optional<Tensor>& statistics, int64_t ignore_index, int64_t reduction,
                              double label_smoothing, double z_loss, double softcap) {
  const auto guard = guard_device({"logits", logits}, {{"targets", targets},
                                                       {"weight", weight},
                                                       {"token_weight", token_weight},
                                                       {"grad_loss", grad_loss},
                                                       {"statistics", statistics}});
  Call call(logits, targets, weight, token_weight, {ignore_index, label_smoothing, z_loss, softcap});
  FASTGPT_CHECK(grad_loss.scalar_type() == ScalarType::Float && grad_loss.numel() == (reduction == NONE ? call.n : 1),
                "grad_loss: expected float32, one value per loss");
  const Tensor grad = torch::stable::contiguous(grad_loss);
  Tensor gradient = torch::stable::new_empty(logits, {call.n, call.rows.classes});
  call.rows.row_scale = grad.const_data_ptr<float>();
  call.rows.row_scale_stride = reduction == NONE ? 1 : 0;
  std::optional<Tensor> known;
  if (statistics.has_value()) {
    FASTGPT_CHECK(statistics->scalar_type() == ScalarType::Float && statistics->numel() == 2 * call.n,
                  "statistics: expected float32, two per row");
    known = torch::stable::contiguous(*statistics);
    call.rows.known_statistics = known->const_data_ptr<float>();
  }
  call.rows.gradient = gradient.mutable_data_ptr();
  if (reduction == MEAN) call.divide_by_weights();
  call.run();
  return gradient;
}

std::tuple<Tensor, Tensor> cross_entropy_chunk(Tensor logits, const Tensor& targets, const Tensor& row_scale,
                                               int64_t ignore_index, double label_smoothing, double z_loss,
                                               double softcap, bool with_grad, bool with_correct) {
  const auto guard = guard_device({"logits", logits}, {{"targets", targets}, {"row_scale", row_scale}});
  FASTGPT_CHECK(logits.is_contiguous() && row_scale.scalar_type() == ScalarType::Float && row_scale.is_contiguous() &&
                    row_scale.numel() == targets.numel(),
                "logits, row_scale: expected a contiguous chunk and float32 (n,)");
  Call call(logits, targets, std::nullopt, std::nullopt, {ignore_index, label_smoothing, z_loss, softcap});
  Tensor losses = torch::stable::new_empty(logits, {call.n}, ScalarType::Float);
  const Tensor correct = call.start_correct(with_correct);
  call.rows.loss = losses.mutable_data_ptr<float>();
  call.rows.row_scale = row_scale.const_data_ptr<float>();
  call.rows.row_scale_stride = 1;
  if (with_grad) call.rows.gradient = logits.mutable_data_ptr();
  call.run();
  return {losses, correct};
}

void scale_gradient(Tensor gradient, const Tensor& scale) {
  const auto guard = guard_device({"gradient", gradient}, {{"scale", scale}});
  FASTGPT_CHECK(gradient.is_contiguous() && scale.numel() == 1 && scale.scalar_type() == ScalarType::Float,
                "gradient, scale: expected a contiguous gradient and one float32");
  const int64_t n = gradient.numel();
  if (n == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((n + 2047) / 2048, 132 * 16));  // a few waves at most
  by_type(gradient, "gradient", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    scale_kernel<T><<<blocks, 256, 0, current_stream(gradient)>>>(
        static_cast<T*>(gradient.mutable_data_ptr()), scale.const_data_ptr<float>(), n);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Replaces the plans of the device of `on`: five numbers for each, as in PlannedCalls. A call takes the first plan of
// its kind. Without one, default_plan() chooses.
void set_plans(const Tensor& on, std::vector<int64_t> numbers) {
  const auto guard = guard_device({"on", on}, {});
  FASTGPT_CHECK(numbers.size() % PlannedCalls::NUMBERS == 0,
                "plans: expected (element_size, passes, most_classes, threads, blocks) for each, got ",
                numbers.size(), " numbers");
  std::vector<PlannedCalls> plans;
  for (size_t i = 0; i < numbers.size(); i += PlannedCalls::NUMBERS) {
    const auto small = [&](size_t j) { return static_cast<int>(std::clamp<int64_t>(numbers[i + j], -1, 1 << 20)); };
    const PlannedCalls calls{numbers[i], numbers[i + 1], numbers[i + 2], {small(3), small(4)}};
    FASTGPT_CHECK((calls.element_size == 2 || calls.element_size == 4) && (calls.passes == 1 || calls.passes == 2) &&
                      calls.most_classes > 0 && calls.most_classes < int64_t{1} << 40,
                  "plans: ", calls.text(), ": expected an element_size of 2 or 4, 1 pass or 2, at least 1 class");
    const int64_t row_bytes = calls.most_classes * calls.element_size;
    const char* reason = calls.element_size == 2 ? reason_against<__nv_bfloat16>(calls.plan, calls.passes, row_bytes)
                                                 : reason_against<float>(calls.plan, calls.passes, row_bytes);
    FASTGPT_CHECK(!reason, "plans: ", calls.text(), ": ", reason);
    plans.push_back(calls);
  }
  PlanDevice::current().set(std::move(plans));
}

// The threads and blocks of a call.
std::vector<int64_t> plan_of(const Tensor& logits, int64_t passes) {
  const auto guard = guard_device({"logits", logits}, {});
  FASTGPT_CHECK(logits.dim() == 2 && (passes == 1 || passes == 2), "logits, passes: expected (N, C), and 1 or 2");
  Plan plan{};
  by_type(logits, "logits", [&](auto* type) {
    plan = plan_for<std::remove_pointer_t<decltype(type)>>(passes, logits.size(1), logits.size(0));
  });
  return {plan.threads, plan.blocks};
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("cross_entropy_native", TORCH_BOX(&fastgpt::cross_entropy));
  m.impl("cross_entropy_native_backward", TORCH_BOX(&fastgpt::cross_entropy_backward));
  m.impl("cross_entropy_chunk_", TORCH_BOX(&fastgpt::cross_entropy_chunk));
  m.impl("scale_gradient_", TORCH_BOX(&fastgpt::scale_gradient));
  m.impl("cross_entropy_set_plans", TORCH_BOX(&fastgpt::set_plans));
  m.impl("cross_entropy_plan", TORCH_BOX(&fastgpt::plan_of));
}
