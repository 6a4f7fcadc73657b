// Gradients of keys and values: a warp per sender, over the transpose, so that a row has one owner.
// An edge's weight p and score gradient p (grad . value - delta) are those of circuit_receivers.cu;
// the value's gradient is the sum of p grad over a sender's receivers.

#include "circuit_launch.h"

namespace m2mkd::cuda {

namespace {

// 96 registers a thread let two staged blocks share a multiprocessor where their tables fit.
constexpr int kStagedThreads = 320;
template <class L>
constexpr int kThreads = L::kStaged ? kStagedThreads : kDirectThreads;

// One (batch, head): what senders need to know of its receivers, and the biases or null.
template <class L>
struct Head {
  int64_t pair;
  const typename L::A *lse, *delta, *bias;
};

template <class L, class Source>
__device__ void sender_row(const CircuitBackward& a, const Head<L>& head, int sender,
                           Source queries, Source grads) {
  using A = typename L::A;
  const Lane<L> lane;
  const int packs = a.width / L::N;
  const int64_t row = head.pair * a.senders + sender;
  A key[L::kElements], value[L::kElements];
  load_row<L>(a.k, row, packs, lane, key);
  load_row<L>(a.v, row, packs, lane, value);
  A key_sums[L::kElements] = {}, value_sums[L::kElements] = {};
  const int end = a.col_ptr[sender + 1];
  for (int first = a.col_ptr[sender]; first < end; first += kWarp) {
    const Edges<L> edges(first, end, lane);
    const int receiver = a.receiver[edges.own];
    const A delta = head.delta[receiver];
    // A weight is 0 where the receiver has none, or the lane no edge.
    A lse = head.lse[receiver];
    A bias = -INFINITY;
    if (edges.valid && lse != A(-INFINITY)) {
      bias = head.bias != nullptr ? head.bias[a.edge_id[edges.own]] : A(0);
    } else {
      lse = 0;
    }
#pragma unroll 1
    for (int t = 0; t < edges.steps; t += L::kBothAhead) {
      Share<L> query[L::kBothAhead], grad[L::kBothAhead];
      load_ahead<L>(queries, receiver, packs, edges, t, query);
      load_ahead<L>(grads, receiver, packs, edges, t, grad);
#pragma unroll
      for (int i = 0; i < L::kBothAhead; ++i) {
        const A dot = group_dot<L>(key, query[i]);
        const A score = edge_score(dot, a.scale, edges.from_owner(bias, t + i));
        const A weight = exp(score - edges.from_owner(lse, t + i));
        const A fall = group_dot<L>(value, grad[i]) - edges.from_owner(delta, t + i);
        add_scaled<L>(weight * fall, query[i], key_sums);
        add_scaled<L>(weight, grad[i], value_sums);
      }
    }
  }
  store_row<L>(A(a.scale), key_sums, a.k_grad, row, packs, lane);
  store_row<L>(A(1), value_sums, a.v_grad, row, packs, lane);
}

// A block takes `rows` senders of one (batch, head), a warp each at a time.
template <class L>
__global__ void __launch_bounds__(kThreads<L>, L::kStaged ? 2 : 1)
    circuit_senders_kernel(CircuitBackward a, int rows, int row_blocks) {
  using P = typename L::P;
  using A = typename L::A;
  const int pair = blockIdx.x / row_blocks;
  const int first = blockIdx.x % row_blocks * rows;
  const int end = a.senders - first < rows ? a.senders : first + rows;
  const int packs = a.width / L::N;
  const int64_t first_receiver = int64_t(pair) * a.receivers;
  const P* queries = rows_from<L>(a.q, first_receiver, packs);
  const P* grads = rows_from<L>(a.grad, first_receiver, packs);
  const Head<L> head{pair, values_from<A>(a.lse, first_receiver),
                     values_from<A>(a.delta, first_receiver),
                     values_from<A>(a.bias, pair / a.heads * a.bias_stride)};
  const auto each_row = [&](auto near_queries, auto near_grads) {
    for (int v = first + threadIdx.x / kWarp; v < end; v += blockDim.x / kWarp) {
      sender_row<L>(a, head, v, near_queries, near_grads);
    }
  };
  if constexpr (L::kStaged) {
    M2MKD_DYNAMIC_SHARED(P, staged);
    stage(queries, grads, a.receivers * packs, staged);
    each_row(staged, staged + a.receivers * packs);
  } else {
    each_row(queries, grads);
  }
}

}  // namespace

int launch_circuit_senders(DType dtype, const CircuitBackward& a, void* stream) {
  const int pairs = a.batch * a.heads;
  if (pairs == 0 || a.senders == 0) {
    return cudaSuccess;
  }
  int error = cudaSuccess;
  M2MKD_FOR_DTYPE(dtype, {
    const bool packed = in_packs<T>(a.width, {a.grad, a.q, a.k, a.v, a.k_grad, a.v_grad});
    const Split split =
        split_rows<T>(pairs, 1, a.senders, a.receivers, a.edges, a.width, packed, kStagedThreads);
    error = with_layout<T>(a.width, packed, split.staged, [&](auto layout) {
      using L = decltype(layout);
      allow_shared<L>(circuit_senders_kernel<L>);
      M2MKD_LAUNCH(circuit_senders_kernel<L>, pairs * split.row_blocks, kThreads<L>,
                   split.shared_bytes, stream, a, split.rows, split.row_blocks);
      return int(cudaGetLastError());
    });
  });
  return error;
}

}  // namespace m2mkd::cuda
