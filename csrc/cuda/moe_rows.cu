// Moving rows between token order and expert order. Elements move in packs of sixteen bytes where
// width and addresses allow, else one by one. One thread writes each output element, in a fixed
// order of summation.

#include "launchers.h"
#include "platform.h"

namespace m2mkd::cuda {

namespace {

constexpr int kThreads = 256;

// A block is a few whole rows, with a thread per pack: threadIdx.x counts packs, threadIdx.y rows.
dim3 block_of(int packs) {
  const int across = packs < kThreads ? packs : kThreads;
  return dim3(across, kThreads / across);
}
int blocks_of(int rows, int packs) {
  const int per_block = kThreads / (packs < kThreads ? packs : kThreads);
  return (rows - 1) / per_block + 1;
}

template <typename T, int N>
__global__ void gather_kernel(const T* x, const int32_t* token_of, int rows, int packs, T* out) {
  using P = Pack<T, N>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) {
    return;
  }
  const int64_t token = token_of[row];
  const P* source = reinterpret_cast<const P*>(x) + token * packs;
  P* target = reinterpret_cast<P*>(out) + row * packs;
  for (int p = threadIdx.x; p < packs; p += blockDim.x) {
    target[p] = token >= 0 ? source[p] : P{};
  }
}

template <typename T, int N>
__global__ void sum_rows_kernel(const T* rows, const int32_t* row_of, const compute_t<T>* weights,
                                int tokens, int k, int packs, T* out) {
  using P = Pack<T, N>;
  using A = compute_t<T>;
  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) {
    return;
  }
  P* target = reinterpret_cast<P*>(out) + token * packs;
  for (int p = threadIdx.x; p < packs; p += blockDim.x) {
    A sums[N] = {};
    for (int j = 0; j < k; ++j) {
      const int64_t row = row_of[token * k + j];
      if (row < 0) {
        continue;
      }
      const A weight = weights != nullptr ? weights[token * k + j] : A(1);
      const P pack = reinterpret_cast<const P*>(rows)[row * packs + p];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        sums[n] += weight * pack.get(n);
      }
    }
    P pack = {};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      pack.set(n, sums[n]);
    }
    target[p] = pack;
  }
}

// One warp per choice.
template <typename T, int N>
__global__ void combine_backward_kernel(const T* grad, const T* rows, const compute_t<T>* weights,
                                        const int32_t* row_of, int choices, int k, int packs,
                                        T* grad_rows, compute_t<T>* grad_weights) {
  using P = Pack<T, N>;
  using A = compute_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int choice = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (choice >= choices) {
    return;
  }
  const int row = row_of[choice];
  A sum = 0;
  if (row >= 0) {
    const A weight = weights[choice];
    const P* upstream = reinterpret_cast<const P*>(grad) + int64_t(choice / k) * packs;
    const P* source = reinterpret_cast<const P*>(rows) + int64_t(row) * packs;
    P* down = reinterpret_cast<P*>(grad_rows) + int64_t(row) * packs;
    for (int p = lane; p < packs; p += kWarp) {
      const P g = upstream[p];
      const P r = source[p];
      P d = {};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        sum += g.get(n) * r.get(n);
        d.set(n, weight * g.get(n));
      }
      down[p] = d;
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) {
    grad_weights[choice] = sum;
  }
}

template <typename A>
__global__ void invert_rows_kernel(const int32_t* row_of, const A* weights, int choices,
                                   int32_t* choice_of, A* weight_of) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < choices && row_of[i] >= 0) {
    choice_of[row_of[i]] = i;
    weight_of[row_of[i]] = weights[i];
  }
}

int blocks_for(int items, int per_block) { return (items - 1) / per_block + 1; }

// Whether rows of this width can be moved in packs from and to these addresses.
template <typename T>
bool packs_fit(int width, const void* a, const void* b, const void* c) {
  const auto address = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
                       reinterpret_cast<uintptr_t>(c);
  return width % kPack<T> == 0 && address % 16 == 0;
}

template <typename T, int N>
void gather(const void* x, const int32_t* token_of, int rows, int width, void* out, void* stream) {
  M2MKD_LAUNCH((gather_kernel<T, N>), blocks_of(rows, width / N), block_of(width / N), 0, stream,
               static_cast<const T*>(x), token_of, rows, width / N, static_cast<T*>(out));
}

template <typename T, int N>
void sum_rows(const void* rows, const int32_t* row_of, const void* weights, int tokens, int k,
              int width, void* out, void* stream) {
  M2MKD_LAUNCH((sum_rows_kernel<T, N>), blocks_of(tokens, width / N), block_of(width / N), 0,
               stream, static_cast<const T*>(rows), row_of,
               static_cast<const compute_t<T>*>(weights), tokens, k, width / N,
               static_cast<T*>(out));
}

template <typename T, int N>
void combine_backward(const void* grad, const void* rows, const void* weights,
                      const int32_t* row_of, int tokens, int k, int width, void* grad_rows,
                      void* grad_weights, void* stream) {
  using A = compute_t<T>;
  const int warps = kThreads / kWarp, choices = tokens * k;
  M2MKD_LAUNCH((combine_backward_kernel<T, N>), blocks_for(choices, warps), kThreads, 0, stream,
               static_cast<const T*>(grad), static_cast<const T*>(rows),
               static_cast<const A*>(weights), row_of, choices, k, width / N,
               static_cast<T*>(grad_rows), static_cast<A*>(grad_weights));
}

}  // namespace

int launch_gather(DType dtype, const void* x, const int32_t* token_of, int rows, int width,
                  void* out, void* stream) {
  if (rows == 0 || width == 0) {
    return cudaSuccess;
  }
  M2MKD_FOR_DTYPE(
      dtype,
      if (packs_fit<T>(width, x, out, nullptr)) {
        gather<T, kPack<T>>(x, token_of, rows, width, out, stream);
      } else { gather<T, 1>(x, token_of, rows, width, out, stream); });
  return cudaGetLastError();
}

int launch_sum_rows(DType dtype, const void* rows, const int32_t* row_of, const void* weights,
                    int tokens, int k, int width, void* out, void* stream) {
  if (tokens == 0 || width == 0) {
    return cudaSuccess;
  }
  M2MKD_FOR_DTYPE(
      dtype,
      if (packs_fit<T>(width, rows, out, nullptr)) {
        sum_rows<T, kPack<T>>(rows, row_of, weights, tokens, k, width, out, stream);
      } else { sum_rows<T, 1>(rows, row_of, weights, tokens, k, width, out, stream); });
  return cudaGetLastError();
}

int launch_combine_backward(DType dtype, const void* grad, const void* rows, const void* weights,
                            const int32_t* row_of, int tokens, int k, int width, void* grad_rows,
                            void* grad_weights, void* stream) {
  if (tokens == 0) {
    return cudaSuccess;
  }
  M2MKD_FOR_DTYPE(
      dtype,
      if (packs_fit<T>(width, grad, rows, grad_rows)) {
        combine_backward<T, kPack<T>>(grad, rows, weights, row_of, tokens, k, width, grad_rows,
                                      grad_weights, stream);
      } else {
        combine_backward<T, 1>(grad, rows, weights, row_of, tokens, k, width, grad_rows,
                               grad_weights, stream);
      });
  return cudaGetLastError();
}

int launch_invert_rows(DType dtype, const int32_t* row_of, const void* weights, int choices,
                       int32_t* choice_of, void* weight_of, void* stream) {
  if (choices == 0) {
    return cudaSuccess;
  }
  const int blocks = blocks_for(choices, kThreads);
  if (dtype == DType::f64) {
    M2MKD_LAUNCH(invert_rows_kernel<double>, blocks, kThreads, 0, stream, row_of,
                 static_cast<const double*>(weights), choices, choice_of,
                 static_cast<double*>(weight_of));
  } else {
    M2MKD_LAUNCH(invert_rows_kernel<float>, blocks, kThreads, 0, stream, row_of,
                 static_cast<const float*>(weights), choices, choice_of,
                 static_cast<float*>(weight_of));
  }
  return cudaGetLastError();
}

}  // namespace m2mkd::cuda
