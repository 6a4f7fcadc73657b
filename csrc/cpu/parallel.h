// Work sharing on the CPU, over torch's own thread pool.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace m2mkd::cpu {

// Bytes of work below which a second thread costs more than it brings.
constexpr int64_t kGrainBytes = 32 * 1024;

// Calls f(begin, end) on parts of [0, count), where one item touches about item_bytes.
template <typename F>
void parallel_items(int64_t count, int64_t item_bytes, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, item_bytes));
  if (count <= grain) {
    if (count > 0) {
      f(int64_t{0}, count);
    }
    return;
  }
  torch::stable::parallel_for(0, count, grain, f);
}

// Among how many lanes, at most one per thread, to cut work that touches so many bytes. As that
// depends only on the number of threads, results repeat bit for bit.
inline int64_t lane_count(int64_t work_bytes) {
  return std::clamp<int64_t>(work_bytes / kGrainBytes, 1, torch::stable::get_num_threads());
}

// Calls f(lane) for every lane, in parallel.
template <typename F>
void for_lanes(int64_t lanes, const F& f) {
  if (lanes == 1) {
    f(int64_t{0});
    return;
  }
  torch::stable::parallel_for(0, lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t lane = begin; lane < end; ++lane) {
      f(lane);
    }
  });
}

// Calls f(lane, lanes) for the lanes that suit so many bytes of work.
template <typename F>
void parallel_lanes(int64_t work_bytes, const F& f) {
  const int64_t lanes = lane_count(work_bytes);
  for_lanes(lanes, [&](int64_t lane) { f(lane, lanes); });
}

}  // namespace m2mkd::cpu
