// Routing plan: a stable counting sort in four kernels, integers only, without atomics. Blocks of
// kPlanBlock choices in listing order are counted, the counts are scanned per expert and the
// experts' rows after one another, and every choice finds its row from the scans, the earlier warps
// of its block and the lower lanes of its warp.

#include "launchers.h"
#include "platform.h"

namespace m2mkd::cuda {

namespace {

constexpr int kWarps = kPlanBlock / kWarp;

struct Listing {
  const int32_t* chosen;  // [tokens, k]
  const int64_t* order;   // [tokens] or null
  int tokens, k;
  bool by_rank;  // choice by choice (with a capacity), otherwise token by token
};

// Index into [tokens, k] of the i-th choice listed.
__device__ inline int choice_at(const Listing& list, int i) {
  if (!list.by_rank) {
    return i;
  }
  const int place = i % list.tokens;
  const int token = list.order != nullptr ? int(list.order[place]) : place;
  return token * list.k + i / list.tokens;
}

struct Rank {
  int choice;  // -1 past the end
  int expert;  // -1 where there is none
  int rank;    // earlier choices of this expert in the warp
};

// Ranks this thread's choice and leaves the warp's count of each expert in warp_counts.
__device__ Rank rank_in_block(const Listing& list, int experts, int* warp_counts) {
  const int total = list.tokens * list.k;
  const int i = blockIdx.x * kPlanBlock + threadIdx.x;
  const int lane = threadIdx.x % kWarp;
  int* counts = warp_counts + threadIdx.x / kWarp * experts;
  for (int e = lane; e < experts; e += kWarp) {
    counts[e] = 0;
  }
  __syncwarp(kFullMask);
  const int choice = i < total ? choice_at(list, i) : -1;
  int expert = choice >= 0 ? list.chosen[choice] : -1;
  expert = expert < experts ? expert : -1;  // out of range counts as dropped
  int lower = 0, higher = 0;
  for (int other = 0; other < kWarp; ++other) {
    const bool same = __shfl_sync(kFullMask, expert, other) == expert;
    lower += same && other < lane;
    higher += same && other > lane;
  }
  if (expert >= 0 && higher == 0) {
    counts[expert] = lower + 1;
  }
  __syncthreads();
  return {choice, expert, lower};
}

__global__ void count_kernel(Listing list, int experts, int32_t* counts) {
  M2MKD_DYNAMIC_SHARED(int, warp_counts);
  rank_in_block(list, experts, warp_counts);
  for (int e = threadIdx.x; e < experts; e += kPlanBlock) {
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      sum += warp_counts[w * experts + e];
    }
    counts[int64_t(blockIdx.x) * experts + e] = sum;
  }
}

// Inclusive sum over the block's threads in order; the last thread's is returned on all as `total`.
// `scratch` holds one entry per warp, and is free again on return.
__device__ int block_scan(int x, int* scratch, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const int lower = __shfl_up_sync(kFullMask, x, step);
    x += lane >= step ? lower : 0;
  }
  if (lane == kWarp - 1) {
    scratch[warp] = x;
  }
  __syncthreads();
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    x += w < warp ? scratch[w] : 0;
    total += scratch[w];
  }
  __syncthreads();
  return x;
}

// A block per expert: counts become its choices in earlier blocks; offsets[e + 1] its rows.
__global__ void scan_blocks_kernel(int32_t* counts, int blocks, int experts, int limit,
                                   int32_t* offsets) {
  M2MKD_SHARED(int, scratch, kWarps);
  const int expert = blockIdx.x;
  int earlier = 0;
  for (int first = 0; first < blocks; first += kPlanBlock) {
    const int b = first + threadIdx.x;
    const int64_t at = int64_t(b) * experts + expert;
    const int count = b < blocks ? counts[at] : 0;
    int total;
    const int sum = block_scan(count, scratch, total);
    if (b < blocks) {
      counts[at] = earlier + sum - count;
    }
    earlier += total;
  }
  if (threadIdx.x == 0) {
    offsets[expert + 1] = limit >= 0 && earlier > limit ? limit : earlier;
  }
}

// One block: rows per expert become offsets.
__global__ void scan_experts_kernel(int experts, int32_t* offsets) {
  M2MKD_SHARED(int, scratch, kWarps);
  int earlier = 0;
  for (int first = 0; first < experts; first += kPlanBlock) {
    const int e = first + threadIdx.x;
    int total;
    const int sum = block_scan(e < experts ? offsets[e + 1] : 0, scratch, total);
    if (e < experts) {
      offsets[e + 1] = earlier + sum;
    }
    earlier += total;
  }
  if (threadIdx.x == 0) {
    offsets[0] = 0;
  }
}

__global__ void place_kernel(Listing list, int experts, int limit, int rows, const int32_t* counts,
                             const int32_t* offsets, int32_t* row_of, int32_t* token_of) {
  M2MKD_DYNAMIC_SHARED(int, warp_counts);
  const Rank own = rank_in_block(list, experts, warp_counts);
  // There are at least as many threads as rows, so each also clears one row of padding.
  const int i = blockIdx.x * kPlanBlock + threadIdx.x;
  if (i < rows && i >= offsets[experts]) {
    token_of[i] = -1;
  }
  if (own.choice < 0) {
    return;
  }
  int row = -1;
  if (own.expert >= 0) {
    int place = counts[int64_t(blockIdx.x) * experts + own.expert] + own.rank;
    for (int w = 0; w < int(threadIdx.x) / kWarp; ++w) {
      place += warp_counts[w * experts + own.expert];
    }
    if (limit < 0 || place < limit) {
      row = offsets[own.expert] + place;
      token_of[row] = own.choice / list.k;
    }
  }
  row_of[own.choice] = row;
}

}  // namespace

int launch_moe_plan(const int32_t* chosen, const int64_t* order, int tokens, int k, int experts,
                    int limit, int rows, int32_t* counts, int32_t* row_of, int32_t* token_of,
                    int32_t* offsets, void* stream) {
  const Listing list{chosen, order, tokens, k, limit >= 0};
  const int blocks = int((int64_t(tokens) * k + kPlanBlock - 1) / kPlanBlock);
  const int shared = kWarps * experts * int(sizeof(int));
  if (blocks > 0) {
    M2MKD_LAUNCH(count_kernel, blocks, kPlanBlock, shared, stream, list, experts, counts);
  }
  M2MKD_LAUNCH(scan_blocks_kernel, experts, kPlanBlock, 0, stream, counts, blocks, experts, limit,
               offsets);
  M2MKD_LAUNCH(scan_experts_kernel, 1, kPlanBlock, 0, stream, experts, offsets);
  if (blocks > 0) {
    M2MKD_LAUNCH(place_kernel, blocks, kPlanBlock, shared, stream, list, experts, limit, rows,
                 counts, offsets, row_of, token_of);
  }
  return cudaGetLastError();
}

int read_integers(const int32_t* from, int count, int32_t* to, void* stream) {
  const auto handle = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      cudaMemcpyAsync(to, from, count * sizeof(int32_t), cudaMemcpyDeviceToHost, handle);
  return error != cudaSuccess ? error : cudaStreamSynchronize(handle);
}

}  // namespace m2mkd::cuda
