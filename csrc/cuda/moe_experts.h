// What kernels that walk rows by expert share.

#pragma once

#include "platform.h"

namespace m2mkd::cuda {

// Expert whose rows contain `row`: the last e with offsets[e] <= row.
__device__ inline int expert_of(const int32_t* offsets, int experts, int row) {
  int low = 0, high = experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

inline int blocks_for(int64_t items, int per_block) {
  return int((items + per_block - 1) / per_block);
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace m2mkd::cuda
