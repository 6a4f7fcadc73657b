// The inner loops of circuit attention: one head at a time, in A = float or double. Half types are
// widened before and rounded after.
//
// Letters: U receivers, V senders, D head width, N edges. Edges are numbered by receiver.

#pragma once

#include <cstdint>

namespace m2mkd::cpu {

// What the sender pass needs of an edge: its attention weight, and the gradient of its score.
template <typename A>
struct EdgeGrad {
  A weight;
  A score;
};

// Receivers [begin, end) of one head, forward. q, out and lse start at receiver begin, k and v at
// sender 0; bias (or null), like sender, at edge 0. scores has room for the largest degree.
template <typename A>
struct ForwardHead {
  const A* q;
  const A* k;
  const A* v;
  const A* bias;
  const int32_t* row_ptr;
  const int32_t* sender;
  int64_t begin;
  int64_t end;
  int64_t width;
  A scale;
  A* scores;
  A* out;
  A* lse;
};

// Receivers [begin, end) of one head, backward: the gradient of q, and of every edge. q, grad, out,
// lse and q_grad start at receiver begin, edges at edge 0.
template <typename A>
struct ReceiverGrad {
  const A* q;
  const A* k;
  const A* v;
  const A* grad;
  const A* out;
  const A* lse;
  const A* bias;
  const int32_t* row_ptr;
  const int32_t* sender;
  int64_t begin;
  int64_t end;
  int64_t width;
  A scale;
  A* q_grad;
  EdgeGrad<A>* edges;
};

// Senders [begin, end) of one head, backward: the gradients of k and v, which start at sender
// begin; q and grad start at receiver 0.
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
  int64_t width;
  A scale;
  A* k_grad;
  A* v_grad;
};

// One overload per A, defined in circuit_rows.cpp.
#define M2MKD_DECLARE_CIRCUIT_ROWS(A)                          \
  void attend(const ForwardHead<A>& head);                     \
  void attend_backward_receivers(const ReceiverGrad<A>& head); \
  void attend_backward_senders(const SenderGrad<A>& head);

M2MKD_DECLARE_CIRCUIT_ROWS(float)
M2MKD_DECLARE_CIRCUIT_ROWS(double)
#undef M2MKD_DECLARE_CIRCUIT_ROWS

}  // namespace m2mkd::cpu
