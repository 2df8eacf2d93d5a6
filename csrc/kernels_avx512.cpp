// The row kernels for processors with AVX-512.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

// Before the target is set: what the standard headers define inline must stay code for any processor.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FASTGPT_LANES 16
#define FASTGPT_AVX512
#include "kernels_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

constexpr fastgpt::Kernels fastgpt::AVX512_KERNELS = table("avx512");

#else

constexpr fastgpt::Kernels fastgpt::AVX512_KERNELS = {};

#endif
