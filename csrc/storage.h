// The two 16-bit floating-point formats as they are stored in memory, and their conversions to and from float32, one
// value at a time. simd.h converts whole vectors.
//
//               sign   exponent (bias)   mantissa
//     float32   1      8 (127)           23
//     bfloat16  1      8 (127)           7           the upper half of a float32
//     float16   1      5 (15)            10          binary16 of IEEE 754
#pragma once

#include <cstdint>
#include <cstring>

namespace fastgpt {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float to_float(float value) { return value; }
static inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

static inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
  // Read as the exponent and mantissa of a float32, these bits are the value times 2^-112, because the biases of the
  // two formats differ by 112. This holds for subnormal values, too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

static inline void from_float(float value, float& out) { out = value; }

static inline void from_float(float value, BFloat16& out) {  // rounds to nearest, ties to even
  const uint32_t bits = bits_of(value);
  const bool is_nan = value != value;
  out.bits = static_cast<uint16_t>(is_nan ? (bits >> 16 | 0x40u) : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline void from_float(float value, Float16& out) {  // rounds to nearest, ties to even
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // infinity: rounds to more than 65504, the largest finite value
  } else if (magnitude < 0x38800000u) {
    // Subnormal in float16, that is a multiple of 2^-24. The last bit of a float32 in [0.5, 1) is worth 2^-24, so
    // adding 0.5 rounds the value to such a multiple, and the low bits of the sum count them.
    result = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    // Normal: the exponent's bias is reduced by 112, and the lower 13 bits of the mantissa are rounded away.
    result = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | result);
}

}  // namespace fastgpt
