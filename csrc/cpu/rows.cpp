#include "rows.h"

#include "activations.h"
#include "simd.h"

namespace m2mkd::cpu {

namespace {

template <typename Act, typename T>
M2MKD_INLINE void activate_rows(const T* z, const T* bias, T* out, int64_t rows, int64_t n) {
  using A = compute_t<T>;
  for (int64_t r = 0; r < rows; ++r, z += n, out += n) {
    if (bias != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        out[i] = static_cast<T>(Act::value(static_cast<A>(z[i]) + static_cast<A>(bias[i])));
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        out[i] = static_cast<T>(Act::value(static_cast<A>(z[i])));
      }
    }
  }
}

// The flags are compile-time so that each combination is one straight vector loop.
template <typename Act, bool has_bias, bool wants_weighted, bool wants_bias_grad, typename T>
M2MKD_INLINE compute_t<T> backward_row(const BackwardRow<T>& row, compute_t<T> w, int64_t n) {
  using A = compute_t<T>;
  const T* z = row.z;
  const T* bias = row.bias;
  T* grad = row.grad;
  T* weighted = row.weighted;
  A* bias_grad = row.bias_grad;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const A input =
        has_bias ? static_cast<A>(z[i]) + static_cast<A>(bias[i]) : static_cast<A>(z[i]);
    const auto value = Act::at(input);
    const A upstream = static_cast<A>(grad[i]);
    sum += upstream * value.y;
    if (wants_weighted) {
      weighted[i] = static_cast<T>(w * value.y);
    }
    const A down = w * upstream * value.slope;
    grad[i] = static_cast<T>(down);
    if (wants_bias_grad) {
      bias_grad[i] += down;
    }
  }
  return sum;
}

template <typename Act, bool has_bias, typename T>
M2MKD_INLINE compute_t<T> backward_row(const BackwardRow<T>& row, compute_t<T> w, int64_t n) {
  if (row.weighted != nullptr) {
    return row.bias_grad != nullptr ? backward_row<Act, has_bias, true, true>(row, w, n)
                                    : backward_row<Act, has_bias, true, false>(row, w, n);
  }
  return row.bias_grad != nullptr ? backward_row<Act, has_bias, false, true>(row, w, n)
                                  : backward_row<Act, has_bias, false, false>(row, w, n);
}

}  // namespace

// Clones cannot be templates, so one named function per activation and type.
#define M2MKD_DEFINE_ACTIVATION(T, Act, name)                                                     \
  M2MKD_CLONES void activate_##name(const T* z, const T* bias, T* out, int64_t rows, int64_t n) { \
    activate_rows<Act>(z, bias, out, rows, n);                                                    \
  }                                                                                               \
  M2MKD_CLONES compute_t<T> backward_##name(const BackwardRow<T>& row, compute_t<T> w,            \
                                            int64_t n) {                                          \
    return row.bias != nullptr ? backward_row<Act, true>(row, w, n)                               \
                               : backward_row<Act, false>(row, w, n);                             \
  }

#define M2MKD_DEFINE_ROWS(T)                                                                   \
  M2MKD_DEFINE_ACTIVATION(T, Gelu, gelu)                                                       \
  M2MKD_DEFINE_ACTIVATION(T, GeluTanh, gelu_tanh)                                              \
  M2MKD_DEFINE_ACTIVATION(T, Relu, relu)                                                       \
  M2MKD_DEFINE_ACTIVATION(T, Silu, silu)                                                       \
  void activate(Activation act, const T* z, const T* bias, T* out, int64_t rows, int64_t n) {  \
    switch (act) {                                                                             \
      case Activation::gelu:                                                                   \
        return activate_gelu(z, bias, out, rows, n);                                           \
      case Activation::gelu_tanh:                                                              \
        return activate_gelu_tanh(z, bias, out, rows, n);                                      \
      case Activation::relu:                                                                   \
        return activate_relu(z, bias, out, rows, n);                                           \
      case Activation::silu:                                                                   \
        return activate_silu(z, bias, out, rows, n);                                           \
    }                                                                                          \
  }                                                                                            \
  compute_t<T> activate_backward(Activation act, const BackwardRow<T>& row, compute_t<T> w,    \
                                 int64_t n) {                                                  \
    switch (act) {                                                                             \
      case Activation::gelu:                                                                   \
        return backward_gelu(row, w, n);                                                       \
      case Activation::gelu_tanh:                                                              \
        return backward_gelu_tanh(row, w, n);                                                  \
      case Activation::relu:                                                                   \
        return backward_relu(row, w, n);                                                       \
      default:                                                                                 \
        return backward_silu(row, w, n);                                                       \
    }                                                                                          \
  }                                                                                            \
  M2MKD_CLONES void add_scaled(compute_t<T>* out, const T* row, const T* bias, compute_t<T> s, \
                               int64_t n) {                                                    \
    using A = compute_t<T>;                                                                    \
    if (bias != nullptr) {                                                                     \
      _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) {                                    \
        out[i] += s * (static_cast<A>(row[i]) + static_cast<A>(bias[i]));                      \
      }                                                                                        \
    } else {                                                                                   \
      _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) {                                    \
        out[i] += s * static_cast<A>(row[i]);                                                  \
      }                                                                                        \
    }                                                                                          \
  }                                                                                            \
  M2MKD_CLONES void scale(T* out, const T* row, compute_t<T> s, int64_t n) {                   \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) {                                      \
      out[i] = static_cast<T>(s * static_cast<compute_t<T>>(row[i]));                          \
    }                                                                                          \
  }                                                                                            \
  M2MKD_CLONES compute_t<T> dot(const T* a, const T* b, int64_t n) {                           \
    compute_t<T> sum = 0;                                                                      \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) {                   \
      sum += static_cast<compute_t<T>>(a[i]) * static_cast<compute_t<T>>(b[i]);                \
    }                                                                                          \
    return sum;                                                                                \
  }                                                                                            \
  M2MKD_CLONES void store(T* out, const compute_t<T>* sums, int64_t n) {                       \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) { out[i] = static_cast<T>(sums[i]); }  \
  }

M2MKD_DEFINE_ROWS(float)
M2MKD_DEFINE_ROWS(double)
M2MKD_DEFINE_ROWS(c10::Half)
M2MKD_DEFINE_ROWS(c10::BFloat16)

}  // namespace m2mkd::cpu
