// Tokens and targets are checked before any memory is read at the place that they name.
#pragma once

#include <cstdint>

namespace fastgpt {
namespace {

// The number of indices that are not `*ignored`, or of all where `ignored` is null; -1 if any of these lies outside
// [0, limit).
inline int64_t count_indices(const int64_t* indices, int64_t n, int64_t limit, const int64_t* ignored) {
  int64_t counted = 0, outside = 0;  // there is no early exit, so that the compiler vectorises the loop
  for (int64_t i = 0; i < n; ++i) {
    const int64_t counts = !ignored || indices[i] != *ignored;
    counted += counts;
    outside |= counts & (static_cast<uint64_t>(indices[i]) >= static_cast<uint64_t>(limit));
  }
  return outside ? -1 : counted;
}

}  // namespace
}  // namespace fastgpt
