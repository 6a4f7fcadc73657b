// Every loop is written so that g++ keeps its sums in vector registers at each level of
// M2MKD_CLONES: widths are whole packs, sums over a row are a pack of partial sums, and buffers of
// scores are filled up to whole packs.

#include "circuit_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "activations.h"
#include "simd.h"

namespace m2mkd::cpu {

namespace {

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// Edges whose gradients the sender pass collects at a time.
constexpr int64_t kChunk = 64;
// How many edges ahead the scattered gradients of edges are asked for.
constexpr int64_t kAhead = 64;

M2MKD_INLINE float exponential(float x) { return exp_negative(x); }
M2MKD_INLINE double exponential(double x) { return std::exp(x); }

template <typename A>
M2MKD_INLINE int64_t whole_packs(int64_t count) {
  return (count + kPack<A> - 1) / kPack<A> * kPack<A>;
}

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

// Sums over one pack.
M2MKD_INLINE Quad sum_to_quad(const float* pack) {
  const Quad* quads = reinterpret_cast<const Quad*>(pack);
  return (quads[0] + quads[2]) + (quads[1] + quads[3]);
}

M2MKD_INLINE Quad sum_pairs(Quad a, Quad b) {
  return Quad{a[0], a[2], b[0], b[2]} + Quad{a[1], a[3], b[1], b[3]};
}

// out[j] += scale times the sum over pack sums[j].
M2MKD_INLINE void add_sums(const float (&sums)[4][kPack<float>], float scale, float* out) {
  const Quad low = sum_pairs(sum_to_quad(sums[0]), sum_to_quad(sums[1]));
  const Quad high = sum_pairs(sum_to_quad(sums[2]), sum_to_quad(sums[3]));
  *reinterpret_cast<Quad*>(out) += scale * sum_pairs(low, high);
}

M2MKD_INLINE void add_sums(const double (&sums)[4][kPack<double>], double scale, double* out) {
  for (int64_t j = 0; j < 4; ++j) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t l = 0; l < kPack<double>; ++l) {
      sum += sums[j][l];
    }
    out[j] += scale * sum;
  }
}

template <typename A>
M2MKD_INLINE void multiply_add(const A* a, const A* b, A (&sums)[kPack<A>]) {
#pragma omp simd
  for (int64_t l = 0; l < kPack<A>; ++l) {
    sums[l] += a[l] * b[l];
  }
}

// out[j] += scale x . row index[j], four rows at a time. Up to three further entries of out take
// the first row of the last four again.
template <typename A>
M2MKD_INLINE void add_dots(const A* x, const A* matrix, const int32_t* index, int64_t count,
                           int64_t packs, A scale, A* out) {
  const int64_t width = packs * kPack<A>;
  for (int64_t j = 0; j < count; j += 4) {
    const A* row0 = matrix + index[j] * width;
    const A* row1 = j + 1 < count ? matrix + index[j + 1] * width : row0;
    const A* row2 = j + 2 < count ? matrix + index[j + 2] * width : row0;
    const A* row3 = j + 3 < count ? matrix + index[j + 3] * width : row0;
    A sums[4][kPack<A>] = {};
    for (int64_t i = 0; i < width; i += kPack<A>) {
      multiply_add(x + i, row0 + i, sums[0]);
      multiply_add(x + i, row1 + i, sums[1]);
      multiply_add(x + i, row2 + i, sums[2]);
      multiply_add(x + i, row3 + i, sums[3]);
    }
    add_sums(sums, scale, out + j);
  }
}

// out += the sum of weights[j] times row index[j].
template <typename A>
M2MKD_INLINE void add_rows(const A* weights, const A* matrix, const int32_t* index, int64_t count,
                           int64_t packs, A* out) {
  const int64_t width = packs * kPack<A>;
  int64_t j = 0;
  const auto row = [&](int64_t n) { return matrix + index[j + n] * width; };
  for (; j + 8 <= count; j += 8) {
    const A *r0 = row(0), *r1 = row(1), *r2 = row(2), *r3 = row(3);
    const A *r4 = row(4), *r5 = row(5), *r6 = row(6), *r7 = row(7);
    const A* w = weights + j;
    const A w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3], w4 = w[4], w5 = w[5], w6 = w[6], w7 = w[7];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A low = w0 * r0[i] + w1 * r1[i] + w2 * r2[i] + w3 * r3[i];
      const A high = w4 * r4[i] + w5 * r5[i] + w6 * r6[i] + w7 * r7[i];
      out[i] += low + high;
    }
  }
  for (; j + 2 <= count; j += 2) {
    const A *r0 = row(0), *r1 = row(1);
    const A w0 = weights[j], w1 = weights[j + 1];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      out[i] += w0 * r0[i] + w1 * r1[i];
    }
  }
  if (j < count) {
    const A* r0 = row(0);
    const A w0 = weights[j];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      out[i] += w0 * r0[i];
    }
  }
}

template <typename A>
M2MKD_INLINE void fill(A* row, A value, int64_t packs) {
  const int64_t width = packs * kPack<A>;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    row[i] = value;
  }
}

template <typename A>
M2MKD_INLINE void multiply(A* row, A factor, int64_t packs) {
  const int64_t width = packs * kPack<A>;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    row[i] *= factor;
  }
}

// The biases of a receiver's edges (0 where bias is null), filled up with -inf.
template <typename A>
M2MKD_INLINE void start_scores(const A* bias, int64_t first, int64_t count, A* scores) {
  if (bias != nullptr) {
    std::copy(bias + first, bias + first + count, scores);
  } else {
    std::fill(scores, scores + count, A(0));
  }
  for (int64_t l = 0; l < kPack<A>; ++l) {
    scores[count + l] = -kInfinity<A>;
  }
}

// Receivers whose scores lie one after the other in a buffer. Each step is done for all of them
// before the next: the latency of one receiver's softmax then hides behind the others.
struct Block {
  int64_t begin;
  int64_t end;
};

// The longest run of receivers from `begin` with few edges together, at least one receiver.
M2MKD_INLINE Block next_block(const int32_t* row_ptr, int64_t begin, int64_t end) {
  int64_t last = begin + 1;
  while (last < end && last - begin < kBlockRows &&
         row_ptr[last + 1] - row_ptr[begin] <= kBlockEdges) {
    ++last;
  }
  return {begin, last};
}

// Calls f(receiver, place of its scores in the block's buffer, its number of edges).
template <typename A, typename F>
M2MKD_INLINE void for_rows(const Block& block, const int32_t* row_ptr, const F& f) {
  int64_t place = 0;
  for (int64_t u = block.begin; u < block.end; ++u) {
    const int64_t count = row_ptr[u + 1] - row_ptr[u];
    f(u, place, count);
    place += whole_packs<A>(count);
  }
}

template <typename A>
M2MKD_INLINE void attend_block(const ForwardHead<A>& h, const Block& block) {
  const int64_t width = h.packs * kPack<A>;
  for_rows<A>(block, h.row_ptr, [&](int64_t u, int64_t place, int64_t count) M2MKD_INLINE_LAMBDA {
    const int64_t first = h.row_ptr[u];
    start_scores(h.bias, first, count, h.scores + place);
    add_dots(h.q + (u - h.begin) * width, h.k, h.sender + first, count, h.packs, h.scale,
             h.scores + place);
  });
  A inverse[kBlockRows];
  for_rows<A>(block, h.row_ptr, [&](int64_t u, int64_t place, int64_t count) M2MKD_INLINE_LAMBDA {
    A* scores = h.scores + place;
    const int64_t padded = whole_packs<A>(count);
    A largest = -kInfinity<A>;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < padded; ++j) {
      largest = scores[j] > largest ? scores[j] : largest;
    }
    const A shift = largest == -kInfinity<A> ? A(0) : largest;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < padded; ++j) {
      scores[j] = exponential(scores[j] - shift);
      sum += scores[j];
    }
    inverse[u - block.begin] = sum == A(0) ? A(0) : A(1) / sum;
    h.lse[u - h.begin] = sum == A(0) ? -kInfinity<A> : std::log(sum) + shift;
  });
  for_rows<A>(block, h.row_ptr, [&](int64_t u, int64_t place, int64_t count) M2MKD_INLINE_LAMBDA {
    A* out = h.out + (u - h.begin) * width;
    fill(out, A(0), h.packs);
    add_rows(h.scores + place, h.v, h.sender + h.row_ptr[u], count, h.packs, out);
    multiply(out, inverse[u - block.begin], h.packs);
  });
}

// With p the weights and g the gradient of out: ds = p (g.v - sum p g.v), dq = scale sum ds k. Keys
// are read last before the sum, so that most rows still lie in the first-level cache.
template <typename A>
M2MKD_INLINE void backward_block(const ReceiverGrad<A>& h, const Block& block) {
  const int64_t width = h.packs * kPack<A>;
  for_rows<A>(block, h.row_ptr, [&](int64_t u, int64_t place, int64_t count) M2MKD_INLINE_LAMBDA {
    const int64_t first = h.row_ptr[u], row = (u - h.begin) * width;
    fill(h.slopes + place, A(0), whole_packs<A>(count) / kPack<A>);
    add_dots(h.grad + row, h.v, h.sender + first, count, h.packs, A(1), h.slopes + place);
    start_scores(h.bias, first, count, h.weights + place);
    add_dots(h.q + row, h.k, h.sender + first, count, h.packs, h.scale, h.weights + place);
  });
  for_rows<A>(block, h.row_ptr, [&](int64_t u, int64_t place, int64_t count) M2MKD_INLINE_LAMBDA {
    A* weights = h.weights + place;
    A* slopes = h.slopes + place;
    const int64_t padded = whole_packs<A>(count);
    // Where all weights are 0, scores are -inf, and any other number in lse's place keeps them so.
    const A lse = h.lse[u - h.begin] == -kInfinity<A> ? A(0) : h.lse[u - h.begin];
    A mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < padded; ++j) {
      weights[j] = exponential(weights[j] - lse);
      mean += weights[j] * slopes[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < padded; ++j) {
      slopes[j] = weights[j] * (slopes[j] - mean);
    }
    EdgeGrad<A>* edges = h.edges + h.row_ptr[u];
    for (int64_t j = 0; j < count; ++j) {
      edges[j] = {weights[j], slopes[j]};
    }
  });
  for_rows<A>(block, h.row_ptr, [&](int64_t u, int64_t place, int64_t count) M2MKD_INLINE_LAMBDA {
    A* q_grad = h.q_grad + (u - h.begin) * width;
    fill(q_grad, A(0), h.packs);
    add_rows(h.slopes + place, h.k, h.sender + h.row_ptr[u], count, h.packs, q_grad);
    multiply(q_grad, h.scale, h.packs);
  });
}

// dv = sum p g, dk = scale sum ds q, over the receivers of a sender.
template <typename A>
M2MKD_INLINE void backward_column(const SenderGrad<A>& h, int64_t v) {
  const int64_t row = (v - h.begin) * h.packs * kPack<A>;
  const int64_t last = h.col_ptr[v + 1], all = h.col_ptr[h.end];
  fill(h.k_grad + row, A(0), h.packs);
  fill(h.v_grad + row, A(0), h.packs);
  A weights[kChunk], slopes[kChunk];
  for (int64_t first = h.col_ptr[v]; first < last; first += kChunk) {
    const int64_t count = std::min(kChunk, last - first);
    for (int64_t j = 0; j < count; ++j) {
      const EdgeGrad<A> edge = h.edges[h.edge_id[first + j]];
      weights[j] = edge.weight;
      slopes[j] = edge.score;
      __builtin_prefetch(h.edges + h.edge_id[std::min(first + j + kAhead, all - 1)]);
    }
    add_rows(weights, h.grad, h.receiver + first, count, h.packs, h.v_grad + row);
    add_rows(slopes, h.q, h.receiver + first, count, h.packs, h.k_grad + row);
  }
  multiply(h.k_grad + row, h.scale, h.packs);
}

template <typename A>
M2MKD_INLINE void attend_rows(const ForwardHead<A>& head) {
  for (Block block{head.begin, head.begin}; block.end < head.end;) {
    block = next_block(head.row_ptr, block.end, head.end);
    attend_block(head, block);
  }
}

template <typename A>
M2MKD_INLINE void backward_rows(const ReceiverGrad<A>& head) {
  for (Block block{head.begin, head.begin}; block.end < head.end;) {
    block = next_block(head.row_ptr, block.end, head.end);
    backward_block(head, block);
  }
}

template <typename A>
M2MKD_INLINE void backward_columns(const SenderGrad<A>& head) {
  for (int64_t v = head.begin; v < head.end; ++v) {
    backward_column(head, v);
  }
}

template <typename T>
M2MKD_INLINE void widen_rows(const T* rows, compute_t<T>* wide, int64_t n, int64_t width,
                             int64_t stride) {
  for (int64_t r = 0; r < n; ++r, rows += width, wide += stride) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      wide[i] = static_cast<compute_t<T>>(rows[i]);
    }
    std::fill(wide + width, wide + stride, compute_t<T>(0));
  }
}

template <typename T>
M2MKD_INLINE void narrow_rows(const compute_t<T>* wide, T* rows, int64_t n, int64_t width,
                              int64_t stride) {
  for (int64_t r = 0; r < n; ++r, rows += width, wide += stride) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      rows[i] = static_cast<T>(wide[i]);
    }
  }
}

}  // namespace

// Clones cannot be templates.
#define M2MKD_DEFINE_CIRCUIT_ROWS(A)                                                      \
  M2MKD_CLONES void attend(const ForwardHead<A>& head) { attend_rows(head); }             \
  M2MKD_CLONES void attend_backward(const ReceiverGrad<A>& head) { backward_rows(head); } \
  M2MKD_CLONES void attend_backward(const SenderGrad<A>& head) { backward_columns(head); }

M2MKD_DEFINE_CIRCUIT_ROWS(float)
M2MKD_DEFINE_CIRCUIT_ROWS(double)

#define M2MKD_DEFINE_ROW_COPIES(T)                                                      \
  M2MKD_CLONES void widen(const T* rows, compute_t<T>* wide, int64_t n, int64_t width,  \
                          int64_t stride) {                                             \
    widen_rows(rows, wide, n, width, stride);                                           \
  }                                                                                     \
  M2MKD_CLONES void narrow(const compute_t<T>* wide, T* rows, int64_t n, int64_t width, \
                           int64_t stride) {                                            \
    narrow_rows(wide, rows, n, width, stride);                                          \
  }

M2MKD_DEFINE_ROW_COPIES(float)
M2MKD_DEFINE_ROW_COPIES(double)
M2MKD_DEFINE_ROW_COPIES(c10::Half)
M2MKD_DEFINE_ROW_COPIES(c10::BFloat16)

}  // namespace m2mkd::cpu
