// The element-wise parts of expert layers: bias and activation in one pass, their backward with the
// gate's gradient in one pass, and column sums for bias gradients.

#include "launchers.h"
#include "platform.h"

namespace m2mkd::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 65535;
constexpr int kColumns = 32;
constexpr int kLanes = 8;

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

// A block walks rows; its threads stride over the packs of a row.
template <typename T, int N>
__global__ void activate_kernel(Activation act, const T* z, const T* bias, const int32_t* offsets,
                                int experts, int rows, int packs, T* out) {
  using P = Pack<T, N>;
  using A = compute_t<T>;
  const int used = offsets[experts];
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const P* source = reinterpret_cast<const P*>(z) + int64_t(row) * packs;
    P* target = reinterpret_cast<P*>(out) + int64_t(row) * packs;
    const int64_t expert = row < used ? expert_of(offsets, experts, row) : 0;
    const P* shift = reinterpret_cast<const P*>(bias) + expert * packs;
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
      P result = {};
      if (row < used) {
        const P input = source[p];
        P b = {};
        if (bias != nullptr) {
          b = shift[p];
        }
        for (int n = 0; n < N; ++n) {
          result.at[n] = narrow<T>(activation<A>(act, A(widen(input.at[n])) + A(widen(b.at[n]))).y);
        }
      }
      target[p] = result;
    }
  }
}

// Sum over the block in a fixed order, valid on thread 0. `scratch` has one entry per warp.
template <typename A>
__device__ A block_sum(A x, A* scratch) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  A sum = 0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
    sum += scratch[w];
  }
  return sum;
}

// A block per row: dz = w da act'(z), weighted = w act(z), gate gradient = da . act(z) + g . b2.
template <typename T, int N>
__global__ void activate_backward_kernel(Activation act, ActivateBackward a) {
  using P = Pack<T, N>;
  using A = compute_t<T>;
  M2MKD_SHARED(A, scratch, kThreads / kWarp);
  const int packs = a.hidden / N;
  const int used = a.offsets[a.experts];
  for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {
    P* grad = static_cast<P*>(a.hidden_grad) + int64_t(row) * packs;
    P* weighted = static_cast<P*>(a.weighted) + int64_t(row) * packs;
    if (row >= used) {
      for (int p = threadIdx.x; p < packs; p += blockDim.x) {
        grad[p] = P{};
        if (a.weighted != nullptr) {
          weighted[p] = P{};
        }
      }
      continue;
    }
    const int64_t expert = expert_of(a.offsets, a.experts, row);
    const A weight = static_cast<const A*>(a.weight_of)[row];
    const P* z = static_cast<const P*>(a.z) + int64_t(row) * packs;
    const P* bias = static_cast<const P*>(a.fc1_bias) + expert * packs;
    A sum = 0;
    for (int p = threadIdx.x; p < packs; p += blockDim.x) {
      const P input = z[p];
      P b = {};
      if (a.fc1_bias != nullptr) {
        b = bias[p];
      }
      P g = grad[p];
      P w = {};
      for (int n = 0; n < N; ++n) {
        const auto value = activation<A>(act, A(widen(input.at[n])) + A(widen(b.at[n])));
        const A upstream = widen(g.at[n]);
        sum += upstream * value.y;
        w.at[n] = narrow<T>(weight * value.y);
        g.at[n] = narrow<T>(weight * upstream * value.slope);
      }
      grad[p] = g;
      if (a.weighted != nullptr) {
        weighted[p] = w;
      }
    }
    if (a.fc2_bias != nullptr) {
      const T* upstream = static_cast<const T*>(a.upstream) + int64_t(row) * a.width;
      const T* bias2 = static_cast<const T*>(a.fc2_bias) + expert * a.width;
      for (int i = threadIdx.x; i < a.width; i += blockDim.x) {
        sum += A(widen(upstream[i])) * A(widen(bias2[i]));
      }
    }
    sum = block_sum(sum, scratch);
    const int choice = a.choice_of[row];
    if (threadIdx.x == 0 && choice >= 0) {
      static_cast<A*>(a.gate_grad)[choice] = sum;
    }
  }
}

// A block per 32 columns of one expert: 8 threads a column take every eighth row, then their sums
// are added in order.
template <typename T>
__global__ void sum_columns_kernel(const T* rows, const compute_t<T>* scale, const int32_t* offsets,
                                   int width, T* out) {
  using A = compute_t<T>;
  M2MKD_SHARED(A, partial, kColumns * kLanes);
  const int expert = blockIdx.y;
  const int column = blockIdx.x * kColumns + threadIdx.x % kColumns;
  const int lane = threadIdx.x / kColumns;
  A sum = 0;
  if (column < width) {
    for (int row = offsets[expert] + lane; row < offsets[expert + 1]; row += kLanes) {
      const A weight = scale != nullptr ? scale[row] : A(1);
      sum += weight * A(widen(rows[int64_t(row) * width + column]));
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (lane == 0 && column < width) {
    A total = 0;
    for (int i = 0; i < kLanes; ++i) {
      total += partial[i * kColumns + threadIdx.x];
    }
    out[int64_t(expert) * width + column] = narrow<T>(total);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int blocks_for(int rows) { return rows < kMaxBlocks ? rows : kMaxBlocks; }

template <typename T, int N>
void activate(Activation act, const void* z, const void* bias, const int32_t* offsets, int experts,
              int rows, int width, void* out, void* stream) {
  M2MKD_LAUNCH((activate_kernel<T, N>), blocks_for(rows), kThreads, 0, stream, act,
               static_cast<const T*>(z), static_cast<const T*>(bias), offsets, experts, rows,
               width / N, static_cast<T*>(out));
}

template <typename T>
void sum_columns(const void* rows, const void* scale, const int32_t* offsets, int experts,
                 int width, void* out, void* stream) {
  const dim3 grid((width + kColumns - 1) / kColumns, experts);
  M2MKD_LAUNCH(sum_columns_kernel<T>, grid, kColumns * kLanes, 0, stream,
               static_cast<const T*>(rows), static_cast<const compute_t<T>*>(scale), offsets, width,
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
        M2MKD_LAUNCH((activate_backward_kernel<T, kPack<T>>), blocks_for(a.rows), kThreads, 0,
                     stream, act, a);
      } else {
        M2MKD_LAUNCH((activate_backward_kernel<T, 1>), blocks_for(a.rows), kThreads, 0, stream, act,
                     a);
      });
  return cudaGetLastError();
}

int launch_sum_columns(DType dtype, const void* rows, const void* scale, const int32_t* offsets,
                       int experts, int width, void* out, void* stream) {
  if (width == 0) {
    return cudaSuccess;
  }
  M2MKD_FOR_DTYPE(dtype, sum_columns<T>(rows, scale, offsets, experts, width, out, stream));
  return cudaGetLastError();
}

}  // namespace m2mkd::cuda
