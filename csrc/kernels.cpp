// Chooses the row kernels that run: those with the widest vectors that this processor has.
#include "kernels.h"

#include <cstring>

namespace fastgpt {
namespace {

bool runs_here(const Kernels& table) {
  if (table.name == nullptr) return false;
#if defined(__x86_64__) && defined(__GNUC__)
  if (&table == &AVX512_KERNELS)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // GCC before version 11 cannot be asked for f16c. Every processor with AVX2 has it.
  if (&table == &AVX2_KERNELS) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

constexpr const Kernels* WIDEST_FIRST[] = {&AVX512_KERNELS, &AVX2_KERNELS, &GENERIC_KERNELS};

const Kernels* widest() {
  for (const Kernels* table : WIDEST_FIRST)
    if (runs_here(*table)) return table;
  return &GENERIC_KERNELS;
}

const Kernels*& current() {
  static const Kernels* chosen = widest();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current(); }

bool use_kernels(const char* name) {
  for (const Kernels* table : WIDEST_FIRST)
    if (runs_here(*table) && std::strcmp(table->name, name) == 0) {
      current() = table;
      return true;
    }
  return false;
}

const char* cpu_maker() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

}  // namespace fastgpt
