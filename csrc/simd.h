// Vectors of float32 for the row kernels: load, store, reductions, exp, log and tanh. They are written in the vector types of
// GCC and Clang, so that one source compiles to AVX-512, AVX2, SSE2 and NEON. Each kernels_*.cpp includes this file for
// one instruction set, after it has set FASTGPT_LANES (the number of values in a vector) and the compiler's target.
//
// Everything here is in an unnamed namespace. Otherwise the linker would keep one copy of a function for all
// instruction sets. If that were the copy compiled for AVX-512, processors without AVX-512 could not run it.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "storage.h"

namespace fastgpt {
namespace {

constexpr int LANES = FASTGPT_LANES;

typedef float Vec __attribute__((vector_size(4 * FASTGPT_LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * FASTGPT_LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * FASTGPT_LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * FASTGPT_LANES)));

inline Vec splat(float value) { return value - Vec{}; }  // makes a vector; - 0 changes no value, not even -0 or NaN
inline Mask lane_numbers() {
  Mask lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes;
}
#if defined(FASTGPT_AVX512)  // one instruction; of the expression below, compilers make two
inline Vec larger(Vec a, Vec b) { return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
#elif defined(FASTGPT_AVX2)
inline Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b if either is NaN
#endif
inline Vec plus(Vec a, Vec b) { return a + b; }

// The sum and the maximum of the lanes: the upper half of the vector is combined with the lower half, then the upper
// half of the result with its lower half, and so on. The order is always the same.
#if defined(FASTGPT_AVX512) || defined(FASTGPT_AVX2)
inline float sum_lanes(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float max_lanes(__m256 v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
#if defined(FASTGPT_AVX512)
inline __m256 upper_half(__m512 v) { return _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xff, _mm512_castps_pd(v), 1)); }
inline float sum_lanes(Vec v) { return sum_lanes(_mm256_add_ps(_mm512_castps512_ps256((__m512)v), upper_half((__m512)v))); }
inline float max_lanes(Vec v) { return max_lanes(_mm256_max_ps(_mm512_castps512_ps256((__m512)v), upper_half((__m512)v))); }
#endif
#else
inline float sum_lanes(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float max_lanes(Vec v) {
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}
#endif

// Combines pairs of lanes, and two vectors into one. Lane i of the result is OP of the lanes i and i ^ HALF: of `a`
// where i does not have the bit HALF, else of `b`.
template <Vec OP(Vec, Vec), int HALF, int... I>
inline Vec fold_lanes(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const Vec kept = __builtin_shufflevector(a, b, ((I & HALF) ? LANES + I : I)...);
  const Vec moved = __builtin_shufflevector(a, b, ((I & HALF) ? LANES + (I ^ HALF) : (I ^ HALF))...);
#else
  const Vec kept = __builtin_shuffle(a, b, Mask{((I & HALF) ? LANES + I : I)...});
  const Vec moved = __builtin_shuffle(a, b, Mask{((I & HALF) ? LANES + (I ^ HALF) : (I ^ HALF))...});
#endif
  return OP(kept, moved);
}

// Reduces each of LANES vectors to one value, which is lane i of the result for v[i], and overwrites v. This takes
// LANES - 1 calls of OP. To reduce each vector by itself would take log2(LANES) calls for every one of them.
template <Vec OP(Vec, Vec), int HALF = LANES / 2>
inline Vec reduce_each(Vec* v) {
  for (int i = 0; i < HALF; ++i)
    v[i] = fold_lanes<OP, HALF>(v[i], v[i + HALF], std::make_integer_sequence<int, LANES>());
  if constexpr (HALF > 1) return reduce_each<OP, HALF / 2>(v);
  return v[0];
}

// Where lane l of the result comes from, in exchange(): l, or LANES + l for a lane of the second vector.
template <int BIT, bool UPPER>
constexpr int exchanged(int l) {
  const bool from_second = (l & BIT) != 0;
  return (from_second ? LANES : 0) + (from_second == UPPER ? l : l ^ BIT);
}

template <int BIT, bool UPPER, int... L>
inline Vec exchange(Vec a, Vec b, std::integer_sequence<int, L...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, exchanged<BIT, UPPER>(L)...);
#else
  return __builtin_shuffle(a, b, Mask{exchanged<BIT, UPPER>(L)...});
#endif
}

// Lane l of v[i] and lane i of v[l] change places, in log2(LANES) steps: one for each bit in which i and l differ.
template <int BIT = LANES / 2>
inline void transpose(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if ((i & BIT) == 0) {
      const Vec a = v[i], b = v[i | BIT];
      v[i] = exchange<BIT, false>(a, b, std::make_integer_sequence<int, LANES>());
      v[i | BIT] = exchange<BIT, true>(a, b, std::make_integer_sequence<int, LANES>());
    }
  if constexpr (BIT > 1) transpose<BIT / 2>(v);
}

// --- load and store: values are float32 in registers; in memory they are float32, bfloat16 or float16 ---

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec load(const BFloat16* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  const Bits bits = __builtin_convertvector(h, Bits) << 16;
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline Half to_bfloat16(Vec v) {  // rounds to nearest, ties to even; NaN stays NaN
  Bits bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits result = (v == v) ? rounded : ((bits >> 16) | 0x40u);
  return __builtin_convertvector(result, Half);
}

inline void store(BFloat16* p, Vec v) {
  const Half h = to_bfloat16(v);
  std::memcpy(p, &h, sizeof h);
}

inline Vec load(const Float16* p) {
  Vec v;
#if defined(FASTGPT_AVX512)
  v = (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(FASTGPT_AVX2)
  v = (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float lane[LANES];
  for (int i = 0; i < LANES; ++i) lane[i] = to_float(p[i]);
  std::memcpy(&v, lane, sizeof v);
#endif
  return v;
}

inline Half to_float16(Vec v) {
  Half h;
#if defined(FASTGPT_AVX512)
  h = (Half)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FASTGPT_AVX2)
  h = (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  float lane[LANES];
  std::memcpy(lane, &v, sizeof lane);
  Float16 out[LANES];
  for (int i = 0; i < LANES; ++i) from_float(lane[i], out[i]);
  std::memcpy(&h, out, sizeof h);
#endif
  return h;
}

inline void store(Float16* p, Vec v) {
  const Half h = to_float16(v);
  std::memcpy(p, &h, sizeof h);
}

// The last n % LANES values of a row of n values, in the last lanes of a vector; the other lanes are `fill`. To avoid a
// branch for each value, the last LANES values of the row are loaded, and those that a loop over whole vectors has read
// already are replaced. Only rows shorter than a vector are loaded value by value.
template <class T>
inline Vec load_tail(const T* row, int64_t n, float fill) {
  Vec v;
  if (n >= LANES) {
    const Vec overlapping = load(row + n - LANES);
    v = (lane_numbers() < static_cast<int32_t>(LANES - n % LANES)) ? splat(fill) : overlapping;
  } else {
    float lane[LANES];
    for (int i = 0; i < LANES; ++i) lane[i] = i >= LANES - n ? to_float(row[i - (LANES - n)]) : fill;
    std::memcpy(&v, lane, sizeof v);
  }
  return v;
}

// The first n < LANES values at p, in the first lanes; the other lanes are `fill`.
template <class T>
inline Vec load_some(const T* p, int64_t n, float fill) {
  float lane[LANES];
  for (int i = 0; i < LANES; ++i) lane[i] = i < n ? to_float(p[i]) : fill;
  Vec v;
  std::memcpy(&v, lane, sizeof v);
  return v;
}

template <class T>
inline void store_some(T* p, int64_t n, Vec v) {
  if (n == LANES) return store(p, v);
  float lane[LANES];
  std::memcpy(lane, &v, sizeof lane);
  for (int64_t i = 0; i < n; ++i) from_float(lane[i], p[i]);
}

// Stores the first n <= LANES of the pairs (a[0], b[0]), (a[1], b[1]), ...
inline void store_pairs(float* p, int64_t n, Vec a, Vec b) {
  float lane[2][LANES];
  store(lane[0], a);
  store(lane[1], b);
  for (int64_t i = 0; i < n; ++i) {
    p[2 * i] = lane[0][i];
    p[2 * i + 1] = lane[1][i];
  }
}

// --- stores past the caches ---
//
// A plain store first reads the cache line that it writes to. Where a result is larger than the caches, this read comes
// from main memory, and stores that write past the caches (non-temporal stores) avoid it.

template <class T>
constexpr int64_t stream_alignment() {
  return static_cast<int64_t>(sizeof(T)) * LANES;
}

template <class T>
inline void stream(T* p, Vec v) {  // p is a multiple of stream_alignment()
#if defined(FASTGPT_AVX512)
  if constexpr (std::is_same_v<T, float>) _mm512_stream_ps(p, (__m512)v);
  if constexpr (std::is_same_v<T, BFloat16>) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)to_bfloat16(v));
  if constexpr (std::is_same_v<T, Float16>) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)to_float16(v));
#elif defined(FASTGPT_AVX2)
  if constexpr (std::is_same_v<T, float>) _mm256_stream_ps(p, (__m256)v);
  if constexpr (std::is_same_v<T, BFloat16>) _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)to_bfloat16(v));
  if constexpr (std::is_same_v<T, Float16>) _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)to_float16(v));
#else
  store(p, v);
#endif
}

// Stores past the caches are not ordered with others. After this fence, other threads see them before any later store.
inline void finish_streams() {
#if defined(FASTGPT_AVX512) || defined(FASTGPT_AVX2)
  _mm_sfence();
#endif
}

// --- exp ---

// Exp()(x) is exp(x) for x <= 0. Softmax needs no other values, because it subtracts the maximum first. exp(-inf) is 0,
// and exp(NaN) is NaN. Exp is an object that is made before a loop and holds the constants, so that each stays in a
// register.
#if defined(FASTGPT_AVX512) || defined(FASTGPT_AVX2)

// Hides from the compiler that v is a constant. Otherwise it would load v from memory again wherever v is used.
template <class V>
inline V in_register(V v) {
  asm("" : "+v"(v));
  return v;
}

constexpr int FRACTION_BITS = LANES == 16 ? 4 : 3;  // log2(LANES)
constexpr uint32_t POWERS[16] = {  // the bits of 2^(j / 16) as float32
    0x3f800000, 0x3f85aac3, 0x3f8b95c2, 0x3f91c3d3, 0x3f9837f0, 0x3f9ef532, 0x3fa5fed7, 0x3fad583f,
    0x3fb504f3, 0x3fbd08a4, 0x3fc5672a, 0x3fce248c, 0x3fd744fd, 0x3fe0ccdf, 0x3feac0c7, 0x3ff5257d};

// Entry j is the bits of 2^(j / LANES), from which j << (23 - FRACTION_BITS) is subtracted, because Exp adds this again
// when it adds all bits of k.
inline Bits power_table() {
  Bits table;
  for (uint32_t j = 0; j < LANES; ++j) table[j] = POWERS[j * (16 / LANES)] - (j << (23 - FRACTION_BITS));
  return table;
}

// Table-driven exp (Tang 1989). With x = k ln 2 / LANES + r and |r| <= ln 2 / (2 LANES), exp(x) = 2^(k / LANES) exp(r).
// exp(r) is a polynomial of degree 3, a minimax fit with a relative error of 2e-9 for 16 lanes and 3e-8 for 8 lanes.
// 2^(k / LANES) is found by the last bits of k in a table that fills one register; the other bits of k are added to its
// exponent. The relative error of exp is at most 1.1e-7 for x >= -2, 1.6e-7 down to -20, and 3.5e-7 down to -87.
class Exp {
 public:
  Exp() {}  // written out, because an implicit constructor would not be compiled for this target

  Vec operator()(Vec x) const {
    const Vec y = larger(smallest, x);
    const Vec shifted = y * per_step + shifter;
    const Vec r = y - (shifted - shifter) * step;
    const Vec q = (r * c3 + c2) * r + one;
    Bits k;
    std::memcpy(&k, &shifted, sizeof k);
#if defined(FASTGPT_AVX512)
    const Bits fraction = (Bits)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)k, (__m512i)table);
#else
    const Bits fraction = (Bits)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)k);
#endif
    const Bits bits = fraction + (k << (23 - FRACTION_BITS));
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return power + power * (q * r);
  }

 private:
  const Vec smallest = in_register(splat(-88.0296919f));  // -127 ln 2: here the bits of 2^(k / LANES) are those of 0
  const Vec shifter = in_register(splat(12582912.0f));    // 1.5 * 2^23: the sum with it is rounded to an integer
  const Vec per_step = in_register(splat(LANES * 1.44269504f));
  const Vec step = in_register(splat(0.693147182f / LANES));
  const Vec c3 = in_register(splat(LANES == 16 ? 0.166667178f : 0.166668579f));
  const Vec c2 = in_register(splat(LANES == 16 ? 0.500016153f : 0.500064492f));
  const Vec one = in_register(splat(1.0f));
  const Bits table = in_register(power_table());
};

#else

// With x = k ln 2 + r and |r| <= ln 2 / 2, exp(x) = 2^k exp(r). exp(r) is a polynomial whose coefficients are a minimax
// fit of (exp(r) - 1 - r) / r^2; the relative error of exp(r) is 3e-9. ln 2 is split into two constants, so that k
// times the first one is exact (Cody and Waite 1980).
struct Exp {
  Vec operator()(Vec x) const {
    const Vec smallest = splat(-87.0f);  // below it, 2^k would not be a normal float32; exp is 0
    const Mask vanishes = x < smallest;
    const Vec y = vanishes ? smallest : x;
    const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: the sum with it is rounded to an integer
    const Vec shifted = y * 1.44269504f + shifter;
    const Vec k = shifted - shifter;
    const Vec r = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    Vec q = r * 1.381446674e-3f + 8.368780429e-3f;
    q = q * r + 4.166839422e-2f;
    q = q * r + 1.666652011e-1f;
    q = q * r + 4.999999341e-1f;
    q = q * r + 1.0f;
    Bits k_bits;
    std::memcpy(&k_bits, &shifted, sizeof k_bits);
    const Bits power_bits = (k_bits << 23) + 0x3f800000u;
    Vec power;
    std::memcpy(&power, &power_bits, sizeof power);
    return vanishes ? Vec{} : (q * r + 1.0f) * power;
  }
};

#endif

// --- log ---

// log(x) for x >= 1, as a sum of exp(x - maximum) is, because the maximum itself adds 1. The error is at most a unit in
// the last place, and log(NaN) is NaN. With x = 2^k m and sqrt(1/2) <= m < sqrt(2), log(x) = k ln 2 + log(m). log(m) is
// the polynomial in m - 1 of logf in the Cephes library (Moshier), and ln 2 is split into two constants, as in Exp.
inline Vec log_of_sum(Vec x) {
  Bits bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Bits shifted = bits - 0x3f3504f3u;  // the bits of sqrt(1/2)
  const Bits m_bits = (shifted & 0x7fffffu) + 0x3f3504f3u;
  const Vec k = __builtin_convertvector((Mask)(shifted >> 23), Vec);
  Vec m;
  std::memcpy(&m, &m_bits, sizeof m);
  const Vec f = m - 1.0f;
  Vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec square = f * f;
  const Vec log_m = f + (p * f * square - k * 2.12194440e-4f - square * 0.5f);
  return x == x ? log_m + k * 0.693359375f : x;
}

// --- tanh ---

// tanh(x) = x P(x^2) / Q(x^2), a minimax fit of P and Q for |x| <= 9 with a relative error of 1.4e-9; in float32 that of
// tanh is at most 4e-7. For larger |x| the result is 1 or -1, as it is in float32, and never more. tanh(NaN) is NaN.
inline Vec tanh_of(Vec x) {
  const Vec limit = splat(9.0f);
  const Vec below = x > limit ? limit : x;
  const Vec y = below < -limit ? -limit : below;
  const Vec z = y * y;
  Vec p = z * -1.220354949e-11f + 3.058514035e-8f;
  p = p * z + 2.800750897e-5f;
  p = p * z + 3.868330240e-3f;
  p = p * z + 1.367991706e-1f;
  p = p * z + 1.0f;
  Vec q = z * 1.287370072e-6f + 3.938635508e-4f;
  q = q * z + 2.724584794e-2f;
  q = q * z + 4.701324912e-1f;
  q = q * z + 1.0f;
  const Vec result = y * p / q, one = splat(1.0f);
  const Vec at_most = result > one ? one : result;
  return at_most < -one ? -one : at_most;
}

}  // namespace
}  // namespace fastgpt
