// A routing plan as kernels see it, and the host-side checks of its values.

#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"

namespace m2mkd {

// Raises unless every entry lies in [low, high).
inline void check_entries(const char* op, const char* name, const int32_t* values, int64_t count,
                          int64_t low, int64_t high) {
  int32_t least = INT32_MAX, most = INT32_MIN;  // no early end: the compiler vectorises it
  for (int64_t i = 0; i < count; ++i) {
    least = std::min(least, values[i]);
    most = std::max(most, values[i]);
  }
  if (least >= low && most < high) {
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(values[i] >= low && values[i] < high, op, ": ", name, "[", i, "] is ",
                    values[i], ", outside [", low, ", ", high, ")");
  }
}

// Raises unless offsets rise from 0 to at most rows; returns them as int64.
inline std::vector<int64_t> check_offsets(const char* op, const int32_t* offsets, int64_t experts,
                                          int64_t rows) {
  std::vector<int64_t> bounds(offsets, offsets + experts + 1);
  STD_TORCH_CHECK(
      bounds.front() == 0 && bounds.back() <= rows && std::is_sorted(bounds.begin(), bounds.end()),
      op, ": offsets must rise from 0 to at most the ", rows, " rows");
  return bounds;
}

}  // namespace m2mkd
