// The inner loops of circuit attention, on rows of a whole number of packs. Half types are widened,
// and other widths padded with zeros, before; see Rows in circuit_attention.cpp.
//
// Letters: U receivers, V senders, N edges. Edges are numbered by receiver.

#pragma once

#include <algorithm>
#include <cstdint>

#include "../checks.h"

namespace m2mkd::cpu {

// Numbers in a pack: as many as the widest vector register holds.
template <typename A>
constexpr int64_t kPack = 64 / sizeof(A);

constexpr int64_t kMaxWidth = 256;

// Receivers, and edges of more than one receiver, that are worked on together.
constexpr int64_t kBlockRows = 8;
constexpr int64_t kBlockEdges = 64;

// Room in a buffer of scores: each receiver of a block has whole packs, and one pack is spare.
template <typename A>
constexpr int64_t scores_room(int64_t largest_degree) {
  return std::max(largest_degree, kBlockEdges) + (kBlockRows + 1) * kPack<A>;
}

// What the sender pass needs of an edge: its attention weight, and the gradient of its score.
template <typename A>
struct EdgeGrad {
  A weight;
  A score;
};

// Receivers [begin, end) of one head, forward. q, out and lse start at receiver begin, k and v at
// sender 0; bias (or null), like sender, at edge 0. scores has room for scores_room numbers. Of the
// next head's keys and values fetched_packs are asked for meanwhile.
template <typename A>
struct ForwardHead {
  const A* q;
  const A* k;
  const A* v;
  const A* bias;
  const int32_t* row_ptr;
  const int32_t* sender;
  int64_t fetched_packs;
  int64_t begin;
  int64_t end;
  int64_t packs;
  A scale;
  A* scores;
  A* out;
  A* lse;
};

// Receivers [begin, end) of one head, backward: the gradient of q, and of every edge. q, grad, lse
// and q_grad start at receiver begin, edges and bias_grad (or null) at edge 0. bias_grad becomes
// the gradient of scores, or grows by it. weights and slopes are buffers like scores.
template <typename A>
struct ReceiverGrad {
  const A* q;
  const A* k;
  const A* v;
  const A* grad;
  const A* lse;
  const A* bias;
  const int32_t* row_ptr;
  const int32_t* sender;
  int64_t begin;
  int64_t end;
  int64_t packs;
  A scale;
  A* weights;
  A* slopes;
  A* q_grad;
  EdgeGrad<A>* edges;
  A* bias_grad;
  bool bias_grad_grows;
};

// Senders [begin, end) of one head, backward: the gradients of k and v, which start at sender
// begin; q and grad start at receiver 0. weights and slopes have room for one sender's edges. The
// next head's keys and values, or null, are asked for meanwhile: this one's are no longer needed.
template <typename A>
struct SenderGrad {
  const A* q;
  const A* grad;
  const EdgeGrad<A>* edges;
  const int32_t* col_ptr;
  const int32_t* receiver;
  const int32_t* edge_id;
  int64_t begin;
  int64_t end;
  int64_t packs;
  A scale;
  A* weights;
  A* slopes;
  A* k_grad;
  A* v_grad;
  const A* next_k;
  const A* next_v;
};

// One overload per type, defined in circuit_rows.cpp.
void attend(const ForwardHead<float>& head);
void attend(const ForwardHead<double>& head);
void attend_backward(const ReceiverGrad<float>& head);
void attend_backward(const ReceiverGrad<double>& head);
void attend_backward(const SenderGrad<float>& head);
void attend_backward(const SenderGrad<double>& head);

// Copies rows of `width` numbers, `from` apart, to rows of `stride`, filled up with zeros; and
// back.
#define M2MKD_DECLARE_ROW_COPIES(T)                                                     \
  void widen(const T* rows, int64_t from, compute_t<T>* wide, int64_t n, int64_t width, \
             int64_t stride);                                                           \
  void narrow(const compute_t<T>* wide, T* rows, int64_t to, int64_t n, int64_t width,  \
              int64_t stride);

M2MKD_DECLARE_ROW_COPIES(float)
M2MKD_DECLARE_ROW_COPIES(double)
M2MKD_DECLARE_ROW_COPIES(c10::Half)
M2MKD_DECLARE_ROW_COPIES(c10::BFloat16)
#undef M2MKD_DECLARE_ROW_COPIES

}  // namespace m2mkd::cpu
