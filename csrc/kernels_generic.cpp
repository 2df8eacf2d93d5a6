// The row kernels for processors without AVX2: vectors of four values, as SSE2, NEON or what else the compiler has.
#include <cmath>
#include <cstring>
#include <type_traits>

#define FASTGPT_LANES 4
#include "kernels_table.h"

constexpr fastgpt::Kernels fastgpt::GENERIC_KERNELS = table("generic");
