// The element-wise parts of expert layers: bias and activation in one pass, and their backward with
// the gate's gradient in one pass.

#include "launchers.h"
#include "moe_experts.h"

namespace m2mkd::cuda {

namespace {

constexpr int kThreads = 256;

template <typename A>
struct Value {
  A y;
  A slope;
};

// The activation and its derivative; formulas as in csrc/cpu/activations.h.
template <Activation Act, typename A>
__device__ Value<A> activation(A x) {
  if constexpr (Act == Activation::gelu) {
    const A cdf = A(0.5) * erfc(-x * A(0.70710678118654752440));
    return {x * cdf, cdf + x * A(0.39894228040143267794) * exp(A(-0.5) * x * x)};
  } else if constexpr (Act == Activation::gelu_tanh) {
    const A u = A(1.59576912160573071176) * (x + A(0.044715) * x * x * x);
    const A value = A(1) / (A(1) + exp(-u));
    const A tail = A(1) / (A(1) + exp(u));
    const A du = A(1.59576912160573071176) * (A(1) + A(0.134145) * x * x);
    return {x * value, value + (value > 0 && tail > 0 ? x * value * tail * du : A(0))};
  } else if constexpr (Act == Activation::silu) {
    const A value = A(1) / (A(1) + exp(-x));
    const A tail = A(1) / (A(1) + exp(x));
    return {x * value, value + (value > 0 && tail > 0 ? x * value * tail : A(0))};
  } else if constexpr (Act == Activation::relu) {
    return {x < A(0) ? A(0) : x, x > A(0) ? A(1) : A(0)};
  } else {
    return {x, A(1)};
  }
}

// A warp per row.
template <Activation Act, typename T, int N>
__global__ void activate_kernel(const T* z, const T* bias, const int32_t* offsets, int experts,
                                int rows, int packs, T* out) {
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
  if (Act == Activation::identity && used && shift == nullptr && source == target) {
    return;  // as it is to be: only padding is left to zero
  }
  for (int p = threadIdx.x % kWarp; p < packs; p += kWarp) {
    P result = {};
    if (used) {
      const P input = source[p];
      const P b = shift != nullptr ? shift[p] : P{};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        result.set(n, activation<Act>(input.get(n) + b.get(n)).y);
      }
    }
    target[p] = result;
  }
}

// A warp per row: dz = w da act'(z), weighted = w act(z), gate gradient = da . act(z) + g . b2.
template <Activation Act, typename T, int N>
__global__ void activate_backward_kernel(ActivateBackward a) {
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
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const auto value = activation<Act>(input.get(n) + b.get(n));
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

template <Activation Act, typename T, int N>
void activate(const void* z, const void* bias, const int32_t* offsets, int experts, int rows,
              int width, void* out, void* stream) {
  M2MKD_LAUNCH((activate_kernel<Act, T, N>), blocks_for(rows, kThreads / kWarp), kThreads, 0,
               stream, static_cast<const T*>(z), static_cast<const T*>(bias), offsets, experts,
               rows, width / N, static_cast<T*>(out));
}

template <Activation Act, typename T, int N>
void activate_backward(const ActivateBackward& a, void* stream) {
  M2MKD_LAUNCH((activate_backward_kernel<Act, T, N>), blocks_for(a.rows, kThreads / kWarp),
               kThreads, 0, stream, a);
}

// Calls f with an activation as a constant, so that kernels do not choose per element.
template <typename F>
void with_activation(Activation act, F&& f) {
  switch (act) {
    case Activation::identity:
      return f(std::integral_constant<Activation, Activation::identity>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
  }
}

}  // namespace

int launch_activate(DType dtype, Activation act, const void* z, const void* bias,
                    const int32_t* offsets, int experts, int rows, int width, void* out,
                    void* stream) {
  if (rows == 0 || width == 0) {
    return cudaSuccess;
  }
  const bool whole = aligned(z) && aligned(bias) && aligned(out);
  M2MKD_FOR_DTYPE(dtype, with_activation(act, [&](auto constant) {
                    constexpr Activation kAct = decltype(constant)::value;
                    if (whole && width % kPack<T> == 0) {
                      activate<kAct, T, kPack<T>>(z, bias, offsets, experts, rows, width, out,
                                                  stream);
                    } else {
                      activate<kAct, T, 1>(z, bias, offsets, experts, rows, width, out, stream);
                    }
                  }));
  return cudaGetLastError();
}

int launch_activate_backward(DType dtype, Activation act, const ActivateBackward& a, void* stream) {
  if (a.rows == 0) {
    return cudaSuccess;
  }
  const bool whole =
      aligned(a.z) && aligned(a.fc1_bias) && aligned(a.hidden_grad) && aligned(a.weighted);
  M2MKD_FOR_DTYPE(dtype, with_activation(act, [&](auto constant) {
                    constexpr Activation kAct = decltype(constant)::value;
                    if (whole && a.hidden % kPack<T> == 0) {
                      activate_backward<kAct, T, kPack<T>>(a, stream);
                    } else {
                      activate_backward<kAct, T, 1>(a, stream);
                    }
                  }));
  return cudaGetLastError();
}

}  // namespace m2mkd::cuda
