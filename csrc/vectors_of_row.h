// A row of any length as vectors, of which the last one may be incomplete.
#pragma once

#include "simd.h"

namespace fastgpt {
namespace {

// Calls visit(j, n) for the columns j, ..., j + n - 1 of each vector; n = LANES but for the last one of some rows.
template <class Visit>
inline void over_columns(int64_t columns, const Visit& visit) {
  int64_t j = 0;
  for (; j + LANES <= columns; j += LANES) visit(j, LANES);
  if (j < columns) visit(j, static_cast<int>(columns - j));
}

template <class T>
inline Vec load_first(const T* p, int n, float fill = 0.0f) {
  return n == LANES ? load(p) : load_some(p, n, fill);
}

}  // namespace
}  // namespace fastgpt
