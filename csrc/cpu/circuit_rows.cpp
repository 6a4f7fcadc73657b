// Every loop is written so that g++ keeps its sums in vector registers at each level of
// M2MKD_CLONES: widths are whole packs, sums over a row are a pack of partial sums, and buffers of
// scores are filled up to whole packs.

#include "circuit_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "activations.h"
#include "simd.h"

namespace m2mkd::cpu {

namespace {

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// How many edges ahead the scattered gradients of edges are asked for.
constexpr int64_t kAhead = 64;

// How many senders ahead the rows of their gradients are asked for.
constexpr int64_t kRowsAhead = 3;

M2MKD_INLINE float exponential(float x) { return exp_negative(x); }
M2MKD_INLINE double exponential(double x) { return std::exp(x); }

template <typename A>
M2MKD_INLINE int64_t whole_packs(int64_t count) {
  return (count + kPack<A> - 1) / kPack<A> * kPack<A>;
}

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Oct __attribute__((vector_size(32), aligned(4), may_alias));

// Sums over neighbours, within each half of a and b.
M2MKD_INLINE Oct sum_pairs(Oct a, Oct b) {
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

M2MKD_INLINE Oct sum_halves(const float* pack) {
  const Oct* octs = reinterpret_cast<const Oct*>(pack);
  return octs[0] + octs[1];
}

// out[j] += scale times the sum over pack sums[j].
M2MKD_INLINE void add_sums(const float (&sums)[4][kPack<float>], float scale, float* out) {
  const Oct low = sum_pairs(sum_halves(sums[0]), sum_halves(sums[1]));
  const Oct high = sum_pairs(sum_halves(sums[2]), sum_halves(sums[3]));
  const Oct all = sum_pairs(low, high);
  *reinterpret_cast<Quad*>(out) += scale * (__builtin_shufflevector(all, all, 0, 1, 2, 3) +
                                            __builtin_shufflevector(all, all, 4, 5, 6, 7));
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

// out[j] += scale x . row index[j] for eight j. One sum a row, of half a pack, leaves registers for
// eight rows, which share the loads of x and the steps that add a sum up.
M2MKD_INLINE void add_eight_dots(const float* x, const float* matrix, const int32_t* index,
                                 int64_t width, float scale, float* out) {
  const float* rows[8];
  Oct sums[8] = {};
  for (int64_t j = 0; j < 8; ++j) {
    rows[j] = matrix + index[j] * width;
  }
  for (int64_t i = 0; i < width; i += 8) {
    const Oct part = *reinterpret_cast<const Oct*>(x + i);
    for (int64_t j = 0; j < 8; ++j) {
      sums[j] += part * *reinterpret_cast<const Oct*>(rows[j] + i);
    }
  }
  const Oct first = sum_pairs(sum_pairs(sums[0], sums[1]), sum_pairs(sums[2], sums[3]));
  const Oct last = sum_pairs(sum_pairs(sums[4], sums[5]), sum_pairs(sums[6], sums[7]));
  *reinterpret_cast<Oct*>(out) +=
      scale * (__builtin_shufflevector(first, last, 0, 1, 2, 3, 8, 9, 10, 11) +
               __builtin_shufflevector(first, last, 4, 5, 6, 7, 12, 13, 14, 15));
}

// out[j] += scale x . row index[j]: floats eight rows at a time, then four. Up to three further
// entries of out take the first row of the last four again.
template <typename A>
M2MKD_INLINE void add_dots(const A* x, const A* matrix, const int32_t* index, int64_t count,
                           int64_t packs, A scale, A* out) {
  const int64_t width = packs * kPack<A>;
  int64_t j = 0;
  if constexpr (std::is_same_v<A, float>) {
    for (; j + 8 <= count; j += 8) {
      add_eight_dots(x, matrix, index + j, width, scale, out + j);
    }
  }
  for (; j < count; j += 4) {
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

// out becomes, or grows by, the sum of weights[j] times row index[j] for the first Count j.
template <int64_t Count, bool Grows, typename A>
M2MKD_INLINE void sum_rows(const A* weights, const A* matrix, const int32_t* index, int64_t width,
                           A* out) {
  const auto row = [&](int64_t j) { return matrix + (j < Count ? index[j] * width : 0); };
  const auto weight = [&](int64_t j) { return j < Count ? weights[j] : A(0); };
  const A *r0 = row(0), *r1 = row(1), *r2 = row(2), *r3 = row(3);
  const A *r4 = row(4), *r5 = row(5), *r6 = row(6), *r7 = row(7);
  const A w0 = weight(0), w1 = weight(1), w2 = weight(2), w3 = weight(3);
  const A w4 = weight(4), w5 = weight(5), w6 = weight(6), w7 = weight(7);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    A low = Grows ? out[i] : A(0), high = 0;
    if constexpr (Count > 0) low += w0 * r0[i];
    if constexpr (Count > 1) high += w1 * r1[i];
    if constexpr (Count > 2) low += w2 * r2[i];
    if constexpr (Count > 3) high += w3 * r3[i];
    if constexpr (Count > 4) low += w4 * r4[i];
    if constexpr (Count > 5) high += w5 * r5[i];
    if constexpr (Count > 6) low += w6 * r6[i];
    if constexpr (Count > 7) high += w7 * r7[i];
    out[i] = low + high;
  }
}

// out becomes the sum of weights[j] times row index[j]. The odd rows come first, in one jump: short
// loops with a length of their own would cost more than the rows.
template <typename A>
M2MKD_INLINE void sum_rows(const A* weights, const A* matrix, const int32_t* index, int64_t count,
                           int64_t packs, A* out) {
  const int64_t width = packs * kPack<A>, odd = count % 8;
  switch (odd) {
    case 0:
      sum_rows<0, false>(weights, matrix, index, width, out);
      break;
    case 1:
      sum_rows<1, false>(weights, matrix, index, width, out);
      break;
    case 2:
      sum_rows<2, false>(weights, matrix, index, width, out);
      break;
    case 3:
      sum_rows<3, false>(weights, matrix, index, width, out);
      break;
    case 4:
      sum_rows<4, false>(weights, matrix, index, width, out);
      break;
    case 5:
      sum_rows<5, false>(weights, matrix, index, width, out);
      break;
    case 6:
      sum_rows<6, false>(weights, matrix, index, width, out);
      break;
    default:
      sum_rows<7, false>(weights, matrix, index, width, out);
      break;
  }
  for (int64_t j = odd; j < count; j += 8) {
    sum_rows<8, true>(weights + j, matrix, index + j, width, out);
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

// to becomes, or grows by, `count` numbers.
template <typename A>
M2MKD_INLINE void put(const A* from, int64_t count, bool grows, A* to) {
  if (!grows) {
    std::copy(from, from + count, to);
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    to[j] += from[j];
  }
}

// Asks for packs that will be read (from the second-level cache) or written. No harm is done where
// they lie behind the end of an array.
template <typename A>
M2MKD_INLINE void fetch(const A* from, int64_t packs) {
  for (int64_t i = 0; i < packs; ++i) {
    __builtin_prefetch(from + i * kPack<A>, 0, 2);
  }
}

template <typename A>
M2MKD_INLINE void fetch_target(const A* to, int64_t packs) {
  for (int64_t i = 0; i < packs; ++i) {
    __builtin_prefetch(to + i * kPack<A>, 1, 3);
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
    const A inverse = sum == A(0) ? A(0) : A(1) / sum;
#pragma omp simd
    for (int64_t j = 0; j < padded; ++j) {
      scores[j] *= inverse;
    }
    h.lse[u - h.begin] = sum == A(0) ? -kInfinity<A> : std::log(sum) + shift;
  });
  for_rows<A>(block, h.row_ptr, [&](int64_t u, int64_t place, int64_t count) M2MKD_INLINE_LAMBDA {
    A* out = h.out + (u - h.begin) * width;
    sum_rows(h.scores + place, h.v, h.sender + h.row_ptr[u], count, h.packs, out);
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
    if (h.bias_grad != nullptr) {
      put(slopes, count, h.bias_grad_grows, h.bias_grad + h.row_ptr[u]);
    }
#pragma omp simd
    for (int64_t j = 0; j < padded; ++j) {
      slopes[j] *= h.scale;
    }
  });
  for_rows<A>(block, h.row_ptr, [&](int64_t u, int64_t place, int64_t count) M2MKD_INLINE_LAMBDA {
    sum_rows(h.slopes + place, h.k, h.sender + h.row_ptr[u], count, h.packs,
             h.q_grad + (u - h.begin) * width);
  });
}

// dv = sum p g, dk = scale sum ds q, over the receivers of a sender.
template <typename A>
M2MKD_INLINE void backward_column(const SenderGrad<A>& h, int64_t v) {
  const int64_t width = h.packs * kPack<A>, row = (v - h.begin) * width;
  const int64_t first = h.col_ptr[v], count = h.col_ptr[v + 1] - first;
  const int64_t ahead = std::min(first + kAhead, h.col_ptr[h.end] - count);
  fetch_target(h.k_grad + row + kRowsAhead * width, h.packs);
  fetch_target(h.v_grad + row + kRowsAhead * width, h.packs);
  if (h.next_k != nullptr) {
    fetch(h.next_k + v * width, h.packs);
  }
  if (h.next_v != nullptr) {
    fetch(h.next_v + v * width, h.packs);
  }
  for (int64_t j = 0; j < count; ++j) {
    const EdgeGrad<A> edge = h.edges[h.edge_id[first + j]];
    h.weights[j] = edge.weight;
    h.slopes[j] = h.scale * edge.score;
    __builtin_prefetch(h.edges + h.edge_id[ahead + j]);
  }
  sum_rows(h.weights, h.grad, h.receiver + first, count, h.packs, h.v_grad + row);
  sum_rows(h.slopes, h.q, h.receiver + first, count, h.packs, h.k_grad + row);
}

// Calls f(block) for all blocks of a head's receivers.
template <typename Head, typename F>
M2MKD_INLINE void for_blocks(const Head& h, const F& f) {
  for (Block block{h.begin, h.begin}; block.end < h.end;) {
    block = next_block(h.row_ptr, block.end, h.end);
    f(block);
  }
}

// Where receiver u's row lies in what starts at the first receiver of a head's share.
template <typename Head, typename A>
M2MKD_INLINE A* rows_of(const Head& h, A* first, int64_t u) {
  return first + (u - h.begin) * h.packs * kPack<A>;
}

// Rows that are read once, one after the other, are asked for a block ahead, and those to be
// written as their block begins. The next head's keys and values lie behind those of this one and
// are asked for meanwhile: as large a part of them as the block is of this head's receivers.
template <typename A>
M2MKD_INLINE void attend_rows(const ForwardHead<A>& h) {
  for_blocks(h, [&](const Block& block) M2MKD_INLINE_LAMBDA {
    fetch_target(rows_of(h, h.out, block.begin), (block.end - block.begin) * h.packs);
    fetch(rows_of(h, h.q, block.end), kBlockRows * h.packs);
    attend_block(h, block);
    const int64_t rows = h.end - h.begin, packs = h.fetched_packs;
    const int64_t first = packs * (block.begin - h.begin) / rows;
    const int64_t last = packs * (block.end - h.begin) / rows;
    fetch(h.k + (packs + first) * kPack<A>, last - first);
    fetch(h.v + (packs + first) * kPack<A>, last - first);
  });
}

template <typename A>
M2MKD_INLINE void backward_rows(const ReceiverGrad<A>& h) {
  for_blocks(h, [&](const Block& block) M2MKD_INLINE_LAMBDA {
    fetch_target(rows_of(h, h.q_grad, block.begin), (block.end - block.begin) * h.packs);
    fetch(rows_of(h, h.q, block.end), kBlockRows * h.packs);
    fetch(rows_of(h, h.grad, block.end), kBlockRows * h.packs);
    backward_block(h, block);
  });
}

template <typename A>
M2MKD_INLINE void backward_columns(const SenderGrad<A>& head) {
  for (int64_t v = head.begin; v < head.end; ++v) {
    backward_column(head, v);
  }
}

template <typename T>
M2MKD_INLINE void widen_rows(const T* rows, int64_t from, compute_t<T>* wide, int64_t n,
                             int64_t width, int64_t stride) {
  for (int64_t r = 0; r < n; ++r, rows += from, wide += stride) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      wide[i] = static_cast<compute_t<T>>(rows[i]);
    }
    std::fill(wide + width, wide + stride, compute_t<T>(0));
  }
}

template <typename T>
M2MKD_INLINE void narrow_rows(const compute_t<T>* wide, T* rows, int64_t to, int64_t n,
                              int64_t width, int64_t stride) {
  for (int64_t r = 0; r < n; ++r, rows += to, wide += stride) {
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

#define M2MKD_DEFINE_ROW_COPIES(T)                                                    \
  M2MKD_CLONES void widen(const T* rows, int64_t from, compute_t<T>* wide, int64_t n, \
                          int64_t width, int64_t stride) {                            \
    widen_rows(rows, from, wide, n, width, stride);                                   \
  }                                                                                   \
  M2MKD_CLONES void narrow(const compute_t<T>* wide, T* rows, int64_t to, int64_t n,  \
                           int64_t width, int64_t stride) {                           \
    narrow_rows(wide, rows, to, n, width, stride);                                    \
  }

M2MKD_DEFINE_ROW_COPIES(float)
M2MKD_DEFINE_ROW_COPIES(double)
M2MKD_DEFINE_ROW_COPIES(c10::Half)
M2MKD_DEFINE_ROW_COPIES(c10::BFloat16)

}  // namespace m2mkd::cpu
