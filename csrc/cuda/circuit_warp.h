// How the warps of the circuit kernels hold rows and walk edges.
//
// A warp works on one row at a time, a receiver or (over the transpose) a sender, against its
// neighbours on the other side. Rows are cut into packs; G lanes hold one row, C packs each, so
// that the warp's 32 / G groups of lanes work on as many neighbours in every step. Edges are taken
// 32 at a time, one per lane: the lane at `place` of `group` owns edge place * (32 / G) + group,
// which is the one its group works on in step `place`. So indices and biases are read once and
// coalesced, and whatever is known per edge (a score, a weight) is computed on one lane and handed
// to the group by a shuffle.

#pragma once

#include "platform.h"

namespace m2mkd::cuda {

template <typename Element, int PackSize, int GroupLanes, int LanePacks, bool Staged>
struct Layout {
  using T = Element;
  using A = compute_t<T>;
  using P = Pack<T, PackSize>;
  static constexpr int N = PackSize, G = GroupLanes, C = LanePacks;
  static constexpr bool kStaged = Staged;  // the other side's rows are in shared memory
  static constexpr int kGroups = kWarp / G;
  static constexpr int kElements = N * C;  // of a row, per lane
  // Steps whose loads are in flight together: enough to hide the latency of L2, or that of shared
  // memory with fewer registers. Rows wide enough for C > 1 have several loads in one step.
  static constexpr int kWanted = C > 1 ? 1 : Staged ? 2 : 4;
  static constexpr int kAhead = kWanted < G ? kWanted : G;
  // The same where two tables are read together.
  static constexpr int kBothAhead = kAhead > 1 ? kAhead / 2 : 1;
};

// Where a thread stands: which group of its warp, and which lane of the group.
template <class L>
struct Lane {
  int group = int(threadIdx.x) % kWarp / L::G;
  int place = int(threadIdx.x) % L::G;
};

// Up to 32 edges of a row, from `first` on; every lane owns one of them. Lanes beyond the last edge
// have it as well, but are not `valid`.
template <class L>
struct Edges {
  __device__ Edges(int first, int end, Lane<L> lane)
      : lane(lane), count(end - first < kWarp ? end - first : kWarp) {
    const int offset = lane.place * L::kGroups + lane.group;
    steps = (count + L::kGroups - 1) / L::kGroups;
    valid = offset < count;
    own = valid ? first + offset : end - 1;
  }

  // What the owner of this group's edge in step t holds.
  template <typename X>
  __device__ X from_owner(X x, int t) const {
    return __shfl_sync(kFullMask, x, lane.group * L::G + t);
  }
  // Whether this group has an edge in step t.
  __device__ bool has(int t) const { return t * L::kGroups + lane.group < count; }

  Lane<L> lane;
  int count, steps;
  int own;
  bool valid;
};

// A lane's share of a row.
template <class L>
struct Share {
  typename L::P at[L::C];

  __device__ typename L::A value(int i) const { return at[i / L::N].get(i % L::N); }
};

// The rows of a tensor from `first_row` on, and single values.
template <class L>
__device__ inline const typename L::P* rows_from(const void* rows, int64_t first_row, int packs) {
  return static_cast<const typename L::P*>(rows) + first_row * packs;
}
template <typename A>
__device__ inline const A* values_from(const void* values, int64_t first) {
  return values != nullptr ? static_cast<const A*>(values) + first : nullptr;
}

// Zeros where not `wanted`: then values that a row does not attend to cannot turn it into NaN. The
// load itself is not conditional, which would keep address arithmetic from leaving loops.
template <class L, class Source>
__device__ inline Share<L> load_share(Source rows, int row, int packs, int place, bool wanted) {
  Share<L> share;
#pragma unroll
  for (int c = 0; c < L::C; ++c) {
    const int pack = place + c * L::G;
    const bool inside = pack < packs;
    const typename L::P loaded = rows[int64_t(row) * packs + (inside ? pack : packs - 1)];
    share.at[c] = wanted && inside ? loaded : typename L::P{};
  }
  return share;
}

// The neighbours of steps t, t + 1, ...; all loads are issued before any is used.
template <class L, int Ahead, class Source>
__device__ inline void load_ahead(Source rows, int own_neighbour, int packs, const Edges<L>& edges,
                                  int t, Share<L> (&shares)[Ahead]) {
#pragma unroll
  for (int i = 0; i < Ahead; ++i) {
    const int neighbour = edges.from_owner(own_neighbour, t + i);
    shares[i] = load_share<L>(rows, neighbour, packs, edges.lane.place, edges.has(t + i));
  }
}

// This lane's elements of a row of a tensor.
template <class L>
__device__ inline void load_row(const void* rows, int64_t row, int packs, Lane<L> lane,
                                typename L::A (&elements)[L::kElements]) {
  const auto share = load_share<L>(rows_from<L>(rows, row, packs), 0, packs, lane.place, true);
#pragma unroll
  for (int i = 0; i < L::kElements; ++i) {
    elements[i] = share.value(i);
  }
}

// A lane's sum over its group, the same on every lane of it.
template <class L>
__device__ inline typename L::A group_sum(typename L::A x) {
#pragma unroll
  for (int step = L::G / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(kFullMask, x, step);
  }
  return x;
}

// Product of two rows, the same on every lane of the group.
template <class L>
__device__ inline typename L::A group_dot(const typename L::A (&row)[L::kElements],
                                          const Share<L>& other) {
  typename L::A sum = 0;
#pragma unroll
  for (int i = 0; i < L::kElements; ++i) {
    sum += row[i] * other.value(i);
  }
  return group_sum<L>(sum);
}

// The score of an edge, rounded the same way wherever it is computed: then the weight of a
// receiver's only edge, exp(score - lse), is exactly 1, and gradients that cancel do so.
template <typename A>
__device__ inline A edge_score(A dot, double scale, A bias) {
  return fma(dot, A(scale), bias);
}

template <class L>
__device__ inline void add_scaled(typename L::A weight, const Share<L>& other,
                                  typename L::A (&sums)[L::kElements]) {
#pragma unroll
  for (int i = 0; i < L::kElements; ++i) {
    sums[i] += weight * other.value(i);
  }
}

// Adds the groups' sums in a fixed order; writes factor times them to a row, which one group does.
template <class L>
__device__ inline void store_row(typename L::A factor, typename L::A (&sums)[L::kElements],
                                 void* rows, int64_t row, int packs, Lane<L> lane) {
#pragma unroll
  for (int step = L::G; step < kWarp; step *= 2) {
#pragma unroll
    for (int i = 0; i < L::kElements; ++i) {
      sums[i] += __shfl_xor_sync(kFullMask, sums[i], step);
    }
  }
  if (lane.group > 0) {
    return;
  }
#pragma unroll
  for (int c = 0; c < L::C; ++c) {
    typename L::P pack;
#pragma unroll
    for (int n = 0; n < L::N; ++n) {
      pack.set(n, factor * sums[c * L::N + n]);
    }
    if (lane.place + c * L::G < packs) {
      static_cast<typename L::P*>(rows)[row * packs + lane.place + c * L::G] = pack;
    }
  }
}

// Copies two tables of rows to shared memory, one after the other.
template <class P, class Shared>
__device__ inline void stage(const P* first, const P* second, int packs, Shared shared) {
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    shared[i] = first[i];
    shared[packs + i] = second[i];
  }
  __syncthreads();
}

}  // namespace m2mkd::cuda
