// CUDA for kernels that a host compiler compiles, as far as csrc/cuda/*.cu use it; stands in for
// the CUDA headers through M2MKD_PLATFORM in cuda/platform.h.

#pragma once

#include <math.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::m2mkd::emulator::self().thread)
#define blockIdx (::m2mkd::emulator::self().block)
#define blockDim (::m2mkd::emulator::self().block_size)
#define gridDim (::m2mkd::emulator::self().grid_size)

#define M2MKD_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::m2mkd::emulator::launch(kernel, grid, block, shared, stream, __VA_ARGS__)
// One array for the block, whichever thread comes first; the key tells declarations apart.
#define M2MKD_SHARED(type, name, count)      \
  static const char name##_key = 0;          \
  auto& name = *static_cast<type(*)[count]>( \
      ::m2mkd::emulator::shared_array(&name##_key, #name, sizeof(type[count]), alignof(type)))
#define M2MKD_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::m2mkd::emulator::dynamic_shared())

using dim3 = ::m2mkd::emulator::Size;

// ---- the runtime's C interface
// -------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return ::m2mkd::emulator::last_error(); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return ::m2mkd::emulator::last_error(); }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  return ::m2mkd::emulator::copy_to_host(to, from, bytes);
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return ::m2mkd::emulator::allow_shared(reinterpret_cast<const void*>(kernel),
                                         static_cast<size_t>(bytes));
}

namespace m2mkd::cuda {

// Small, so that small problems fill the device, as large ones do a card.
struct DeviceLimits {
  int multiprocessors = 2;
  int shared_bytes = ::m2mkd::emulator::kMaxShared;
};
inline DeviceLimits device_limits() { return {}; }

}  // namespace m2mkd::cuda

// ---- synchronisation, shuffles, votes, atomics
// ---------------------------------------------------

#define __syncthreads() ::m2mkd::emulator::syncthreads()

// Inlined, so that reports name the kernel's line also where calls are not followed.
#define M2MKD_INLINE __attribute__((always_inline)) inline

M2MKD_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { ::m2mkd::emulator::syncwarp(mask); }

namespace m2mkd::emulator {

inline int lane() {
  const Self& own = self();
  return static_cast<int>(
      (own.thread.x + own.block_size.x * (own.thread.y + own.block_size.y * own.thread.z)) % 32);
}

template <typename T>
M2MKD_INLINE T shuffle_value(const char* name, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(name, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace m2mkd::emulator

template <typename T>
M2MKD_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = ::m2mkd::emulator::lane() & ~(width - 1);
  return ::m2mkd::emulator::shuffle_value("__shfl_sync", mask, value,
                                          first | (source & (width - 1)));
}

template <typename T>
M2MKD_INLINE T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = ::m2mkd::emulator::lane(), end = (lane | (width - 1)) + 1;
  const int source = lane ^ distance;
  return ::m2mkd::emulator::shuffle_value("__shfl_xor_sync", mask, value,
                                          source < end ? source : lane);
}

template <typename T>
M2MKD_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = ::m2mkd::emulator::lane(), end = (lane | (width - 1)) + 1;
  const int source = lane + static_cast<int>(distance);
  return ::m2mkd::emulator::shuffle_value("__shfl_down_sync", mask, value,
                                          source < end ? source : lane);
}

template <typename T>
M2MKD_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = ::m2mkd::emulator::lane(), first = lane & ~(width - 1);
  const int source = lane - static_cast<int>(distance);
  return ::m2mkd::emulator::shuffle_value("__shfl_up_sync", mask, value,
                                          source >= first ? source : lane);
}

M2MKD_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::m2mkd::emulator::ballot("__ballot_sync", mask, predicate != 0);
}
M2MKD_INLINE int __any_sync(unsigned mask, int predicate) {
  return ::m2mkd::emulator::ballot("__any_sync", mask, predicate != 0) != 0;
}
M2MKD_INLINE int __all_sync(unsigned mask, int predicate) {
  return ::m2mkd::emulator::ballot("__all_sync", mask, predicate != 0) == mask;
}

namespace m2mkd::emulator {

template <typename T, typename F>
M2MKD_INLINE T atomic_update(T* address, F&& next) {
  const AtomicAccess access(address, sizeof(T), std::is_floating_point_v<T>);
  const T old = *address;
  *address = next(old);
  return old;
}

}  // namespace m2mkd::emulator

template <typename T>
M2MKD_INLINE T atomicAdd(T* address, std::type_identity_t<T> value) {
  return ::m2mkd::emulator::atomic_update(address, [=](T old) { return T(old + value); });
}
template <typename T>
M2MKD_INLINE T atomicMax(T* address, std::type_identity_t<T> value) {
  return ::m2mkd::emulator::atomic_update(address,
                                          [=](T old) { return old < value ? value : old; });
}
template <typename T>
M2MKD_INLINE T atomicMin(T* address, std::type_identity_t<T> value) {
  return ::m2mkd::emulator::atomic_update(address,
                                          [=](T old) { return value < old ? value : old; });
}
template <typename T>
M2MKD_INLINE T atomicExch(T* address, std::type_identity_t<T> value) {
  return ::m2mkd::emulator::atomic_update(address, [=](T) { return value; });
}
template <typename T>
M2MKD_INLINE T atomicCAS(T* address, std::type_identity_t<T> expected,
                         std::type_identity_t<T> value) {
  return ::m2mkd::emulator::atomic_update(address,
                                          [=](T old) { return old == expected ? value : old; });
}

// ---- arithmetic; fast forms are as exact as the plain ones here
// -----------------------------------

using std::max;
using std::min;

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
