// Attention along a circuit's edges on the CPU. Each receiver (forward, gradient of q) and each
// sender (gradients of k and v) is one thread's work in a fixed order, so results do not depend on
// the number of threads.
//
// Memory beyond the results, in the backward pass: 8 bytes (float64: 16) per edge, for up to four
// heads of each thread or, of heads beyond a cache, for every head; and 4 (8) per edge and head
// where the bias wants a gradient; both for no more heads at a time than fit into 32 MiB, and for
// at least one. In both passes, for half types, widths that are not whole packs of 64 bytes, and
// heads whose rows do not lie one after the other, each thread's copies of the rows of the head it
// works on.
//
// Letters: B batch, H heads, U receivers, V senders, D head width, N edges.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "../checks.h"
#include "../circuit_arguments.h"
#include "../plan.h"
#include "circuit_rows.h"
#include "parallel.h"
#include "pool.h"

namespace m2mkd::cpu {

namespace {

// Backward works on as many heads at once as two numbers per edge fit into this, at least on one.
constexpr int64_t kEdgeBytes = int64_t{32} << 20;

// Of keys, as of values, that are fetched for the next head: a fraction of a second-level cache.
constexpr int64_t kFetchedBytes = int64_t{160} << 10;

// Rows of a head up to which it goes whole to one thread in the backward pass: what a second-level
// cache holds. Larger heads share the third level better when all threads work on the same one.
constexpr int64_t kWholeBytes = int64_t{2} << 20;

// The edges of one side: those of row r are [ptr[r], ptr[r + 1]).
struct Side {
  const int32_t* ptr;
  int64_t rows;

  int64_t edges() const { return ptr[rows]; }

  // What the rows before `row` cost, in edges.
  int64_t cost_before(int64_t row) const { return ptr[row] + kRowCost * row; }

  static constexpr int64_t kRowCost = 4;
};

// Calls f(head, begin, end) for the rows that are `lane`'s share of `heads` times this side.
template <typename F>
void for_share(const Side& side, int64_t heads, int64_t lane, int64_t lanes, const F& f) {
  const int64_t cost = side.cost_before(side.rows);
  if (heads * cost == 0) {
    return;
  }
  const auto cut = [&](int64_t n) {
    const int64_t position = heads * cost / lanes * n + heads * cost % lanes * n / lanes;
    const int64_t head = std::min(position / cost, heads - 1), rest = position - head * cost;
    int64_t low = 0, high = side.rows;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (side.cost_before(middle) < rest) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return std::pair{head, low};
  };
  const auto [first, begin] = cut(lane);
  const auto [last, end] = cut(lane + 1);
  for (int64_t head = first; head <= last; ++head) {
    const int64_t low = head == first ? begin : 0, high = head == last ? end : side.rows;
    if (low < high) {
      f(head, low, high);
    }
  }
}

// Whether the heads of a row lie side by side, as a projection to all heads leaves them: memory is
// [B, rows, H, D] then.
bool heads_in_rows(const Tensor& x) { return x.stride(1) < x.stride(2); }

// A tensor of x's sizes, dtype and order of memory.
Tensor empty_heads(const Tensor& x) {
  const int64_t batch = x.size(0), heads = x.size(1), rows = x.size(2), width = x.size(3);
  return heads_in_rows(x) ? torch::stable::transpose(
                                pooled_empty(x, {batch, rows, heads, width}, x.scalar_type()), 1, 2)
                          : pooled_empty(x, {batch, heads, rows, width}, x.scalar_type());
}

// x, or a copy, in which the numbers of a row lie one after the other.
Tensor with_whole_rows(const Tensor& x) {
  return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

// Where the rows of a tensor [B, H, rows, D] lie.
struct Heads {
  explicit Heads(const Tensor& x)
      : heads(x.size(1)), batch(x.stride(0)), head(x.stride(1)), row(x.stride(2)) {}

  // Of row r of head h, of B H heads.
  int64_t offset(int64_t h, int64_t r) const {
    return h / heads * batch + h % heads * head + r * row;
  }

  int64_t heads, batch, head, row;
};

// Rows as the kernels take them: the tensor's own memory, or one lane's copy where they do not lie
// one after the other, or must be widened or filled up to whole packs.
template <typename T>
class Rows {
 public:
  using A = compute_t<T>;

  Rows(int64_t most, const Tensor& x)
      : layout_(x), width_(x.size(3)), stride_(packs(width_) * kPack<A>) {
    if (!in_place()) {
      copy_ = std::make_unique_for_overwrite<A[]>(most * stride_);
    }
  }

  static int64_t packs(int64_t width) { return (width + kPack<A> - 1) / kPack<A>; }

  // Packs of the next head's n rows, behind this head's, that are worth asking for early: none
  // where they would drive this head's out of the cache, or are copied before use.
  int64_t fetched_packs(int64_t n) const {
    const int64_t all = n * packs(width_);
    return in_place() && all * kPack<A> * int64_t{sizeof(A)} <= kFetchedBytes ? all : 0;
  }

  // The n rows of the head after this one, or null where they are not worth asking for early.
  const A* next(const Tensor& x, int64_t head, int64_t n) const {
    if constexpr (std::is_same_v<T, A>) {
      if (fetched_packs(n) > 0) {
        return const_data<T>(x) + layout_.offset(head + 1, 0);
      }
    }
    return nullptr;
  }

  // Rows [begin, end) of a head.
  const A* read(const Tensor& x, int64_t head, int64_t begin, int64_t end) {
    const T* rows = const_data<T>(x) + layout_.offset(head, begin);
    if constexpr (std::is_same_v<T, A>) {
      if (in_place()) {
        return rows;
      }
    }
    widen(rows, layout_.row, copy_.get(), end - begin, width_, stride_);
    return copy_.get();
  }

  // Where to write what `written` then puts into the head's rows from `begin`.
  A* target(const Tensor& x, int64_t head, int64_t begin) {
    if constexpr (std::is_same_v<T, A>) {
      if (in_place()) {
        return mutable_data<T>(x) + layout_.offset(head, begin);
      }
    }
    return copy_.get();
  }

  void written(const Tensor& x, int64_t head, int64_t begin, int64_t end) {
    if (!in_place()) {
      T* rows = mutable_data<T>(x) + layout_.offset(head, begin);
      narrow(copy_.get(), rows, layout_.row, end - begin, width_, stride_);
    }
  }

 private:
  bool in_place() const {
    return std::is_same_v<T, A> && width_ == stride_ && layout_.row == width_;
  }

  Heads layout_;
  int64_t width_;
  int64_t stride_;
  std::unique_ptr<A[]> copy_;
};

// One call: sizes, and checks of the values of its graph.
struct Problem : CircuitSizes {
  const char* op;
  int64_t bias_stride;  // between examples; 0 where all share one bias

  Problem(const char* name, const CircuitSizes& sizes)
      : CircuitSizes(sizes), op(name), bias_stride(own_biases ? edges : 0) {
    for (const auto& [what, count] :
         {std::pair{"U", receivers + 1}, std::pair{"V", senders + 1}, std::pair{"N", edges}}) {
      check_int32_range(op, what, count);
    }
  }

  Side side(const char* name, const Tensor& ptr) const {
    const int32_t* data = const_data<int32_t>(ptr);
    const int64_t rows = ptr.size(0) - 1;
    STD_TORCH_CHECK(data[0] == 0 && data[rows] == edges && std::is_sorted(data, data + rows + 1),
                    op, ": ", name, " must rise from 0 to the ", edges, " edges");
    return {data, rows};
  }

  const int32_t* index(const char* name, const Tensor& tensor, int64_t bound) const {
    const int32_t* data = const_data<int32_t>(tensor);
    check_entries(op, name, data, edges, 0, bound);
    return data;
  }

  int64_t all_heads() const { return batch * heads; }

  // Bytes that `count` heads' attention touches.
  template <typename T>
  int64_t bytes(int64_t count) const {
    return count * (edges + receivers + senders) * width * int64_t{sizeof(T)};
  }

  // Whether a second-level cache holds one head's queries, keys, values and gradient.
  template <typename T>
  bool is_small() const {
    return 2 * (receivers + senders) * width * int64_t{sizeof(T)} <= kWholeBytes;
  }
};

int64_t largest_degree(const Side& side) {
  int64_t most = 0;
  for (int64_t r = 0; r < side.rows; ++r) {
    most = std::max<int64_t>(most, side.ptr[r + 1] - side.ptr[r]);
  }
  return most;
}

// Adds the bias gradients of every `step`-th of heads [first, first + heads), head after head, to
// the bias they share.
template <typename A>
void add_bias_grad(const Problem& p, const A* head_grads, int64_t first, int64_t heads,
                   int64_t step, A* sums) {
  parallel_items(p.edges, heads / step * int64_t{sizeof(A)}, [&](int64_t begin, int64_t end) {
    for (int64_t h = 0; h < heads; h += step) {
      A* sum = sums + (first + h) / p.heads * p.bias_stride;
      const A* grad = head_grads + h * p.edges;
      for (int64_t e = begin; e < end; ++e) {
        sum[e] += grad[e];
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> circuit_attention(const Tensor& q_any, const Tensor& k_any,
                                             const Tensor& v_any, std::optional<Tensor> bias_any,
                                             const Tensor& row_ptr_any, const Tensor& sender_any,
                                             const Tensor& col_ptr, const Tensor& receiver,
                                             const Tensor& edge_id, double scale) {
  const char* op = "circuit_attention";
  const Problem p(op, check_circuit(op, q_any, k_any, v_any, bias_any, row_ptr_any, sender_any,
                                    col_ptr, receiver, edge_id, kMaxWidth));
  const Tensor q = with_whole_rows(q_any), k = with_whole_rows(k_any), v = with_whole_rows(v_any);
  const std::optional<Tensor> bias = contiguous(bias_any);
  const Tensor row_ptr = torch::stable::contiguous(row_ptr_any);
  const Tensor sender = torch::stable::contiguous(sender_any);
  const Side side = p.side("row_ptr", row_ptr);
  const int32_t* senders = p.index("sender", sender, p.senders);
  Tensor out = empty_heads(q);
  Tensor lse = new_empty(q, {p.batch, p.heads, p.receivers}, compute_dtype(q.scalar_type()));
  if (lse.numel() == 0) {
    return {out, lse};
  }
  const int64_t degree = largest_degree(side);
  dispatch_float(p.op, q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = compute_t<T>;
    parallel_lanes(p.bytes<T>(p.all_heads()), [&](int64_t lane, int64_t lanes) {
      Rows<T> q_rows(p.receivers, q), out_rows(p.receivers, out);
      Rows<T> k_rows(p.senders, k), v_rows(p.senders, v);
      std::vector<A> scores(scores_room<A>(degree));
      for_share(side, p.all_heads(), lane, lanes, [&](int64_t head, int64_t begin, int64_t end) {
        attend(ForwardHead<A>{
            .q = q_rows.read(q, head, begin, end),
            .k = k_rows.read(k, head, 0, p.senders),
            .v = v_rows.read(v, head, 0, p.senders),
            .bias = bias ? const_data<A>(*bias) + head / p.heads * p.bias_stride : nullptr,
            .row_ptr = side.ptr,
            .sender = senders,
            .fetched_packs = k_rows.fetched_packs(p.senders),
            .begin = begin,
            .end = end,
            .packs = Rows<T>::packs(p.width),
            .scale = static_cast<A>(scale),
            .scores = scores.data(),
            .out = out_rows.target(out, head, begin),
            .lse = mutable_data<A>(lse) + head * p.receivers + begin,
        });
        out_rows.written(out, head, begin, end);
      });
    });
  });
  return {out, lse};
}

namespace {

// How many of all heads, at least one, fit into kEdgeBytes.
int64_t heads_that_fit(int64_t all, int64_t head_bytes) {
  return std::clamp<int64_t>(kEdgeBytes / std::max<int64_t>(1, head_bytes), 1,
                             std::max<int64_t>(1, all));
}

// Of how many heads the bias gradients are summed by the thread that makes them: few enough to
// leave groups for every thread, in whole groups of an example's heads, and never of more than
// `most`. It depends on no number of threads, so that the order of sums does not.
int64_t group_size(int64_t heads, int64_t most) {
  int64_t size = std::min(int64_t{4}, most);
  while (heads % size != 0) {
    --size;
  }
  return size;
}

// The contiguous inputs of a backward call.
struct Inputs {
  Tensor grad, q, k, v, lse;
  std::optional<Tensor> bias;
  Side by_receiver, by_sender;
  const int32_t *sender, *receiver, *edge_id;
  double scale;
};

// Raises unless the edges by sender are those by receiver, in the order of their numbers.
void check_transpose(const Problem& p, const Inputs& in) {
  const int32_t* first = in.by_receiver.ptr;
  for (int64_t v = 0; v < p.senders; ++v) {
    bool same = true;
    int64_t previous = -1;
    for (int64_t j = in.by_sender.ptr[v]; j < in.by_sender.ptr[v + 1]; ++j) {
      const int64_t edge = in.edge_id[j], u = in.receiver[j];
      same &= edge > previous && in.sender[edge] == v && edge >= first[u] && edge < first[u + 1];
      previous = edge;
    }
    STD_TORCH_CHECK(same, p.op, ": col_ptr, receiver and edge_id list other edges of sender ", v,
                    " than row_ptr and sender, or in another order");
  }
}

// Where a backward call writes.
struct Gradients {
  Tensor q, k, v;
};

// One thread's share of a backward call, with its copies of rows and buffers of scores.
template <typename T>
class BackwardLane {
 public:
  using A = compute_t<T>;

  BackwardLane(const Problem& p, const Inputs& in, const Gradients& to)
      : p_(p),
        in_(in),
        to_(to),
        q_(p.receivers, in.q),
        grad_(p.receivers, in.grad),
        q_result_(p.receivers, to.q),
        k_(p.senders, in.k),
        v_(p.senders, in.v),
        k_result_(p.senders, to.k),
        v_result_(p.senders, to.v),
        weights_(
            scores_room<A>(std::max(largest_degree(in.by_receiver), largest_degree(in.by_sender)))),
        slopes_(weights_.size()) {}

  // Gradient of q for receivers [begin, end) of a head, and of their edges; bias_grad (or null)
  // becomes, or grows by, those of biases.
  void receivers(int64_t head, int64_t begin, int64_t end, EdgeGrad<A>* edges, A* bias_grad,
                 bool grows) {
    attend_backward(ReceiverGrad<A>{
        .q = q_.read(in_.q, head, begin, end),
        .k = k_.read(in_.k, head, 0, p_.senders),
        .v = v_.read(in_.v, head, 0, p_.senders),
        .grad = grad_.read(in_.grad, head, begin, end),
        .lse = const_data<A>(in_.lse) + head * p_.receivers + begin,
        .bias = in_.bias ? const_data<A>(*in_.bias) + head / p_.heads * p_.bias_stride : nullptr,
        .row_ptr = in_.by_receiver.ptr,
        .sender = in_.sender,
        .begin = begin,
        .end = end,
        .packs = Rows<T>::packs(p_.width),
        .scale = static_cast<A>(in_.scale),
        .weights = weights_.data(),
        .slopes = slopes_.data(),
        .q_grad = q_result_.target(to_.q, head, begin),
        .edges = edges,
        .bias_grad = bias_grad,
        .bias_grad_grows = grows,
    });
    q_result_.written(to_.q, head, begin, end);
  }

  // Gradients of k and v for senders [begin, end) of a head, from those of all its edges.
  void senders(int64_t head, int64_t begin, int64_t end, const EdgeGrad<A>* edges) {
    attend_backward(SenderGrad<A>{
        .q = q_.read(in_.q, head, 0, p_.receivers),
        .grad = grad_.read(in_.grad, head, 0, p_.receivers),
        .edges = edges,
        .col_ptr = in_.by_sender.ptr,
        .receiver = in_.receiver,
        .edge_id = in_.edge_id,
        .begin = begin,
        .end = end,
        .packs = Rows<T>::packs(p_.width),
        .scale = static_cast<A>(in_.scale),
        .weights = weights_.data(),
        .slopes = slopes_.data(),
        .k_grad = k_result_.target(to_.k, head, begin),
        .v_grad = v_result_.target(to_.v, head, begin),
        .next_k = k_.next(in_.k, head, p_.senders),
        .next_v = v_.next(in_.v, head, p_.senders),
    });
    k_result_.written(to_.k, head, begin, end);
    v_result_.written(to_.v, head, begin, end);
  }

 private:
  const Problem& p_;
  const Inputs& in_;
  const Gradients& to_;
  Rows<T> q_, grad_, q_result_, k_, v_, k_result_, v_result_;
  std::vector<A> weights_, slopes_;
};

// What the backward pass keeps between its two halves: the edges of `heads` heads, and, where the
// bias wants a gradient, those of as many heads as are summed at a time. Those of a group of heads
// are summed first, in the place of its first head.
template <typename A>
struct Kept {
  int64_t heads;
  int64_t group;
  EdgeGrad<A>* edges;
  A* bias_grads;

  EdgeGrad<A>* edges_of(const Problem& p, int64_t h) const { return edges + h * p.edges; }
  A* bias_grad_of(const Problem& p, int64_t h) const {
    return bias_grads == nullptr ? nullptr : bias_grads + h * p.edges;
  }
};

// Sums the bias gradients of every group of heads [first, last).
template <typename A>
void sum_groups(const Problem& p, const Kept<A>& kept, int64_t first, int64_t last) {
  parallel_items(p.edges, (last - first) * int64_t{sizeof(A)}, [&](int64_t begin, int64_t end) {
    for (int64_t h = first; h < last; ++h) {
      if (h % kept.group != 0) {
        A* sum = kept.bias_grad_of(p, h - h % kept.group);
        const A* grad = kept.bias_grad_of(p, h);
        for (int64_t e = begin; e < end; ++e) {
          sum[e] += grad[e];
        }
      }
    }
  });
}

// Heads [first, first + heads). Of small ones as many groups as all threads can take alike go whole
// to one thread each, which then finds a head's rows and edges in its cache for the second half;
// those that are left are cut by rows.
template <typename T, typename A = compute_t<T>>
void backward_heads(const Problem& p, const Inputs& in, const Gradients& to, int64_t first,
                    int64_t heads, const Kept<A>& kept) {
  const int64_t lanes = lane_count(p.bytes<T>(heads));
  const int64_t each =
      p.is_small<T>() && lanes <= kept.heads ? heads / kept.group / lanes * kept.group : 0;
  const int64_t whole = each * lanes, rest = heads - whole;
  if (each > 0) {
    for_lanes(lanes, [&](int64_t lane) {
      BackwardLane<T> work(p, in, to);
      EdgeGrad<A>* edges = kept.edges_of(p, lane);
      for (int64_t h = lane * each; h < (lane + 1) * each; ++h) {
        const int64_t place = h % kept.group;
        work.receivers(first + h, 0, p.receivers, edges, kept.bias_grad_of(p, h - place),
                       place != 0);
        work.senders(first + h, 0, p.senders, edges);
      }
    });
  }
  if (rest == 0) {
    return;
  }
  for_lanes(lanes, [&](int64_t lane) {
    BackwardLane<T> work(p, in, to);
    for_share(in.by_receiver, rest, lane, lanes, [&](int64_t h, int64_t begin, int64_t end) {
      work.receivers(first + whole + h, begin, end, kept.edges_of(p, h),
                     kept.bias_grad_of(p, whole + h), false);
    });
  });
  if (kept.group > 1) {
    sum_groups(p, kept, whole, heads);
  }
  for_lanes(lanes, [&](int64_t lane) {
    BackwardLane<T> work(p, in, to);
    for_share(in.by_sender, rest, lane, lanes, [&](int64_t h, int64_t begin, int64_t end) {
      work.senders(first + whole + h, begin, end, kept.edges_of(p, h));
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> circuit_attention_backward(
    const Tensor& grad_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    std::optional<Tensor> bias_any, const Tensor& out_any, const Tensor& lse_any,
    const Tensor& row_ptr_any, const Tensor& sender_any, const Tensor& col_ptr_any,
    const Tensor& receiver_any, const Tensor& edge_id_any, double scale, bool needs_bias) {
  const char* op = "circuit_attention_backward";
  const Problem p(op, check_circuit(op, q_any, k_any, v_any, bias_any, row_ptr_any, sender_any,
                                    col_ptr_any, receiver_any, edge_id_any, kMaxWidth));
  check_circuit_gradient(op, p, q_any, grad_any, out_any, lse_any);
  const ScalarType dtype = q_any.scalar_type(), wide = compute_dtype(dtype);
  const auto row_ptr = torch::stable::contiguous(row_ptr_any);
  const auto sender = torch::stable::contiguous(sender_any);
  const auto col_ptr = torch::stable::contiguous(col_ptr_any);
  const auto receiver = torch::stable::contiguous(receiver_any);
  const auto edge_id = torch::stable::contiguous(edge_id_any);
  const Inputs in{.grad = with_whole_rows(grad_any),
                  .q = with_whole_rows(q_any),
                  .k = with_whole_rows(k_any),
                  .v = with_whole_rows(v_any),
                  .lse = torch::stable::contiguous(lse_any),
                  .bias = contiguous(bias_any),
                  .by_receiver = p.side("row_ptr", row_ptr),
                  .by_sender = p.side("col_ptr", col_ptr),
                  .sender = p.index("sender", sender, p.senders),
                  .receiver = p.index("receiver", receiver, p.receivers),
                  .edge_id = p.index("edge_id", edge_id, p.edges),
                  .scale = scale};
  check_transpose(p, in);
  const Gradients to{.q = empty_heads(in.q), .k = empty_heads(in.k), .v = empty_heads(in.v)};
  needs_bias = needs_bias && in.bias;
  const std::vector<int64_t> none{0};
  Tensor bias_grad = new_zeros(in.q, needs_bias ? p.bias_sizes() : none, wide);
  dispatch_float(p.op, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = compute_t<T>;
    const int64_t all = p.all_heads();
    const int64_t fit = heads_that_fit(all, p.edges * int64_t{sizeof(EdgeGrad<A>)});
    const int64_t group = needs_bias ? group_size(p.heads, fit) : 1;
    const int64_t most = fit / group * group;
    const int64_t lanes = lane_count(p.bytes<T>(all));
    // Heads that are left over by whole groups are less than a group of each thread.
    const int64_t kept_heads = p.is_small<T>() ? std::min(most, lanes * group) : most;
    const Tensor edges = pooled_empty(in.lse, kept_heads, 2 * p.edges, wide);
    const Tensor bias_grads = pooled_empty(in.lse, needs_bias ? most : 0, p.edges, wide);
    const Kept<A> kept{.heads = kept_heads,
                       .group = group,
                       .edges = static_cast<EdgeGrad<A>*>(edges.mutable_data_ptr()),
                       .bias_grads = needs_bias ? mutable_data<A>(bias_grads) : nullptr};
    for (int64_t first = 0; first < all; first += most) {
      const int64_t heads = std::min(most, all - first);
      backward_heads<T>(p, in, to, first, heads, kept);
      if (needs_bias) {
        add_bias_grad(p, kept.bias_grads, first, heads, group, mutable_data<A>(bias_grad));
      }
    }
  });
  return {to.q, to.k, to.v, bias_grad};
}

}  // namespace m2mkd::cpu

STABLE_TORCH_LIBRARY_IMPL(m2mkd, CPU, m) {
  m.impl("circuit_attention", TORCH_BOX(&m2mkd::cpu::circuit_attention));
  m.impl("circuit_attention_backward", TORCH_BOX(&m2mkd::cpu::circuit_attention_backward));
}
