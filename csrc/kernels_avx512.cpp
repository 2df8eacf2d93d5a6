// The row kernels for processors with AVX-512. The table is empty where the compiler cannot make this code.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

// The standard headers come before the target is set. The linker may keep this file's copy of a function that they
// define inline, and processors without AVX-512 have to be able to run it.
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
