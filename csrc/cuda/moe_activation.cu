// The element-wise parts of expert layers: bias and activation in one pass, their backward with the
// gate's gradient in one pass, and column sums for bias gradients.

#include "launchers.h"
#include "platform.h"

namespace m2mkd::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  // rows that a block of sum_chunks_kernel adds at a time

template <typename A>
struct Value {
  A y;
  A slope;
};

// The activation and its derivative; formulas as in csrc/cpu/activations.h.
template <typename A>
__device__ Value<A> activation(Activation act, A x) {
  switch (act) {
    case Activation::gelu: {
      const A cdf = A(0.5) * erfc(-x * A(0.70710678118654752440));
      return {x * cdf, cdf + x * A(0.39894228040143267794) * exp(A(-0.5) * x * x)};
    }
    case Activation::gelu_tanh: {
      const A u = A(1.59576912160573071176) * (x + A(0.044715) * x * x * x);
      const A value = A(1) / (A(1) + exp(-u));
      const A tail = A(1) / (A(1) + exp(u));
      const A du = A(1.59576912160573071176) * (A(1) + A(0.134145) * x * x);
      return {x * value, value + (value > 0 && tail > 0 ? x * value * tail * du : A(0))};
    }
    case Activation::silu: {
      const A value = A(1) / (A(1) + exp(-x));
      const A tail = A(1) / (A(1) + exp(x));
      return {x * value, value + (value > 0 && tail > 0 ? x * value * tail : A(0))};
    }
    case Activation::relu:
      return {x < A(0) ? A(0) : x, x > A(0) ? A(1) : A(0)};
    default:
      return {x, A(1)};
  }
}

// Expert whose rows contain `row`: the last e with offsets[e] <= row.
__device__ int expert_of(const int32_t* offsets, int experts, int row) {
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

// A warp per row.
template <typename T, int N>
__global__ void activate_kernel(Activation act, const T* z, const T* bias, const int32_t* offsets,
                                int experts, int rows, int packs, T* out) {
  using P = Pack<T, N>;
  using A = compute_t<T>;
  const int row = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) {
    return;
  }
  const bool used = row < offsets[experts];
  const P* source = reinterpret_cast<const P*>(z) + int64_t(row) * packs;
  P* target = reinterpret_cast<P*>(out) + int64_t(row) * packs;
  const P* shift = nullptr;
  if (used && bias != nullptr) {
    const int64_t expert = expert_of(offsets, experts, row);
    shift = reinterpret_cast<const P*>(bias) + expert * packs;
  }
  for (int p = threadIdx.x % kWarp; p < packs; p += kWarp) {
    P result = {};
    if (used) {
      const P input = source[p];
      const P b = shift != nullptr ? shift[p] : P{};
      for (int n = 0; n < N; ++n) {
        result.set(n, activation<A>(act, input.get(n) + b.get(n)).y);
      }
    }
    target[p] = result;
  }
}

// A warp per row: dz = w da act'(z), weighted = w act(z), gate gradient = da . act(z) + g . b2.
template <typename T, int N>
__global__ void activate_backward_kernel(Activation act, ActivateBackward a) {
  using P = Pack<T, N>;
  using A = compute_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int row = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= a.rows) {
    return;
  }
  const int packs = a.hidden / N;
  P* grad = static_cast<P*>(a.hidden_grad) + int64_t(row) * packs;
  P* weighted =
      a.weighted == nullptr ? nullptr : static_cast<P*>(a.weighted) + int64_t(row) * packs;
  if (row >= a.offsets[a.experts]) {
    for (int p = lane; p < packs; p += kWarp) {
      grad[p] = P{};
      if (weighted != nullptr) {
        weighted[p] = P{};
      }
    }
    return;
  }
  const int64_t expert = expert_of(a.offsets, a.experts, row);
  const A weight = static_cast<const A*>(a.weight_of)[row];
  const P* z = static_cast<const P*>(a.z) + int64_t(row) * packs;
  const P* bias =
      a.fc1_bias == nullptr ? nullptr : static_cast<const P*>(a.fc1_bias) + expert * packs;
  A sum = 0;
  for (int p = lane; p < packs; p += kWarp) {
    const P input = z[p];
    const P upstream = grad[p];
    const P b = bias != nullptr ? bias[p] : P{};
    P g = {};
    P w = {};
    for (int n = 0; n < N; ++n) {
      const auto value = activation<A>(act, input.get(n) + b.get(n));
      sum += upstream.get(n) * value.y;
      w.set(n, weight * value.y);
      g.set(n, weight * upstream.get(n) * value.slope);
    }
    grad[p] = g;
    if (weighted != nullptr) {
      weighted[p] = w;
    }
  }
  if (a.fc2_bias != nullptr) {
    const T* upstream = static_cast<const T*>(a.upstream) + int64_t(row) * a.width;
    const T* bias2 = static_cast<const T*>(a.fc2_bias) + expert * a.width;
    for (int i = lane; i < a.width; i += kWarp) {
      sum += A(widen(upstream[i])) * A(widen(bias2[i]));
    }
  }
  sum = warp_sum(sum);
  const int choice = a.choice_of[row];
  if (lane == 0 && choice >= 0) {
    static_cast<A*>(a.gate_grad)[choice] = sum;
  }
}

// Column sums come in two passes, so that the work is even however rows are shared among experts.
// This one: a block per kColumnChunk rows and 32 packs of columns. The rows of expert e in chunk c
// are summed into partial[c + e]: along the rows either c or e grows, so no two share an entry, and
// the first pass needs no list of them. Eight rows are added at a time, their sums in order.
template <typename T, int N>
__global__ void sum_chunks_kernel(const T* rows, const compute_t<T>* scale, const int32_t* offsets,
                                  int experts, int packs, compute_t<T>* partial) {
  using P = Pack<T, N>;
  using A = compute_t<T>;
  // Padded so that neither the writes nor the reads below meet in a bank.
  constexpr int kStride = kWarp + kWarp / N;
  M2MKD_SHARED(A, sums, kLanes * N * kStride);
  const int column = threadIdx.x % kWarp, lane = threadIdx.x / kWarp;
  const int pack = blockIdx.y * kWarp + column;
  const int64_t chunk_begin = int64_t(blockIdx.x) * kColumnChunk;
  const int64_t chunk_end = chunk_begin + kColumnChunk;
  if (chunk_begin >= offsets[experts]) {
    return;
  }
  for (int e = expert_of(offsets, experts, int(chunk_begin)); e < experts && offsets[e] < chunk_end;
       ++e) {
    const int64_t begin = offsets[e] > chunk_begin ? offsets[e] : chunk_begin;
    const int64_t end = offsets[e + 1] < chunk_end ? offsets[e + 1] : chunk_end;
    if (begin >= end) {
      continue;
    }
    A own[N] = {};
    if (pack < packs) {
      for (int64_t row = begin + lane; row < end; row += kLanes) {
        const A weight = scale != nullptr ? scale[row] : A(1);
        const P values = reinterpret_cast<const P*>(rows)[row * packs + pack];
        for (int n = 0; n < N; ++n) {
          own[n] += weight * values.get(n);
        }
      }
    }
    for (int n = 0; n < N; ++n) {
      sums[(lane * N + n) * kStride + column] = own[n];
    }
    __syncthreads();
    // Element i of the block's columns; consecutive threads write consecutive ones.
    for (int i = threadIdx.x; i < kWarp * N; i += blockDim.x) {
      A total = 0;
      for (int l = 0; l < kLanes; ++l) {
        total += sums[(l * N + i % N) * kStride + i / N];
      }
      const int64_t element = int64_t(blockIdx.y) * kWarp * N + i;
      if (element < int64_t(packs) * N) {
        partial[(blockIdx.x + int64_t(e)) * packs * N + element] = total;
      }
    }
    __syncthreads();
  }
}

// The other pass: a thread per column of an expert adds its chunks in order.
template <typename T>
__global__ void add_chunks_kernel(const compute_t<T>* partial, const int32_t* offsets, int experts,
                                  int width, T* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(experts) * width) {
    return;
  }
  const int expert = int(i / width);
  const int64_t begin = offsets[expert], end = offsets[expert + 1];
  compute_t<T> total = 0;
  if (begin < end) {
    const int64_t last = (end - 1) / kColumnChunk;
    for (int64_t chunk = begin / kColumnChunk; chunk <= last; ++chunk) {
      total += partial[(chunk + expert) * width + i % width];
    }
  }
  out[i] = narrow<T>(total);
}

int blocks_for(int64_t items, int per_block) { return int((items + per_block - 1) / per_block); }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, int N>
void activate(Activation act, const void* z, const void* bias, const int32_t* offsets, int experts,
              int rows, int width, void* out, void* stream) {
  M2MKD_LAUNCH((activate_kernel<T, N>), blocks_for(rows, kThreads / kWarp), kThreads, 0, stream,
               act, static_cast<const T*>(z), static_cast<const T*>(bias), offsets, experts, rows,
               width / N, static_cast<T*>(out));
}

template <typename T, int N>
void sum_columns(const void* rows, const void* scale, const int32_t* offsets, int experts,
                 int count, int width, void* partial, void* out, void* stream) {
  using A = compute_t<T>;
  const dim3 grid(blocks_for(count, kColumnChunk), blocks_for(width / N, kWarp));
  if (count > 0) {
    M2MKD_LAUNCH((sum_chunks_kernel<T, N>), grid, kWarp * kLanes, 0, stream,
                 static_cast<const T*>(rows), static_cast<const A*>(scale), offsets, experts,
                 width / N, static_cast<A*>(partial));
  }
  M2MKD_LAUNCH(add_chunks_kernel<T>, blocks_for(int64_t(experts) * width, kThreads), kThreads, 0,
               stream, static_cast<const A*>(partial), offsets, experts, width,
               static_cast<T*>(out));
}

}  // namespace

int launch_activate(DType dtype, Activation act, const void* z, const void* bias,
                    const int32_t* offsets, int experts, int rows, int width, void* out,
                    void* stream) {
  if (rows == 0 || width == 0) {
    return cudaSuccess;
  }
  const bool whole = aligned(z) && aligned(bias) && aligned(out);
  M2MKD_FOR_DTYPE(
      dtype,
      if (whole && width % kPack<T> == 0) {
        activate<T, kPack<T>>(act, z, bias, offsets, experts, rows, width, out, stream);
      } else { activate<T, 1>(act, z, bias, offsets, experts, rows, width, out, stream); });
  return cudaGetLastError();
}

int launch_activate_backward(DType dtype, Activation act, const ActivateBackward& a, void* stream) {
  if (a.rows == 0) {
    return cudaSuccess;
  }
  const bool whole =
      aligned(a.z) && aligned(a.fc1_bias) && aligned(a.hidden_grad) && aligned(a.weighted);
  M2MKD_FOR_DTYPE(
      dtype,
      if (whole && a.hidden % kPack<T> == 0) {
        M2MKD_LAUNCH((activate_backward_kernel<T, kPack<T>>), blocks_for(a.rows, kThreads / kWarp),
                     kThreads, 0, stream, act, a);
      } else {
        M2MKD_LAUNCH((activate_backward_kernel<T, 1>), blocks_for(a.rows, kThreads / kWarp),
                     kThreads, 0, stream, act, a);
      });
  return cudaGetLastError();
}

int launch_sum_columns(DType dtype, const void* rows, const void* scale, const int32_t* offsets,
                       int experts, int count, int width, void* partial, void* out, void* stream) {
  if (experts == 0 || width == 0) {
    return cudaSuccess;
  }
  M2MKD_FOR_DTYPE(
      dtype,
      if (aligned(rows) && width % kPack<T> == 0) {
        sum_columns<T, kPack<T>>(rows, scale, offsets, experts, count, width, partial, out, stream);
      } else {
        sum_columns<T, 1>(rows, scale, offsets, experts, count, width, partial, out, stream);
      });
  return cudaGetLastError();
}

}  // namespace m2mkd::cuda
