// The row kernels for every other processor, in vectors of four: SSE2, NEON, or what the compiler makes of them.
#include <cmath>
#include <cstring>
#include <type_traits>

#define FASTGPT_LANES 4
#include "kernels_table.h"

constexpr fastgpt::Kernels fastgpt::GENERIC_KERNELS = table("generic");
