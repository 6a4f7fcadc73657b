// Activations and their derivatives, branch-free in float so that loops over them become vector
// code, and by the standard library in double.
//
// Errors in float against exact arithmetic, over all finite inputs (tests/ops/test_activations.py):
// within a few units in the last place of the result itself, also in the tails where
// x * (1 + erf(x / sqrt(2))) / 2 cancels.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace m2mkd::cpu {

// The value of an activation and of its derivative at one point.
template <typename A>
struct Value {
  A y;
  A slope;
};

// Magnitude and sign of a float as integers: compilers keep integer minima and masks branch-free,
// while they split loops at float comparisons.
M2MKD_INLINE int32_t magnitude_bits(float x) { return std::bit_cast<int32_t>(x) & 0x7fffffff; }

// x limited to [-limit, limit]; NaN becomes a limit.
M2MKD_INLINE float limited(float x, float limit) {
  const int32_t top = std::bit_cast<int32_t>(limit);
  const int32_t bits = magnitude_bits(x);
  const int32_t sign = std::bit_cast<int32_t>(x) & INT32_MIN;
  return std::bit_cast<float>((bits < top ? bits : top) | sign);
}

// exp(a + b) for -87.3 < a <= 0 and a small b <= 0, to about 1e-7 relative; together a and b may
// carry more digits than one float.
M2MKD_INLINE float exp_sum(float a, float b) {
  const float shifted = a * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = a - n * 0.693145752f;
  r = r - n * 1.42860677e-6f + b;
  // Polynomials are summed in pairs (Estrin): short chains matter more here than few operations.
  const float r2 = r * r;
  const float high = (1.381453999e-03f * r2 + (8.368745116e-03f * r + 4.166839079e-02f)) * r2;
  const float p = (high + (1.666652040e-01f * r + 4.999999343e-01f)) * r2 + (r + 1.0f);
  const int32_t power = std::bit_cast<int32_t>(shifted) << 23;
  return std::bit_cast<float>(std::bit_cast<int32_t>(p) + power);
}

// exp(x) for x <= 0 or barely above, to about 1e-7 relative; 0 below -87.3, where results would be
// denormal; NaN stays NaN.
M2MKD_INLINE float exp_negative(float x) {
  const float e = exp_sum(x, 0.0f);
  const float y = x < -87.3f ? 0.0f : e;
  return x == x ? y : x;
}

// The normal distribution function and density: cdf(x) for x <= 0 is exp(-x^2/2) R(|x|) with R a
// polynomial in 1 / (1 + 0.35 |x|), fitted to 3.2e-8 relative on [0, 14.5]. Beyond |x| = 13.19 the
// exponential stays at its last normal float, which no sum notices.
struct Normal {
  float cdf;
  float density;
};

constexpr float kNormalLimit = 13.19f;

M2MKD_INLINE Normal normal(float x) {
  const float t = std::bit_cast<float>(magnitude_bits(limited(x, kNormalLimit)));
  // t^2/2 = head^2/2 + (t + head)(t - head)/2, the first exact in float.
  const float head = std::bit_cast<float>(std::bit_cast<int32_t>(t) & int32_t(0xfffff000));
  const float e = exp_sum(-0.5f * head * head, -0.5f * (t + head) * (t - head));
  const float s = 1.0f / (0.35f * std::bit_cast<float>(magnitude_bits(x)) + 1.0f);
  const float s2 = s * s;
  const float s4 = s2 * s2;
  const float low = (1.0555246956e-01f * s + 1.1982129567e-01f) * s2 +
                    (1.3986351439e-01f * s + 1.3962130690e-01f);
  const float middle = (1.4403086739e-01f * s - 2.5583889798e-01f) * s2 +
                       (1.5931957688e-01f * s - 2.3212273908e-02f);
  const float r = (-2.9157874885e-02f * s4 + middle) * s4 + low;
  const float tail = e * (r * s);
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.398942280f};
}

// The logistic function and its derivative.
struct Logistic {
  float value;
  float slope;
};

constexpr float kLogisticLimit = 87.0f;

M2MKD_INLINE Logistic logistic(float x) {
  const float e = exp_sum(-std::bit_cast<float>(magnitude_bits(limited(x, kLogisticLimit))), 0.0f);
  const float large = 1.0f / (1.0f + e);
  const float small = e * large;
  return {x < 0.0f ? small : large, small * large};
}

struct Gelu {
  // The value alone, in half the instructions: cdf(x) - 1/2 is x P(x^2) / Q(x^2), fitted to 1.7e-8
  // relative on |x| < 5.5. Unlike at(), its relative error grows in the negative tail, where 1/2
  // cancels; it stays below a unit in the last place of x.
  M2MKD_INLINE static float value(float x) {
    const float c = limited(x, 5.5f);
    const float u = c * c;
    float p = 2.293118214e-08f;
    float q = 1.199028557e-06f;
    p = p * u + 6.301583413e-06f;
    q = q * u + 7.216682254e-05f;
    p = p * u + 1.645731366e-04f;
    q = q * u + 1.860642534e-03f;
    p = p * u + 4.651478404e-03f;
    q = q * u + 2.841609665e-02f;
    p = p * u + 3.345883484e-02f;
    q = q * u + 2.505352629e-01f;
    p = p * u + 3.989422738e-01f;
    q = q * u + 1.0f;
    const float y = x * (c * p / q + 0.5f);
    return x < -5.5f ? 0.0f : y;
  }
  static double value(double x) { return at(x).y; }
  M2MKD_INLINE static Value<float> at(float x) {
    const Normal n = normal(x);
    return {x * n.cdf, n.cdf + limited(x, kNormalLimit) * n.density};
  }
  static Value<double> at(double x) {
    const double cdf = 0.5 * std::erfc(-x * 0.70710678118654752440);
    return {x * cdf, cdf + x * std::exp(-0.5 * x * x) * 0.39894228040143267794};
  }
};

// x * logistic(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2.
struct GeluTanh {
  template <typename A>
  M2MKD_INLINE static A value(A x) {
    return at(x).y;
  }
  M2MKD_INLINE static Value<float> at(float x) {
    const float c = limited(x, 9.9f);  // the logistic is 0 or 1 to the last bit beyond
    const float square = c * c;
    const Logistic l = logistic(1.59576912f * c * (0.044715f * square + 1.0f));
    const float du = 1.59576912f * (0.134145f * square + 1.0f);
    return {(x < 0.0f ? c : x) * l.value, l.value + c * l.slope * du};
  }
  static Value<double> at(double x) {
    const double u = 1.59576912160573071176 * (x + 0.044715 * x * x * x);
    const double e = std::exp(-std::abs(u));
    const double large = 1.0 / (1.0 + e);
    const double value = u < 0.0 ? e * large : large;
    const double du = 1.59576912160573071176 * (1.0 + 0.134145 * x * x);
    return {x * value, value + (e > 0.0 ? x * e * large * large * du : 0.0)};
  }
};

struct Silu {
  template <typename A>
  M2MKD_INLINE static A value(A x) {
    return at(x).y;
  }
  M2MKD_INLINE static Value<float> at(float x) {
    const float c = limited(x, kLogisticLimit);
    const Logistic l = logistic(x);
    return {(x < 0.0f ? c : x) * l.value, l.value + c * l.slope};
  }
  static Value<double> at(double x) {
    const double e = std::exp(-std::abs(x));
    const double large = 1.0 / (1.0 + e);
    const double value = x < 0.0 ? e * large : large;
    return {x * value, value + (e > 0.0 ? x * e * large * large : 0.0)};
  }
};

struct Relu {
  template <typename A>
  M2MKD_INLINE static A value(A x) {
    return x < A(0) ? A(0) : x;
  }
  template <typename A>
  M2MKD_INLINE static Value<A> at(A x) {
    return {x < A(0) ? A(0) : x, x > A(0) ? A(1) : A(0)};
  }
};

}  // namespace m2mkd::cpu
