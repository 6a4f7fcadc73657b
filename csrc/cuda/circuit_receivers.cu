// Gradients of queries and edge biases: a warp per receiver. With the weight p = exp(score - lse)
// of an edge and D = grad . out of its receiver, which is the sum of p (grad . value) over its
// edges, the score's gradient is p (grad . value - D).
//
// A bias is shared by the heads, and perhaps by the batch. The warp of a receiver goes through the
// heads of one part of one example and adds each edge's gradient to the same entry, which no other
// warp touches: a fixed order, no atomics, and [batch, parts, edges] numbers instead of
// [batch, heads, edges].

#include "circuit_launch.h"

namespace m2mkd::cuda {

namespace {

// 96 registers a thread let two staged blocks share a multiprocessor where their tables fit.
constexpr int kStagedThreads = 320;
constexpr int kSumThreads = 256;
template <class L>
constexpr int kThreads = L::kStaged ? kStagedThreads : kDirectThreads;

// One (batch, head), its edges' biases and the sums of their gradients, both null where there are
// none.
template <class L>
struct Head {
  int64_t pair;
  const typename L::A* bias;
  typename L::A* edge_grad;
  bool adds;  // to what an earlier head left in edge_grad
};

// A receiver as its lanes hold it.
template <class L>
struct Receiver {
  typename L::A query[L::kElements], grad[L::kElements];
  typename L::A lse;
  bool dead;       // no edge, or only biases of -inf; lse is 0 then
  int first, end;  // edges
};

// The owner's bias; -inf, for a weight of 0, where it owns no edge or all weights are 0.
template <class L>
__device__ typename L::A own_bias(const Head<L>& head, const Receiver<L>& row,
                                  const Edges<L>& edges) {
  using A = typename L::A;
  if (!edges.valid || row.dead) {
    return -INFINITY;
  }
  return head.bias != nullptr ? head.bias[edges.own] : A(0);
}

// D of a row as the sum of weight times grad . value. It is grad . out where out is exact; the
// rounding of half types in it would show in the gradients of biases, which are float32.
template <class L, class Source>
__device__ typename L::A mean_slope(const CircuitBackward& a, const Head<L>& head,
                                    const Receiver<L>& row, Source keys, Source values, int packs) {
  using A = typename L::A;
  A sum = 0;  // of the group's edges
  for (int first = row.first; first < row.end; first += kWarp) {
    const Edges<L> edges(first, row.end, Lane<L>());
    const int sender = a.sender[edges.own];
    const A bias = own_bias<L>(head, row, edges);
#pragma unroll 1
    for (int t = 0; t < edges.steps; t += L::kBothAhead) {
      Share<L> key[L::kBothAhead], value[L::kBothAhead];
      load_ahead<L>(keys, sender, packs, edges, t, key);
      load_ahead<L>(values, sender, packs, edges, t, value);
#pragma unroll
      for (int i = 0; i < L::kBothAhead; ++i) {
        const A dot = group_dot<L>(row.query, key[i]);
        const A score = edge_score(dot, a.scale, edges.from_owner(bias, t + i));
        const A weight = exp(score - row.lse);
        sum += weight * group_dot<L>(row.grad, value[i]);
      }
    }
  }
#pragma unroll
  for (int step = L::G; step < kWarp; step *= 2) {
    sum += __shfl_xor_sync(kFullMask, sum, step);
  }
  return sum;
}

template <class L, class Source>
__device__ void receiver_row(const CircuitBackward& a, const Head<L>& head, int receiver,
                             Source keys, Source values) {
  using A = typename L::A;
  const Lane<L> lane;
  const int packs = a.width / L::N;
  const int64_t at = head.pair * a.receivers + receiver;
  Receiver<L> row;
  load_row<L>(a.q, at, packs, lane, row.query);
  load_row<L>(a.grad, at, packs, lane, row.grad);
  row.lse = static_cast<const A*>(a.lse)[at];
  row.dead = row.lse == A(-INFINITY);
  row.lse = row.dead ? A(0) : row.lse;
  row.first = a.row_ptr[receiver];
  row.end = a.row_ptr[receiver + 1];
  A delta;
  if constexpr (sizeof(typename L::T) == 2) {
    delta = mean_slope<L>(a, head, row, keys, values, packs);
  } else {
    delta = group_dot<L>(row.grad,
                         load_share<L>(rows_from<L>(a.out, at, packs), 0, packs, lane.place, true));
  }
  if (threadIdx.x % kWarp == 0) {
    static_cast<A*>(a.delta)[at] = delta;
  }
  A sums[L::kElements] = {};
  for (int first = row.first; first < row.end; first += kWarp) {
    const Edges<L> edges(first, row.end, lane);
    const int sender = a.sender[edges.own];
    const A bias = own_bias<L>(head, row, edges);
    A own = 0;
#pragma unroll 1
    for (int t = 0; t < edges.steps; t += L::kBothAhead) {
      Share<L> key[L::kBothAhead], value[L::kBothAhead];
      load_ahead<L>(keys, sender, packs, edges, t, key);
      load_ahead<L>(values, sender, packs, edges, t, value);
#pragma unroll
      for (int i = 0; i < L::kBothAhead; ++i) {
        const A dot = group_dot<L>(row.query, key[i]);
        const A score = edge_score(dot, a.scale, edges.from_owner(bias, t + i));
        const A weight = exp(score - row.lse);
        const A score_grad = weight * (group_dot<L>(row.grad, value[i]) - delta);
        add_scaled<L>(score_grad, key[i], sums);
        own = lane.place == t + i ? score_grad : own;
      }
    }
    if (head.edge_grad != nullptr && edges.valid) {
      A* target = head.edge_grad + edges.own;
      *target = head.adds ? *target + own : own;
    }
  }
  store_row<L>(A(a.scale), sums, a.q_grad, at, packs, lane);
}

// A block takes `rows` receivers of one part of one example, a warp each at a time, head by head.
template <class L>
__global__ void __launch_bounds__(kThreads<L>, L::kStaged ? 2 : 1)
    circuit_receivers_kernel(CircuitBackward a, int rows, int row_blocks) {
  using P = typename L::P;
  using A = typename L::A;
  const int slice = blockIdx.x / row_blocks;
  const int first = blockIdx.x % row_blocks * rows;
  const int end = a.receivers - first < rows ? a.receivers : first + rows;
  const int example = slice / a.parts;
  const int part = slice % a.parts;
  const int packs = a.width / L::N;
  const int first_head = int(int64_t(a.heads) * part / a.parts);
  const int end_head = int(int64_t(a.heads) * (part + 1) / a.parts);
  Head<L> head;
  head.bias = values_from<A>(a.bias, example * a.bias_stride);
  head.edge_grad =
      a.edge_grad == nullptr ? nullptr : static_cast<A*>(a.edge_grad) + int64_t(slice) * a.edges;
  for (int h = first_head; h < end_head; ++h) {
    head.pair = int64_t(example) * a.heads + h;
    head.adds = h > first_head;
    const P* keys = rows_from<L>(a.k, head.pair * a.senders, packs);
    const P* values = rows_from<L>(a.v, head.pair * a.senders, packs);
    const auto each_row = [&](auto near_keys, auto near_values) {
      for (int u = first + threadIdx.x / kWarp; u < end; u += blockDim.x / kWarp) {
        receiver_row<L>(a, head, u, near_keys, near_values);
      }
    };
    if constexpr (L::kStaged) {
      M2MKD_DYNAMIC_SHARED(P, staged);
      stage(keys, values, a.senders * packs, staged);
      each_row(staged, staged + a.senders * packs);
      __syncthreads();
    } else {
      each_row(keys, values);
    }
  }
}

template <typename A>
__global__ void sum_parts_kernel(const A* terms, int parts, int count, int64_t results, A* out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < results; i += step) {
    const int64_t first = i / count * parts * count + i % count;
    A sum = 0;
    for (int part = 0; part < parts; ++part) {
      sum += terms[first + int64_t(part) * count];
    }
    out[i] = sum;
  }
}

// Examples with their heads in parts where edges' gradients are summed, each head by itself where
// not.
template <typename T>
Split split_receivers(const CircuitBackward& a, bool sums, bool packed) {
  return split_rows<T>(sums ? a.batch : int64_t(a.batch) * a.heads, sums ? a.heads : 1, a.receivers,
                       a.senders, a.edges, a.width, packed, kStagedThreads);
}

template <typename T>
bool receivers_in_packs(const CircuitBackward& a) {
  return in_packs<T>(a.width, {a.grad, a.out, a.q, a.k, a.v, a.q_grad});
}

}  // namespace

int circuit_parts(DType dtype, const CircuitBackward& a) {
  if (a.batch == 0 || a.receivers == 0) {
    return 1;
  }
  int parts = 1;
  M2MKD_FOR_DTYPE(dtype, parts = split_receivers<T>(a, true, receivers_in_packs<T>(a)).parts);
  return parts;
}

int launch_circuit_receivers(DType dtype, const CircuitBackward& a, void* stream) {
  if (a.batch == 0 || a.heads == 0 || a.receivers == 0) {
    return cudaSuccess;
  }
  int error = cudaSuccess;
  M2MKD_FOR_DTYPE(dtype, {
    const bool packed = receivers_in_packs<T>(a);
    const Split split = split_receivers<T>(a, a.edge_grad != nullptr, packed);
    error = with_layout<T>(a.width, packed, split.staged, [&](auto layout) {
      using L = decltype(layout);
      allow_shared<L>(circuit_receivers_kernel<L>);
      M2MKD_LAUNCH(circuit_receivers_kernel<L>, a.batch * a.parts * split.row_blocks, kThreads<L>,
                   split.shared_bytes, stream, a, split.rows, split.row_blocks);
      return int(cudaGetLastError());
    });
  });
  return error;
}

int launch_sum_parts(DType dtype, const void* terms, int sums, int parts, int count, void* out,
                     void* stream) {
  const int64_t results = int64_t(sums) * count;
  if (results == 0) {
    return cudaSuccess;
  }
  const int64_t blocks = (results + kSumThreads - 1) / kSumThreads;
  const int grid = int(blocks < INT32_MAX ? blocks : INT32_MAX);
  if (dtype == DType::f64) {
    M2MKD_LAUNCH(sum_parts_kernel<double>, grid, kSumThreads, 0, stream,
                 static_cast<const double*>(terms), parts, count, results,
                 static_cast<double*>(out));
  } else {
    M2MKD_LAUNCH(sum_parts_kernel<float>, grid, kSumThreads, 0, stream,
                 static_cast<const float*>(terms), parts, count, results, static_cast<float*>(out));
  }
  return cudaGetLastError();
}

}  // namespace m2mkd::cuda
