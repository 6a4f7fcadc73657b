// Attention along a circuit's edges on the CPU. Each receiver (forward, gradient of q) and each
// sender (gradients of k and v) is one thread's work in a fixed order, so results do not depend on
// the number of threads.
//
// Memory beyond the results: 8 bytes (float64: 16) per edge and head in the backward pass, for as
// many heads at a time as fit into 32 MiB, and for at least one; and for half types, and widths
// that are not whole packs of 64 bytes, each thread's copies of the rows of the head it works on.
//
// Letters: B batch, H heads, U receivers, V senders, D head width, N edges.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "../checks.h"
#include "../plan.h"
#include "circuit_rows.h"
#include "parallel.h"
#include "pool.h"

namespace m2mkd::cpu {

namespace {

// Backward keeps two numbers per edge for as many heads at once as fit here, and for at least one.
constexpr int64_t kEdgeBytes = int64_t{32} << 20;

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

// Rows as the kernels take them: the tensor's own memory, or one lane's copy where they must be
// widened or filled up to whole packs.
template <typename T>
class Rows {
 public:
  using A = compute_t<T>;

  Rows(int64_t most, int64_t width) : width_(width), stride_(packs(width) * kPack<A>) {
    if (!in_place()) {
      copy_ = std::make_unique_for_overwrite<A[]>(most * stride_);
    }
  }

  static int64_t packs(int64_t width) { return (width + kPack<A> - 1) / kPack<A>; }

  const A* read(const T* rows, int64_t n) {
    if constexpr (std::is_same_v<T, A>) {
      if (in_place()) {
        return rows;
      }
    }
    widen(rows, copy_.get(), n, width_, stride_);
    return copy_.get();
  }

  // Where to write what `written` then puts into rows.
  A* target(T* rows) {
    if constexpr (std::is_same_v<T, A>) {
      if (in_place()) {
        return rows;
      }
    }
    return copy_.get();
  }

  void written(T* rows, int64_t n) {
    if (!in_place()) {
      narrow(copy_.get(), rows, n, width_, stride_);
    }
  }

 private:
  bool in_place() const { return std::is_same_v<T, A> && width_ == stride_; }

  int64_t width_;
  int64_t stride_;
  std::unique_ptr<A[]> copy_;
};

// Sizes of one call, and its graph. Construction checks everything that is read.
struct Problem {
  const char* op;
  int64_t batch, heads, receivers, senders, width, edges;
  std::vector<int64_t> bias_sizes;
  int64_t bias_stride = 0;  // between examples; 0 where all share one bias

  Problem(const char* name, const Tensor& q, const Tensor& k, const Tensor& v,
          const std::optional<Tensor>& bias, const Tensor& row_ptr, const Tensor& col_ptr,
          const Tensor& sender)
      : op(name) {
    check_rank(op, "q", q, 4);
    check_rank(op, "k", k, 4);
    check_rank(op, "row_ptr", row_ptr, 1);
    check_rank(op, "col_ptr", col_ptr, 1);
    check_rank(op, "sender", sender, 1);
    batch = q.size(0), heads = q.size(1), receivers = q.size(2), width = q.size(3);
    senders = k.size(2), edges = sender.size(0);
    STD_TORCH_CHECK(width >= 1 && width <= kMaxWidth, op, ": head width is ", width,
                    ", outside [1, ", kMaxWidth, "]");
    check_shape(op, "k", k, {batch, heads, senders, width});
    check_shape(op, "v", v, {batch, heads, senders, width});
    check_dtype(op, "k", k, q.scalar_type());
    check_dtype(op, "v", v, q.scalar_type());
    check_shape(op, "row_ptr", row_ptr, {receivers + 1});
    check_shape(op, "col_ptr", col_ptr, {senders + 1});
    for (const auto& [what, count] :
         {std::pair{"U", receivers + 1}, std::pair{"V", senders + 1}, std::pair{"N", edges}}) {
      check_int32_range(op, what, count);
    }
    if (bias) {
      bias_sizes = bias->dim() == 1 ? std::vector{edges} : std::vector{batch, edges};
      bias_stride = bias->dim() == 1 ? 0 : edges;
      check_dtype(op, "bias", *bias, compute_dtype(q.scalar_type()));
      check_shape(op, "bias", *bias, bias_sizes);
    }
  }

  Side side(const char* name, const Tensor& ptr) const {
    check_dtype(op, name, ptr, ScalarType::Int);
    const int32_t* data = const_data<int32_t>(ptr);
    const int64_t rows = ptr.size(0) - 1;
    STD_TORCH_CHECK(data[0] == 0 && data[rows] == edges && std::is_sorted(data, data + rows + 1),
                    op, ": ", name, " must rise from 0 to the ", edges, " edges");
    return {data, rows};
  }

  const int32_t* index(const char* name, const Tensor& tensor, int64_t bound) const {
    check_shape(op, name, tensor, {edges});
    check_dtype(op, name, tensor, ScalarType::Int);
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
};

int64_t largest_degree(const Side& side) {
  int64_t most = 0;
  for (int64_t r = 0; r < side.rows; ++r) {
    most = std::max<int64_t>(most, side.ptr[r + 1] - side.ptr[r]);
  }
  return most;
}

// Edges' gradients summed over the heads that share a bias, head after head.
template <typename A>
void add_bias_grad(A* bias_grad, const EdgeGrad<A>* edges, int64_t count, int64_t heads,
                   int64_t first_head, const Problem& p) {
  parallel_items(count, heads * int64_t{sizeof(EdgeGrad<A>)}, [&](int64_t begin, int64_t end) {
    for (int64_t h = 0; h < heads; ++h) {
      A* sum = bias_grad + (first_head + h) / p.heads * p.bias_stride;
      const EdgeGrad<A>* edge = edges + h * count;
      for (int64_t e = begin; e < end; ++e) {
        sum[e] += edge[e].score;
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> circuit_attention(const Tensor& q_any, const Tensor& k_any,
                                             const Tensor& v_any, std::optional<Tensor> bias_any,
                                             const Tensor& row_ptr_any, const Tensor& sender_any,
                                             const Tensor& col_ptr, const Tensor&, const Tensor&,
                                             double scale) {
  const Problem p("circuit_attention", q_any, k_any, v_any, bias_any, row_ptr_any, col_ptr,
                  sender_any);
  const Tensor q = torch::stable::contiguous(q_any);
  const Tensor k = torch::stable::contiguous(k_any);
  const Tensor v = torch::stable::contiguous(v_any);
  const std::optional<Tensor> bias = contiguous(bias_any);
  const Tensor row_ptr = torch::stable::contiguous(row_ptr_any);
  const Tensor sender = torch::stable::contiguous(sender_any);
  const Side side = p.side("row_ptr", row_ptr);
  const int32_t* senders = p.index("sender", sender, p.senders);
  Tensor out = pooled_empty(q, {p.batch, p.heads, p.receivers, p.width}, q.scalar_type());
  Tensor lse = new_empty(q, {p.batch, p.heads, p.receivers}, compute_dtype(q.scalar_type()));
  if (lse.numel() == 0) {
    return {out, lse};
  }
  const int64_t degree = largest_degree(side);
  dispatch_float(p.op, q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = compute_t<T>;
    const int64_t receiver_numbers = p.receivers * p.width, sender_numbers = p.senders * p.width;
    parallel_lanes(p.bytes<T>(p.all_heads()), [&](int64_t lane, int64_t lanes) {
      Rows<T> q_rows(p.receivers, p.width), out_rows(p.receivers, p.width);
      Rows<T> k_rows(p.senders, p.width), v_rows(p.senders, p.width);
      std::vector<A> scores(scores_room<A>(degree));
      for_share(side, p.all_heads(), lane, lanes, [&](int64_t head, int64_t begin, int64_t end) {
        const int64_t first = head * receiver_numbers + begin * p.width;
        T* target = mutable_data<T>(out) + first;
        attend(ForwardHead<A>{
            .q = q_rows.read(const_data<T>(q) + first, end - begin),
            .k = k_rows.read(const_data<T>(k) + head * sender_numbers, p.senders),
            .v = v_rows.read(const_data<T>(v) + head * sender_numbers, p.senders),
            .bias = bias ? const_data<A>(*bias) + head / p.heads * p.bias_stride : nullptr,
            .row_ptr = side.ptr,
            .sender = senders,
            .begin = begin,
            .end = end,
            .packs = Rows<T>::packs(p.width),
            .scale = static_cast<A>(scale),
            .scores = scores.data(),
            .out = out_rows.target(target),
            .lse = mutable_data<A>(lse) + head * p.receivers + begin,
        });
        out_rows.written(target, end - begin);
      });
    });
  });
  return {out, lse};
}

namespace {

// The contiguous inputs of a backward call.
struct Inputs {
  Tensor grad, q, k, v, lse;
  std::optional<Tensor> bias;
  Side by_receiver, by_sender;
  const int32_t *sender, *receiver, *edge_id;
  double scale;
};

// Gradient of q, and of every edge, for heads [first, first + heads).
template <typename T, typename A = compute_t<T>>
void receiver_pass(const Problem& p, const Inputs& in, int64_t first_head, int64_t heads,
                   EdgeGrad<A>* edges, const Tensor& q_grad) {
  const int64_t room = scores_room<A>(largest_degree(in.by_receiver));
  const int64_t receiver_numbers = p.receivers * p.width, sender_numbers = p.senders * p.width;
  parallel_lanes(p.bytes<T>(heads), [&](int64_t lane, int64_t lanes) {
    Rows<T> q(p.receivers, p.width), grad(p.receivers, p.width), result(p.receivers, p.width);
    Rows<T> k(p.senders, p.width), v(p.senders, p.width);
    std::vector<A> weights(room), slopes(room);
    for_share(in.by_receiver, heads, lane, lanes, [&](int64_t h, int64_t begin, int64_t end) {
      const int64_t head = first_head + h;
      const int64_t first = head * receiver_numbers + begin * p.width;
      const int64_t count = end - begin;
      T* target = mutable_data<T>(q_grad) + first;
      attend_backward(ReceiverGrad<A>{
          .q = q.read(const_data<T>(in.q) + first, count),
          .k = k.read(const_data<T>(in.k) + head * sender_numbers, p.senders),
          .v = v.read(const_data<T>(in.v) + head * sender_numbers, p.senders),
          .grad = grad.read(const_data<T>(in.grad) + first, count),
          .lse = const_data<A>(in.lse) + head * p.receivers + begin,
          .bias = in.bias ? const_data<A>(*in.bias) + head / p.heads * p.bias_stride : nullptr,
          .row_ptr = in.by_receiver.ptr,
          .sender = in.sender,
          .begin = begin,
          .end = end,
          .packs = Rows<T>::packs(p.width),
          .scale = static_cast<A>(in.scale),
          .weights = weights.data(),
          .slopes = slopes.data(),
          .q_grad = result.target(target),
          .edges = edges + h * p.edges,
      });
      result.written(target, count);
    });
  });
}

// Gradients of k and v for heads [first, first + heads).
template <typename T, typename A = compute_t<T>>
void sender_pass(const Problem& p, const Inputs& in, int64_t first_head, int64_t heads,
                 const EdgeGrad<A>* edges, const Tensor& k_grad, const Tensor& v_grad) {
  const int64_t receiver_numbers = p.receivers * p.width, sender_numbers = p.senders * p.width;
  parallel_lanes(p.bytes<T>(heads), [&](int64_t lane, int64_t lanes) {
    Rows<T> q(p.receivers, p.width), grad(p.receivers, p.width);
    Rows<T> k_result(p.senders, p.width), v_result(p.senders, p.width);
    for_share(in.by_sender, heads, lane, lanes, [&](int64_t h, int64_t begin, int64_t end) {
      const int64_t head = first_head + h;
      const int64_t first = head * sender_numbers + begin * p.width;
      const int64_t count = end - begin;
      T* k_target = mutable_data<T>(k_grad) + first;
      T* v_target = mutable_data<T>(v_grad) + first;
      attend_backward(SenderGrad<A>{
          .q = q.read(const_data<T>(in.q) + head * receiver_numbers, p.receivers),
          .grad = grad.read(const_data<T>(in.grad) + head * receiver_numbers, p.receivers),
          .edges = edges + h * p.edges,
          .col_ptr = in.by_sender.ptr,
          .receiver = in.receiver,
          .edge_id = in.edge_id,
          .begin = begin,
          .end = end,
          .packs = Rows<T>::packs(p.width),
          .scale = static_cast<A>(in.scale),
          .k_grad = k_result.target(k_target),
          .v_grad = v_result.target(v_target),
      });
      k_result.written(k_target, count);
      v_result.written(v_target, count);
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> circuit_attention_backward(
    const Tensor& grad_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    std::optional<Tensor> bias_any, const Tensor& out_any, const Tensor& lse_any,
    const Tensor& row_ptr_any, const Tensor& sender_any, const Tensor& col_ptr_any,
    const Tensor& receiver_any, const Tensor& edge_id_any, double scale, bool needs_bias) {
  const Problem p("circuit_attention_backward", q_any, k_any, v_any, bias_any, row_ptr_any,
                  col_ptr_any, sender_any);
  const ScalarType dtype = q_any.scalar_type(), wide = compute_dtype(dtype);
  for (const auto& [name, tensor] : {std::pair{"grad", &grad_any}, std::pair{"out", &out_any}}) {
    check_shape(p.op, name, *tensor, {p.batch, p.heads, p.receivers, p.width});
    check_dtype(p.op, name, *tensor, dtype);
  }
  check_shape(p.op, "lse", lse_any, {p.batch, p.heads, p.receivers});
  check_dtype(p.op, "lse", lse_any, wide);
  const auto row_ptr = torch::stable::contiguous(row_ptr_any);
  const auto sender = torch::stable::contiguous(sender_any);
  const auto col_ptr = torch::stable::contiguous(col_ptr_any);
  const auto receiver = torch::stable::contiguous(receiver_any);
  const auto edge_id = torch::stable::contiguous(edge_id_any);
  const Inputs in{.grad = torch::stable::contiguous(grad_any),
                  .q = torch::stable::contiguous(q_any),
                  .k = torch::stable::contiguous(k_any),
                  .v = torch::stable::contiguous(v_any),
                  .lse = torch::stable::contiguous(lse_any),
                  .bias = contiguous(bias_any),
                  .by_receiver = p.side("row_ptr", row_ptr),
                  .by_sender = p.side("col_ptr", col_ptr),
                  .sender = p.index("sender", sender, p.senders),
                  .receiver = p.index("receiver", receiver, p.receivers),
                  .edge_id = p.index("edge_id", edge_id, p.edges),
                  .scale = scale};
  Tensor q_grad = pooled_empty(in.q, {p.batch, p.heads, p.receivers, p.width}, dtype);
  Tensor k_grad = pooled_empty(in.q, {p.batch, p.heads, p.senders, p.width}, dtype);
  Tensor v_grad = pooled_empty(in.q, {p.batch, p.heads, p.senders, p.width}, dtype);
  needs_bias = needs_bias && in.bias;
  const std::vector<int64_t> none{0};
  Tensor bias_grad = new_zeros(in.q, needs_bias ? p.bias_sizes : none, wide);
  dispatch_float(p.op, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = compute_t<T>;
    const int64_t all = p.all_heads(), head_bytes = p.edges * int64_t{sizeof(EdgeGrad<A>)};
    const int64_t most = std::clamp<int64_t>(kEdgeBytes / std::max<int64_t>(1, head_bytes), 1,
                                             std::max<int64_t>(1, all));
    const Tensor kept = pooled_empty(in.lse, most, 2 * p.edges, wide);
    auto* edges = static_cast<EdgeGrad<A>*>(kept.mutable_data_ptr());
    for (int64_t first = 0; first < all; first += most) {
      const int64_t heads = std::min(most, all - first);
      if (p.receivers > 0) {
        receiver_pass<T>(p, in, first, heads, edges, q_grad);
      }
      if (p.senders > 0) {
        sender_pass<T>(p, in, first, heads, edges, k_grad, v_grad);
      }
      if (needs_bias) {
        add_bias_grad(mutable_data<A>(bias_grad), edges, p.edges, heads, first, p);
      }
    }
  });
  return {q_grad, k_grad, v_grad, bias_grad};
}

}  // namespace m2mkd::cpu

STABLE_TORCH_LIBRARY_IMPL(m2mkd, CPU, m) {
  m.impl("circuit_attention", TORCH_BOX(&m2mkd::cpu::circuit_attention));
  m.impl("circuit_attention_backward", TORCH_BOX(&m2mkd::cpu::circuit_attention_backward));
}
