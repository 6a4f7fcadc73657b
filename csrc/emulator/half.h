// CUDA's 16-bit types and their conversions, which round to nearest, ties to even.

#pragma once

#include <bit>
#include <cstdint>

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

// CUDA's one NaN for both types.
constexpr uint16_t kHalfNaN = 0x7fff;

inline float __half2float(__half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

inline __half __float2half_rn(float x) {
  return {x == x ? std::bit_cast<uint16_t>(static_cast<_Float16>(x)) : kHalfNaN};
}

inline __half __float2half(float x) { return __float2half_rn(x); }

inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  // Adding just under half of the last kept bit rounds up, or exactly half where that bit is odd.
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return {x == x ? static_cast<uint16_t>(rounded >> 16) : kHalfNaN};
}

inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
