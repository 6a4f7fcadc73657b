// Router kernels: one warp per token, lanes stride over experts.

#include "launchers.h"
#include "platform.h"

namespace m2mkd::cuda {

namespace {

constexpr int kThreads = 128;

// A logit as a sort key: NaN sorts below everything, so that indices stay valid.
template <typename T>
__device__ inline compute_t<T> key_of(T logit) {
  const compute_t<T> x = widen(logit);
  return x == x ? x : -INFINITY;
}

// The next expert after (value, expert) in falling order of keys, then rising order of numbers.
template <typename T>
__device__ void next_largest(const T* logits, int experts, int lane, compute_t<T>& value,
                             int& expert) {
  using A = compute_t<T>;
  A best = -INFINITY;
  int best_expert = experts;
  for (int e = lane; e < experts; e += kWarp) {
    const A x = key_of(logits[e]);
    const bool later = x < value || (x == value && e > expert);
    if (later && (best_expert == experts || x > best)) {
      best = x;
      best_expert = e;
    }
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kFullMask, best, step);
    const int other_expert = __shfl_xor_sync(kFullMask, best_expert, step);
    const bool better = other_expert < experts && (best_expert == experts || other > best ||
                                                   (other == best && other_expert < best_expert));
    best = better ? other : best;
    best_expert = better ? other_expert : best_expert;
  }
  value = best;
  expert = best_expert;
}

// Softmax denominator relative to the largest logit; the same on every lane.
template <typename T>
__device__ compute_t<T> denominator(const T* logits, int experts, const int32_t* chosen, int k,
                                    GateMode mode, int lane) {
  using A = compute_t<T>;
  const A largest = widen(logits[chosen[0]]);
  const int count = mode == GateMode::all ? experts : k;
  A sum = 0;
  for (int i = lane; i < count; i += kWarp) {
    sum += exp(A(widen(logits[mode == GateMode::all ? i : chosen[i]])) - largest);
  }
  return warp_sum(sum);
}

template <typename T>
__global__ void topk_gate_kernel(const T* logits, int tokens, int experts, int k, GateMode mode,
                                 T* weights, int32_t* chosen) {
  using A = compute_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int token = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (token >= tokens) {
    return;
  }
  const T* row = logits + int64_t(token) * experts;
  int32_t* top = chosen + int64_t(token) * k;
  A value = INFINITY;
  int expert = -1;
  for (int j = 0; j < k; ++j) {
    next_largest(row, experts, lane, value, expert);
    if (lane == 0) {
      top[j] = expert;
    }
  }
  __syncwarp(kFullMask);
  const A sum = denominator(row, experts, top, k, mode, lane);
  for (int j = lane; j < k; j += kWarp) {
    const A shifted = A(widen(row[top[j]])) - A(widen(row[top[0]]));
    weights[int64_t(token) * k + j] = narrow<T>(exp(shifted) / sum);
  }
}

// d logit_e = p_e (g_e - sum_j g_j p_j), over all experts or over the chosen ones.
template <typename T>
__global__ void topk_gate_backward_kernel(const T* grad, const T* logits, const int32_t* chosen,
                                          int tokens, int experts, int k, GateMode mode,
                                          T* result) {
  using A = compute_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int token = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (token >= tokens) {
    return;
  }
  const T* row = logits + int64_t(token) * experts;
  const T* upstream = grad + int64_t(token) * k;
  const int32_t* top = chosen + int64_t(token) * k;
  const A sum = denominator(row, experts, top, k, mode, lane);
  const A largest = widen(row[top[0]]);
  A part = 0;
  for (int j = lane; j < k; j += kWarp) {
    part += A(widen(upstream[j])) * exp(A(widen(row[top[j]])) - largest) / sum;
  }
  const A mean = warp_sum(part);
  for (int e = lane; e < experts; e += kWarp) {
    A own = 0;
    bool counts = mode == GateMode::all;
    for (int j = 0; j < k; ++j) {
      if (top[j] == e) {
        own = widen(upstream[j]);
        counts = true;
      }
    }
    const A p = counts ? exp(A(widen(row[e])) - largest) / sum : A(0);
    result[int64_t(token) * experts + e] = narrow<T>(p * (own - mean));
  }
}

int blocks_for(int tokens) { return (tokens - 1) / (kThreads / kWarp) + 1; }

template <typename T>
void gate(const void* logits, int tokens, int experts, int k, GateMode mode, void* weights,
          int32_t* chosen, void* stream) {
  M2MKD_LAUNCH(topk_gate_kernel<T>, blocks_for(tokens), kThreads, 0, stream,
               static_cast<const T*>(logits), tokens, experts, k, mode, static_cast<T*>(weights),
               chosen);
}

template <typename T>
void gate_backward(const void* grad, const void* logits, const int32_t* chosen, int tokens,
                   int experts, int k, GateMode mode, void* result, void* stream) {
  M2MKD_LAUNCH(topk_gate_backward_kernel<T>, blocks_for(tokens), kThreads, 0, stream,
               static_cast<const T*>(grad), static_cast<const T*>(logits), chosen, tokens, experts,
               k, mode, static_cast<T*>(result));
}

}  // namespace

int launch_topk_gate(DType dtype, const void* logits, int tokens, int experts, int k, GateMode mode,
                     void* weights, int32_t* chosen, void* stream) {
  if (tokens == 0) {
    return cudaSuccess;
  }
  M2MKD_FOR_DTYPE(dtype, gate<T>(logits, tokens, experts, k, mode, weights, chosen, stream));
  return cudaGetLastError();
}

int launch_topk_gate_backward(DType dtype, const void* grad, const void* logits,
                              const int32_t* chosen, int tokens, int experts, int k, GateMode mode,
                              void* result, void* stream) {
  if (tokens == 0) {
    return cudaSuccess;
  }
  M2MKD_FOR_DTYPE(dtype,
                  gate_backward<T>(grad, logits, chosen, tokens, experts, k, mode, result, stream));
  return cudaGetLastError();
}

}  // namespace m2mkd::cuda
