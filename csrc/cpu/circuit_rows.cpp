// Rows of keys, values, queries and gradients are read in groups of kGroup, so that every loop over
// the width has kGroup independent sums and one load of the shared row.

#include "circuit_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "activations.h"
#include "simd.h"

namespace m2mkd::cpu {

namespace {

constexpr int64_t kGroup = 8;
// Edges between whose two uses (score, then weighted sum) rows should stay in the first-level
// cache.
constexpr int64_t kChunk = 32;

// Pads the last group: a row of zeros, so that a weight of 0 times it is 0.
template <typename A>
constexpr A kZeroRow[256] = {};

// Rows of a matrix picked by index, padded to kGroup with zeros.
template <typename A>
struct Group {
  const A* rows[kGroup];

  M2MKD_INLINE Group(const A* matrix, const int32_t* index, int64_t count, int64_t width) {
    for (int64_t j = 0; j < kGroup; ++j) {
      rows[j] = j < count ? matrix + index[j] * width : kZeroRow<A>;
    }
  }

  // dots[j] = sum of x times row j.
  M2MKD_INLINE void dot(const A* x, int64_t width, A* dots) const {
    const A *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const A *r4 = rows[4], *r5 = rows[5], *r6 = rows[6], *r7 = rows[7];
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, s6, s7)
    for (int64_t i = 0; i < width; ++i) {
      const A value = x[i];
      s0 += value * r0[i];
      s1 += value * r1[i];
      s2 += value * r2[i];
      s3 += value * r3[i];
      s4 += value * r4[i];
      s5 += value * r5[i];
      s6 += value * r6[i];
      s7 += value * r7[i];
    }
    dots[0] = s0, dots[1] = s1, dots[2] = s2, dots[3] = s3;
    dots[4] = s4, dots[5] = s5, dots[6] = s6, dots[7] = s7;
  }

  // out += sum of weights[j] times row j.
  M2MKD_INLINE void add_to(A* out, const A* weights, int64_t width) const {
    const A *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const A *r4 = rows[4], *r5 = rows[5], *r6 = rows[6], *r7 = rows[7];
    const A w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
    const A w4 = weights[4], w5 = weights[5], w6 = weights[6], w7 = weights[7];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A low = w0 * r0[i] + w1 * r1[i] + w2 * r2[i] + w3 * r3[i];
      const A high = w4 * r4[i] + w5 * r5[i] + w6 * r6[i] + w7 * r7[i];
      out[i] += low + high;
    }
  }
};

M2MKD_INLINE double exp_negative(double x) { return std::exp(x); }

// Scores of edges [first, first + count) from dots, in place.
template <typename A>
M2MKD_INLINE void add_bias(A* scores, const A* bias, int64_t count, A scale) {
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      scores[j] = scale * scores[j] + bias[j];
    }
  } else {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      scores[j] *= scale;
    }
  }
}

template <typename A>
M2MKD_INLINE void attend_row(const ForwardHead<A>& h, int64_t u) {
  const int64_t first = h.row_ptr[u], count = h.row_ptr[u + 1] - first, width = h.width;
  const int32_t* sender = h.sender + first;
  const A* q = h.q + (u - h.begin) * width;
  A* out = h.out + (u - h.begin) * width;
  A* scores = h.scores;
  for (int64_t j = 0; j < count; j += kGroup) {
    Group<A>(h.k, sender + j, count - j, width).dot(q, width, scores + j);
  }
  add_bias(scores, h.bias == nullptr ? nullptr : h.bias + first, count, h.scale);
  A largest = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < count; ++j) {
    largest = scores[j] > largest ? scores[j] : largest;
  }
  const A shift = largest == -std::numeric_limits<A>::infinity() ? A(0) : largest;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    scores[j] = exp_negative(scores[j] - shift);
    sum += scores[j];
  }
  std::fill(scores + count, scores + (count + kGroup - 1) / kGroup * kGroup, A(0));
  std::fill(out, out + width, A(0));
  for (int64_t j = 0; j < count; j += kGroup) {
    Group<A>(h.v, sender + j, count - j, width).add_to(out, scores + j, width);
  }
  const A inverse = sum == A(0) ? A(0) : A(1) / sum;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    out[i] *= inverse;
  }
  h.lse[u - h.begin] = sum == A(0) ? -std::numeric_limits<A>::infinity() : std::log(sum) + shift;
}

// With p the weights and g the gradient of out: ds = p (g.v - g.out), dq = scale sum ds k.
template <typename A>
M2MKD_INLINE void backward_row(const ReceiverGrad<A>& h, int64_t u) {
  const int64_t width = h.width, row = u - h.begin;
  const A* q = h.q + row * width;
  const A* grad = h.grad + row * width;
  const A* out = h.out + row * width;
  A* q_grad = h.q_grad + row * width;
  std::fill(q_grad, q_grad + width, A(0));
  // No edge, or biases of -inf only: every weight is 0.
  const bool dead = h.lse[row] == -std::numeric_limits<A>::infinity();
  const A lse = dead ? A(0) : h.lse[row];
  A mean = 0;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < width; ++i) {
    mean += grad[i] * out[i];
  }
  A weights[kChunk], slopes[kChunk];
  for (int64_t first = h.row_ptr[u]; first < h.row_ptr[u + 1]; first += kChunk) {
    const int64_t count = std::min<int64_t>(kChunk, h.row_ptr[u + 1] - first);
    const int32_t* sender = h.sender + first;
    for (int64_t j = 0; j < count; j += kGroup) {
      Group<A>(h.k, sender + j, count - j, width).dot(q, width, weights + j);
      Group<A>(h.v, sender + j, count - j, width).dot(grad, width, slopes + j);
    }
    add_bias(weights, h.bias == nullptr ? nullptr : h.bias + first, count, h.scale);
    std::fill(weights + count, weights + kChunk, -std::numeric_limits<A>::infinity());
#pragma omp simd
    for (int64_t j = 0; j < kChunk; ++j) {
      weights[j] = exp_negative(weights[j] - lse);
      slopes[j] = weights[j] * (slopes[j] - mean);
    }
    for (int64_t j = 0; j < count; ++j) {
      h.edges[first + j] = {weights[j], slopes[j]};
    }
    for (int64_t j = 0; j < count; j += kGroup) {
      Group<A>(h.k, sender + j, count - j, width).add_to(q_grad, slopes + j, width);
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    q_grad[i] *= h.scale;
  }
}

// dv = sum p g, dk = scale sum ds q, over the receivers of a sender.
template <typename A>
M2MKD_INLINE void backward_column(const SenderGrad<A>& h, int64_t v) {
  const int64_t width = h.width;
  A* k_grad = h.k_grad + (v - h.begin) * width;
  A* v_grad = h.v_grad + (v - h.begin) * width;
  std::fill(k_grad, k_grad + width, A(0));
  std::fill(v_grad, v_grad + width, A(0));
  for (int64_t t = h.col_ptr[v]; t < h.col_ptr[v + 1]; t += kGroup) {
    const int64_t count = h.col_ptr[v + 1] - t;
    A weights[kGroup], slopes[kGroup];
    for (int64_t j = 0; j < kGroup; ++j) {
      const EdgeGrad<A> edge = j < count ? h.edges[h.edge_id[t + j]] : EdgeGrad<A>{0, 0};
      weights[j] = edge.weight;
      slopes[j] = edge.score;
    }
    Group<A>(h.grad, h.receiver + t, count, width).add_to(v_grad, weights, width);
    Group<A>(h.q, h.receiver + t, count, width).add_to(k_grad, slopes, width);
  }
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    k_grad[i] *= h.scale;
  }
}

}  // namespace

// Clones cannot be templates.
#define M2MKD_DEFINE_CIRCUIT_ROWS(A)                                         \
  M2MKD_CLONES void attend(const ForwardHead<A>& head) {                     \
    for (int64_t u = head.begin; u < head.end; ++u) {                        \
      attend_row(head, u);                                                   \
    }                                                                        \
  }                                                                          \
  M2MKD_CLONES void attend_backward_receivers(const ReceiverGrad<A>& head) { \
    for (int64_t u = head.begin; u < head.end; ++u) {                        \
      backward_row(head, u);                                                 \
    }                                                                        \
  }                                                                          \
  M2MKD_CLONES void attend_backward_senders(const SenderGrad<A>& head) {     \
    for (int64_t v = head.begin; v < head.end; ++v) {                        \
      backward_column(head, v);                                              \
    }                                                                        \
  }

M2MKD_DEFINE_CIRCUIT_ROWS(float)
M2MKD_DEFINE_CIRCUIT_ROWS(double)

}  // namespace m2mkd::cpu
