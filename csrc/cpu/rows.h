// Vectorised work on rows: the inner loops of every CPU kernel. T is float, double, c10::Half or
// c10::BFloat16; arithmetic is done in A = compute_t<T>. One overload per T, defined in rows.cpp.

#pragma once

#include <cstdint>
#include <string>

#include "../checks.h"

namespace m2mkd::cpu {

enum class Activation { gelu, gelu_tanh, relu, silu };

// What the backward of activation and combine weight does to one row of width n:
//   weighted = w act(z + bias), grad = w grad act'(z + bias), bias_grad += grad,
// and the returned sum of grad act(z + bias). weighted and bias_grad may be null.
template <typename T>
struct BackwardRow {
  const T* z;
  const T* bias;
  T* grad;
  T* weighted;
  compute_t<T>* bias_grad;
};

#define M2MKD_DECLARE_ROWS(T)                                                                     \
  /* out = act(z + bias), row by row; bias may be null. */                                        \
  void activate(Activation act, const T* z, const T* bias, T* out, int64_t rows, int64_t n);      \
  compute_t<T> activate_backward(Activation act, const BackwardRow<T>& row, compute_t<T> w,       \
                                 int64_t n);                                                      \
  /* out += scale * (row + bias); bias may be null. */                                            \
  void add_scaled(compute_t<T>* out, const T* row, const T* bias, compute_t<T> scale, int64_t n); \
  /* out = scale * row. */                                                                        \
  void scale(T* out, const T* row, compute_t<T> scale, int64_t n);                                \
  compute_t<T> dot(const T* a, const T* b, int64_t n);                                            \
  /* out = sums, rounded to T. */                                                                 \
  void store(T* out, const compute_t<T>* sums, int64_t n);

M2MKD_DECLARE_ROWS(float)
M2MKD_DECLARE_ROWS(double)
M2MKD_DECLARE_ROWS(c10::Half)
M2MKD_DECLARE_ROWS(c10::BFloat16)
#undef M2MKD_DECLARE_ROWS

}  // namespace m2mkd::cpu
