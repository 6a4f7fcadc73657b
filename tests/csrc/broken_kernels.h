// Small kernels with one planted bug each, `mended` without it, and kernels that must not alarm.
// A comment "mark NAME" stands on every line that a report must name.

#pragma once

#include "platform.h"

using namespace m2mkd::cuda;

namespace {

using Four = Pack<float, 4>;

// ---- barriers
// ------------------------------------------------------------------------------------

__global__ void barrier_in_branch(int* out, bool mended) {
  out[threadIdx.x] = 1;
  if (mended || threadIdx.x < 32) {
    __syncthreads();  // mark barrier_in_branch
  }
}

__global__ void two_barriers(int* out, bool mended) {
  out[threadIdx.x] = 1;
  if (mended) {
    __syncthreads();
  } else if (threadIdx.x % 2 == 0) {
    __syncthreads();  // mark even_barrier
  } else {
    __syncthreads();  // mark odd_barrier
  }
}

__global__ void early_return(int* out, int count, bool mended) {
  if (int(threadIdx.x) >= count && !mended) {
    return;
  }
  __syncthreads();  // mark early_return
  if (int(threadIdx.x) < count) {
    out[threadIdx.x] = 1;
  }
}

// Two barriers that threads pass in different numbers: one loop is a turn longer for some.
__global__ void uneven_loop(int* out, bool mended) {
  for (int i = 0; i < (mended || threadIdx.x != 5 ? 3 : 4); ++i) {
    __syncthreads();  // mark uneven_loop
  }
  out[threadIdx.x] = 1;
}

// ---- warp operations
// -----------------------------------------------------------------------------

__global__ void half_warp_shuffle(int* out, bool mended) {
  int value = int(threadIdx.x);
  if (threadIdx.x < 16) {
    value = __shfl_xor_sync(mended ? 0xffffu : kFullMask, value, 1);  // mark half_warp_shuffle
  }
  out[threadIdx.x] = value;
}

__global__ void lane_outside_mask(int* out, bool mended) {
  const unsigned mask = mended || threadIdx.x < 16 ? kFullMask : 0xffffu;
  out[threadIdx.x] = __shfl_sync(mask, int(threadIdx.x), 0);  // mark lane_outside_mask
}

__global__ void lane_has_ended(int* out, bool mended) {
  out[threadIdx.x] = 1;
  if (threadIdx.x == 7 && !mended) {
    return;
  }
  __syncwarp(kFullMask);  // mark lane_has_ended
}

__global__ void unnamed_source(int* out, bool mended) {
  int value = 0;
  if (threadIdx.x < 16) {
    value = __shfl_sync(0xffffu, int(threadIdx.x), mended ? 3 : 20);  // mark unnamed_source
  }
  out[threadIdx.x] = value;
}

__global__ void part_of_a_warp(int* out) {
  out[threadIdx.x] = warp_sum(1);  // mark part_of_a_warp
}

__global__ void two_shuffles(int* out, bool mended) {
  int value = int(threadIdx.x);
  if (mended) {
    value = __shfl_down_sync(kFullMask, value, 1);
  } else if (threadIdx.x < 16) {
    value = __shfl_down_sync(kFullMask, value, 1);  // mark lower_shuffle
  } else {
    value = __shfl_down_sync(kFullMask, value, 1);  // mark upper_shuffle
  }
  out[threadIdx.x] = value;
}

// ---- bounds
// --------------------------------------------------------------------------------------

__global__ void shared_overrun(int* out, bool mended) {
  M2MKD_SHARED(int, values, 32);
  for (int i = int(threadIdx.x); i < (mended ? 32 : 33); i += 32) {
    values[i] = i;  // mark shared_overrun
  }
  __syncthreads();
  out[threadIdx.x] = values[31 - threadIdx.x];
}

__global__ void dynamic_overrun(int* out, int entries) {
  M2MKD_DYNAMIC_SHARED(int, values);
  if (int(threadIdx.x) < entries) {
    values[threadIdx.x] = 1;  // mark dynamic_overrun
    out[threadIdx.x] = values[threadIdx.x];
  }
}

__global__ void global_overrun(const float* in, int count, float* out, bool mended) {
  const int i = int(threadIdx.x);
  if (mended ? i < count : i <= count) {
    out[i] = 2 * in[i];  // mark global_overrun
  }
}

__global__ void pack_overrun(const Four* in, int packs, Four* out) {
  if (int(threadIdx.x) < packs) {
    out[threadIdx.x] = in[threadIdx.x];  // mark pack_overrun
  }
}

__global__ void before_the_start(const float* in, float* out, bool mended) {
  const int i = int(threadIdx.x);
  out[i] = in[mended && i == 0 ? 0 : i - 1];  // mark before_the_start
}

__global__ void write_to_input(const float* in, float* out, bool mended) {
  float* target = mended ? out : const_cast<float*>(in);
  target[threadIdx.x] = 1.0f;  // mark write_to_input
}

__global__ void host_pointer(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];  // mark host_pointer
}

__global__ void misaligned(const float* in, Four* out, bool mended) {
  const auto* packs = reinterpret_cast<const Four*>(in + (mended ? 0 : 1));
  out[threadIdx.x] = packs[threadIdx.x];  // mark misaligned
}

// CUDA promises an array of float no more than the alignment of float.
__global__ void misaligned_shared(float* out, bool mended) {
  M2MKD_SHARED(float, values, 4);
  M2MKD_SHARED(Four, packs, 1);
  Four* pack = mended ? packs : reinterpret_cast<Four*>(values);
  *pack = Four{};  // mark misaligned_shared
  out[0] = pack->at[0];
}

// ---- reads of nothing
// ----------------------------------------------------------------------------

__global__ void unwritten_shared(int* out, bool mended) {
  M2MKD_SHARED(int, values, 32);
  if (mended || threadIdx.x != 3) {
    values[threadIdx.x] = 1;
  }
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];  // mark unwritten_shared
}

// The second block finds what the first left, on a card.
__global__ void left_by_another_block(int* out, bool mended) {
  M2MKD_SHARED(int, value, 1);
  if (threadIdx.x == 0 && (mended || blockIdx.x == 0)) {
    value[0] = int(blockIdx.x);
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = value[0];  // mark left_by_another_block
}

__global__ void unwritten_output(int* out, bool mended) {
  if (mended) {
    out[threadIdx.x] = 0;
  }
  out[threadIdx.x] += 1;  // mark unwritten_output
}

__global__ void holes_in_output(int* out, int count, bool mended) {
  const int i = int(threadIdx.x);
  if (mended ? i < count : i < count - 1) {
    out[i] = 1;
  }
}

// ---- races
// ---------------------------------------------------------------------------------------

__global__ void missing_barrier(int* out, bool mended) {
  M2MKD_SHARED(int, values, 64);
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = 1;  // mark missing_barrier_write
  if (mended) {
    __syncthreads();
  }
  out[threadIdx.x] = values[63 - threadIdx.x];  // mark missing_barrier_read
}

// Values come out right in most schedules: the next turn overwrites what a slow thread still reads.
__global__ void missing_second_barrier(int* out, bool mended) {
  M2MKD_SHARED(int, value, 1);
  int sum = 0;
  for (int i = 0; i < 3; ++i) {
    if (threadIdx.x == 0) {
      value[0] = i;  // mark second_barrier_write
    }
    __syncthreads();
    sum += value[0];  // mark second_barrier_read
    if (mended) {
      __syncthreads();
    }
  }
  out[threadIdx.x] = sum;
}

// A shuffle orders no memory.
__global__ void missing_syncwarp(int* out, bool mended) {
  M2MKD_SHARED(int, values, 32);
  values[threadIdx.x] = 0;
  __syncwarp(kFullMask);
  values[threadIdx.x] = 1;  // mark missing_syncwarp_write
  const int one = __shfl_sync(kFullMask, 1, 0);
  if (mended) {
    __syncwarp(kFullMask);
  }
  out[threadIdx.x] = values[threadIdx.x ^ 1] * one;  // mark missing_syncwarp_read
}

// __syncwarp orders one warp only.
__global__ void syncwarp_between_warps(int* out, bool mended) {
  M2MKD_SHARED(int, values, 64);
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = 1;  // mark between_warps_write
  __syncwarp(kFullMask);
  const int other = int(threadIdx.x) ^ (mended ? 1 : 32);
  out[threadIdx.x] = values[other];  // mark between_warps_read
}

__global__ void add_across_blocks(int* out, bool mended) {
  if (threadIdx.x == 0) {
    if (mended) {
      atomicAdd(out, 1);
    } else {
      *out += 1;  // mark add_across_blocks
    }
  }
}

__global__ void one_word_two_writers(int* out, bool mended) {
  out[mended ? threadIdx.x : threadIdx.x % 63] = int(threadIdx.x);  // mark one_word_two_writers
}

// Sixteen bytes written at once, one of the four read by a neighbour.
__global__ void pack_race(float* out, bool mended) {
  M2MKD_SHARED(Four, packs, 32);
  packs[threadIdx.x].at[2] = 0;
  __syncthreads();
  packs[threadIdx.x] = Four{};  // mark pack_race_write
  if (mended) {
    __syncthreads();
  }
  out[threadIdx.x] = packs[31 - threadIdx.x].at[2];  // mark pack_race_read
}

__global__ void atomic_and_plain(int* count, int* out, bool mended) {
  atomicAdd(count, 1);  // mark atomic_update
  if (mended) {
    __syncthreads();
  }
  out[threadIdx.x] = *count;  // mark plain_read
}

// ---- the rest
// ------------------------------------------------------------------------------------

__global__ void float_atomic(float* out, bool mended) {
  if (!mended) {
    atomicAdd(out, 1.0f);  // mark float_atomic
  }
}

__global__ void endless(const int* in, int* out) {
  unsigned i = 0;
  while (in[i % 2] == 0) {  // mark endless
    ++i;
  }
  *out = int(i);
}

__global__ void big_shared(int* out, int entries) {
  M2MKD_DYNAMIC_SHARED(int, values);
  for (int i = int(threadIdx.x); i < entries; i += int(blockDim.x)) {
    values[i] = i;
  }
  __syncthreads();
  out[threadIdx.x] = values[entries - 1 - int(threadIdx.x)];
}

// ---- what must not alarm
// -------------------------------------------------------------------------

// Neighbours write the two halves of a word.
__global__ void neighbours_in_a_word(__nv_bfloat16* out) {
  M2MKD_SHARED(__nv_bfloat16, values, 64);
  values[threadIdx.x] = narrow<__nv_bfloat16>(1.0f);
  out[threadIdx.x] = values[threadIdx.x];
}

// One array for one purpose after another, with barriers between.
__global__ void reuse_after_barrier(int* out) {
  M2MKD_SHARED(int, values, 64);
  int sum = 0;
  for (int i = 0; i < 4; ++i) {
    values[(threadIdx.x + 7 * i) % 64] = i;
    __syncthreads();
    sum += values[63 - threadIdx.x];
    __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Lanes hand values on through shared memory, warp by warp at their own pace.
__global__ void warp_by_warp(int* out) {
  M2MKD_SHARED(int, values, 64);
  int value = int(threadIdx.x);
  for (int i = 0; i < int(threadIdx.x / kWarp) + 2; ++i) {
    values[threadIdx.x] = value;
    __syncwarp(kFullMask);
    value += values[threadIdx.x ^ 1];
    __syncwarp(kFullMask);
  }
  out[threadIdx.x] = value;
}

// Warps without work leave; the others need no barrier.
__global__ void warps_leave(int* out) {
  const int count = 40;
  const int first = int(threadIdx.x / kWarp * kWarp);
  if (first >= count) {
    return;
  }
  const int sum = warp_sum(1);
  if (int(threadIdx.x) < count) {
    out[threadIdx.x] = sum;
  }
}

// Both branches of a warp do shuffles of their own.
__global__ void masks_of_branches(int* out) {
  const unsigned mask = threadIdx.x < 8 ? 0x000000ffu : 0xffffff00u;
  int value = int(threadIdx.x);
  if (threadIdx.x < 8) {
    value = __shfl_sync(mask, value, 3);
  } else {
    value = __shfl_sync(mask, value, 12);
  }
  __syncwarp(kFullMask);
  out[threadIdx.x] = value;
}

// All threads read what one wrote.
__global__ void broadcast(int* out) {
  M2MKD_SHARED(int, value, 1);
  if (threadIdx.x == 31) {
    value[0] = int(blockIdx.x);
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = value[0];
}

// A barrier orders all warps, whatever __syncwarp did before.
__global__ void one_lane_reads(int* out) {
  M2MKD_SHARED(int, values, 96);
  values[threadIdx.x] = int(threadIdx.x);
  __syncwarp(kFullMask);
  __syncthreads();
  if (threadIdx.x == 40) {
    int sum = 0;
    for (int i = 0; i < 96; ++i) {
      sum += values[i];
    }
    *out = sum;
  }
}

}  // namespace
