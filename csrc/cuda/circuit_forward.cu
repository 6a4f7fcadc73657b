// Attention of receivers to their senders: a warp per receiver, online softmax over chunks of 32
// edges. A chunk takes two passes over its senders, keys then values, so that every edge's weight
// is computed once, on the lane that owns it.

#include "circuit_launch.h"

namespace m2mkd::cuda {

namespace {

// 64 registers a thread let two staged blocks share a multiprocessor where their tables fit.
constexpr int kStagedThreads = 512;
template <class L>
constexpr int kThreads = L::kStaged ? kStagedThreads : kDirectThreads;

template <typename A>
__device__ A warp_max(A x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kFullMask, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// Query times key of the edge that this lane owns.
template <class L, class Source>
__device__ typename L::A own_dot(const typename L::A (&query)[L::kElements], Source keys,
                                 int sender, int packs, const Edges<L>& edges) {
  typename L::A own = 0;
#pragma unroll 1
  for (int t = 0; t < edges.steps; t += L::kAhead) {
    Share<L> key[L::kAhead];
    load_ahead<L>(keys, sender, packs, edges, t, key);
#pragma unroll
    for (int i = 0; i < L::kAhead; ++i) {
      const typename L::A dot = group_dot<L>(query, key[i]);
      own = edges.lane.place == t + i ? dot : own;
    }
  }
  return own;
}

// sums += weight times value over the chunk's edges, each group adding up its own.
template <class L, class Source>
__device__ void add_values(typename L::A weight, Source values, int sender, int packs,
                           const Edges<L>& edges, typename L::A (&sums)[L::kElements]) {
#pragma unroll 1
  for (int t = 0; t < edges.steps; t += L::kAhead) {
    Share<L> value[L::kAhead];
    load_ahead<L>(values, sender, packs, edges, t, value);
#pragma unroll
    for (int i = 0; i < L::kAhead; ++i) {
      add_scaled<L>(edges.from_owner(weight, t + i), value[i], sums);
    }
  }
}

// One (batch, head), and its edges' biases or null.
template <class L>
struct Head {
  int64_t pair;
  const typename L::A* bias;
};

template <class L, class Source>
__device__ void forward_row(const CircuitForward& a, const Head<L>& head, int receiver, Source keys,
                            Source values) {
  using A = typename L::A;
  const Lane<L> lane;
  const int packs = a.width / L::N;
  const int64_t row = head.pair * a.receivers + receiver;
  A query[L::kElements];
  load_row<L>(a.q, row, packs, lane, query);
  A sums[L::kElements] = {};
  A total = 0;  // of the weights on this lane's edges
  A largest = -INFINITY;
  const int end = a.row_ptr[receiver + 1];
  for (int first = a.row_ptr[receiver]; first < end; first += kWarp) {
    const Edges<L> edges(first, end, lane);
    const int sender = a.sender[edges.own];
    const A bias = head.bias != nullptr ? head.bias[edges.own] : A(0);
    const A dot = own_dot<L>(query, keys, sender, packs, edges);
    const A score = edges.valid ? edge_score(dot, a.scale, bias) : A(-INFINITY);
    const A previous = largest;
    const A found = warp_max(score);
    largest = found > largest ? found : largest;
    // As long as every score is -inf, all weights are 0; the difference would be NaN.
    const A shift = largest == A(-INFINITY) ? A(0) : largest;
    const A shrink = exp(previous - shift);
    const A weight = exp(score - shift);
    total = total * shrink + weight;
#pragma unroll
    for (int i = 0; i < L::kElements; ++i) {
      sums[i] *= shrink;
    }
    add_values<L>(weight, values, sender, packs, edges, sums);
  }
  total = warp_sum(total);
  store_row<L>(total == A(0) ? A(0) : A(1) / total, sums, a.out, row, packs, lane);
  if (threadIdx.x % kWarp == 0) {
    static_cast<A*>(a.lse)[row] = total == A(0) ? A(-INFINITY) : largest + log(total);
  }
}

// A block takes `rows` receivers of one (batch, head), a warp each at a time.
template <class L>
__global__ void __launch_bounds__(kThreads<L>, L::kStaged ? 2 : 1)
    circuit_forward_kernel(CircuitForward a, int rows, int row_blocks) {
  using P = typename L::P;
  const int pair = blockIdx.x / row_blocks;
  const int first = blockIdx.x % row_blocks * rows;
  const int end = a.receivers - first < rows ? a.receivers : first + rows;
  const int packs = a.width / L::N;
  const P* keys = rows_from<L>(a.k, int64_t(pair) * a.senders, packs);
  const P* values = rows_from<L>(a.v, int64_t(pair) * a.senders, packs);
  const Head<L> head{pair, values_from<typename L::A>(a.bias, pair / a.heads * a.bias_stride)};
  const auto each_row = [&](auto near_keys, auto near_values) {
    for (int u = first + threadIdx.x / kWarp; u < end; u += blockDim.x / kWarp) {
      forward_row<L>(a, head, u, near_keys, near_values);
    }
  };
  if constexpr (L::kStaged) {
    M2MKD_DYNAMIC_SHARED(P, staged);
    stage(keys, values, a.senders * packs, staged);
    each_row(staged, staged + a.senders * packs);
  } else {
    each_row(keys, values);
  }
}

}  // namespace

int launch_circuit_forward(DType dtype, const CircuitForward& a, void* stream) {
  const int pairs = a.batch * a.heads;
  if (pairs == 0 || a.receivers == 0) {
    return cudaSuccess;
  }
  int error = cudaSuccess;
  M2MKD_FOR_DTYPE(dtype, {
    const bool packed = in_packs<T>(a.width, {a.q, a.k, a.v, a.out});
    const Split split =
        split_rows<T>(pairs, 1, a.receivers, a.senders, a.edges, a.width, packed, kStagedThreads);
    error = with_layout<T>(a.width, packed, split.staged, [&](auto layout) {
      using L = decltype(layout);
      allow_shared<L>(circuit_forward_kernel<L>);
      M2MKD_LAUNCH(circuit_forward_kernel<L>, pairs * split.row_blocks, kThreads<L>,
                   split.shared_bytes, stream, a, split.rows, split.row_blocks);
      return int(cudaGetLastError());
    });
  });
  return error;
}

}  // namespace m2mkd::cuda
