// What kernel files need from the platform, behind macros, so that the same file can be compiled by
// a host compiler with another definition of them. Kernels use no more of CUDA than threadIdx,
// blockIdx, blockDim, gridDim, __syncthreads, __syncwarp and shuffles with the full mask.

#pragma once

#include <cstdint>

#ifndef M2MKD_PLATFORM
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define M2MKD_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define M2MKD_SHARED(type, name, count) __shared__ type name[count]
#define M2MKD_DYNAMIC_SHARED(type, name)                   \
  extern __shared__ __align__(16) unsigned char name##_[]; \
  type* name = reinterpret_cast<type*>(name##_)
#else
#include M2MKD_PLATFORM  // csrc/emulator/platform.h
#endif

// Runs a statement with T as the C++ type of a DType.
#define M2MKD_FOR_DTYPE(dtype, ...) \
  switch (dtype) {                  \
    case DType::f32: {              \
      using T = float;              \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case DType::f64: {              \
      using T = double;             \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case DType::f16: {              \
      using T = __half;             \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
    case DType::bf16: {             \
      using T = __nv_bfloat16;      \
      __VA_ARGS__;                  \
      break;                        \
    }                               \
  }

namespace m2mkd::cuda {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarp = 32;

// Element-wise arithmetic is done in float, or in double on doubles.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using compute_t = typename Compute<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T narrow(compute_t<T> x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Sixteen bytes of T, moved by one instruction where N fills them; N = 1 is the scalar path.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};
template <typename T>
constexpr int kPack = 16 / sizeof(T);

// Sum over the warp, the same on every lane, in a fixed order.
template <typename A>
__device__ inline A warp_sum(A x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(kFullMask, x, step);
  }
  return x;
}

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

}  // namespace m2mkd::cuda
