// What kernel files need from the platform, behind macros, so that the same file can be compiled by
// a host compiler with another definition of them. Kernels use no more of CUDA than threadIdx,
// blockIdx, blockDim, gridDim, __syncthreads, __syncwarp and shuffles with the full mask.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

namespace m2mkd::cuda {

// What launches are fitted to, of the current device.
struct DeviceLimits {
  int multiprocessors = 1;
  int shared_bytes = 48 << 10;  // that a block may ask for
};
inline DeviceLimits device_limits() {
  DeviceLimits limits;
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return limits;
}

}  // namespace m2mkd::cuda
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

// N values of T, moved by one instruction where they fill sixteen bytes; N = 1 is the scalar path.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];

  __device__ compute_t<T> get(int n) const { return widen(at[n]); }
  __device__ void set(int n, compute_t<T> x) { at[n] = narrow<T>(x); }
};
template <typename T>
constexpr int kPack = 16 / sizeof(T);

// Packs of half types are kept in words of two: compilers move them as such, and widen a bfloat16
// by one instruction.
template <typename T>
struct alignas(16) HalfPack {
  uint32_t words[4];

  __device__ float get(int n) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const uint32_t bits = n % 2 == 0 ? words[n / 2] << 16 : words[n / 2] & 0xffff0000u;
      float x;
      memcpy(&x, &bits, sizeof(x));
      return x;
    } else {
      const uint16_t bits = uint16_t(words[n / 2] >> (n % 2 * 16));
      T x;
      memcpy(&x, &bits, sizeof(x));
      return widen(x);
    }
  }
  // In rising order of n.
  __device__ void set(int n, float x) {
    const T narrowed = narrow<T>(x);
    uint16_t bits;
    memcpy(&bits, &narrowed, sizeof(bits));
    words[n / 2] = n % 2 == 0 ? bits : words[n / 2] | uint32_t(bits) << 16;
  }
};
template <>
struct Pack<__half, 8> : HalfPack<__half> {};
template <>
struct Pack<__nv_bfloat16, 8> : HalfPack<__nv_bfloat16> {};

// Sum over the warp, the same on every lane, in a fixed order.
template <typename A>
__device__ inline A warp_sum(A x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(kFullMask, x, step);
  }
  return x;
}

}  // namespace m2mkd::cuda
