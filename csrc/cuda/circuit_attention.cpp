// Attention along a circuit's edges on CUDA: checks and allocation around the launchers. Graphs are
// not looked at here, which would wait for the device; `Circuit` checks them once.

#include "../circuit_arguments.h"
#include "common.h"

namespace m2mkd::cuda {

namespace {

// What a call is about, contiguous and checked.
struct Problem : CircuitSizes {
  Tensor q, k, v;
  std::optional<Tensor> bias;
  Tensor row_ptr, sender, col_ptr, receiver, edge_id;
};

Problem check_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                      const std::optional<Tensor>& bias, const Tensor& row_ptr,
                      const Tensor& sender, const Tensor& col_ptr, const Tensor& receiver,
                      const Tensor& edge_id) {
  const CircuitSizes sizes =
      check_circuit(op, q, k, v, bias, row_ptr, sender, col_ptr, receiver, edge_id, kMaxHeadWidth);
  // Loops run past the end by less than a block's warps, or a warp's lanes.
  for (const auto& [what, count] :
       {std::pair{"U", sizes.receivers}, std::pair{"V", sizes.senders}, std::pair{"N", sizes.edges},
        std::pair{"B*H", sizes.batch * sizes.heads}}) {
    check_int32_range(op, what, count + 32);
  }
  using torch::stable::contiguous;
  return {sizes,
          contiguous(q),
          contiguous(k),
          contiguous(v),
          m2mkd::contiguous(bias),
          contiguous(row_ptr),
          contiguous(sender),
          contiguous(col_ptr),
          contiguous(receiver),
          contiguous(edge_id)};
}

// The fields that the arguments of all launchers share.
template <typename Args>
Args launch_args(const Problem& p, double scale) {
  Args args{};
  args.q = read(p.q);
  args.k = read(p.k);
  args.v = read(p.v);
  args.bias = read(p.bias);
  args.bias_stride = p.own_biases ? p.edges : 0;
  args.row_ptr = read<int32_t>(p.row_ptr);
  args.sender = read<int32_t>(p.sender);
  args.scale = scale;
  args.batch = static_cast<int>(p.batch);
  args.heads = static_cast<int>(p.heads);
  args.receivers = static_cast<int>(p.receivers);
  args.senders = static_cast<int>(p.senders);
  args.edges = static_cast<int>(p.edges);
  args.width = static_cast<int>(p.width);
  return args;
}

}  // namespace

std::tuple<Tensor, Tensor> circuit_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             std::optional<Tensor> bias, const Tensor& row_ptr,
                                             const Tensor& sender, const Tensor& col_ptr,
                                             const Tensor& receiver, const Tensor& edge_id,
                                             double scale) {
  const char* op = "circuit_attention";
  const Problem p = check_problem(op, q, k, v, bias, row_ptr, sender, col_ptr, receiver, edge_id);
  const OnDevice device(q);
  const ScalarType dtype = q.scalar_type();
  Tensor out = new_empty(p.q, {p.batch, p.heads, p.receivers, p.width}, dtype);
  Tensor lse = new_empty(p.q, {p.batch, p.heads, p.receivers}, compute_dtype(dtype));
  auto args = launch_args<CircuitForward>(p, scale);
  args.out = write(out);
  args.lse = write(lse);
  check_launch(op, launch_circuit_forward(dtype_of(op, p.q), args, device.stream()));
  return {out, lse};
}

namespace {

// What backward reads besides the forward's inputs; launches ask for their pointers anew.
struct Saved {
  Tensor grad, out, lse, delta;
};

CircuitBackward backward_args(const Problem& p, const Saved& saved, double scale) {
  auto args = launch_args<CircuitBackward>(p, scale);
  args.grad = read(saved.grad);
  args.lse = read(saved.lse);
  args.col_ptr = read<int32_t>(p.col_ptr);
  args.receiver = read<int32_t>(p.receiver);
  args.edge_id = read<int32_t>(p.edge_id);
  return args;
}

// Writes delta and q_grad; returns the gradient of the biases, empty where not wanted. The launcher
// sums it over the heads of a part; parts, and examples where they share the biases, are added
// here.
Tensor receivers_backward(const char* op, const Problem& p, const Saved& saved, double scale,
                          bool needs_bias, const Tensor& q_grad, void* stream) {
  const ScalarType wide = compute_dtype(p.q.scalar_type());
  const DType dtype = dtype_of(op, p.q);
  auto args = backward_args(p, saved, scale);
  args.out = read(saved.out);
  args.delta = write(saved.delta);
  args.q_grad = write(q_grad);
  args.parts = args.heads;
  Tensor bias_grad = new_empty(p.q, {0}, wide);
  if (!needs_bias || !p.bias || p.batch * p.heads * p.edges == 0) {
    if (needs_bias && p.bias) {
      bias_grad = new_zeros(*p.bias, p.bias_sizes(), wide);
    }
    check_launch(op, launch_circuit_receivers(dtype, args, stream));
    return bias_grad;
  }
  args.parts = circuit_parts(dtype, args);
  bias_grad = new_empty(*p.bias, p.bias_sizes(), wide);
  const int64_t slices = p.batch * args.parts, sums = p.bias->dim() == 2 ? p.batch : 1;
  const bool summed = slices == sums;
  const Tensor terms = summed ? bias_grad : new_empty(*p.bias, {slices, p.edges}, wide);
  args.edge_grad = write(terms);
  check_launch(op, launch_circuit_receivers(dtype, args, stream));
  if (!summed) {
    check_launch(
        op, launch_sum_parts(dtype, read(terms), static_cast<int>(sums),
                             static_cast<int>(slices / sums), p.edges, write(bias_grad), stream));
  }
  return bias_grad;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> circuit_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
    std::optional<Tensor> bias, const Tensor& out, const Tensor& lse, const Tensor& row_ptr,
    const Tensor& sender, const Tensor& col_ptr, const Tensor& receiver, const Tensor& edge_id,
    double scale, bool needs_bias) {
  const char* op = "circuit_attention_backward";
  const Problem p = check_problem(op, q, k, v, bias, row_ptr, sender, col_ptr, receiver, edge_id);
  const OnDevice device(q);
  const ScalarType dtype = q.scalar_type();
  const std::vector<int64_t> rows{p.batch, p.heads, p.receivers, p.width};
  const std::vector<int64_t> values{p.batch, p.heads, p.receivers};
  check_circuit_gradient(op, p, q, grad, out, lse);
  using torch::stable::contiguous;
  const Saved saved{contiguous(grad), contiguous(out), contiguous(lse),
                    new_empty(lse, values, compute_dtype(dtype))};
  Tensor q_grad = new_empty(p.q, rows, dtype);
  Tensor k_grad = new_empty(p.k, {p.batch, p.heads, p.senders, p.width}, dtype);
  Tensor v_grad = new_empty(p.v, {p.batch, p.heads, p.senders, p.width}, dtype);
  const Tensor bias_grad =
      receivers_backward(op, p, saved, scale, needs_bias, q_grad, device.stream());
  auto args = backward_args(p, saved, scale);
  args.delta = const_cast<void*>(read(saved.delta));
  args.k_grad = write(k_grad);
  args.v_grad = write(v_grad);
  check_launch(op, launch_circuit_senders(dtype_of(op, p.q), args, device.stream()));
  return {q_grad, k_grad, v_grad, bias_grad};
}

}  // namespace m2mkd::cuda

M2MKD_CUDA_OPS(m) {
  m.impl("circuit_attention", TORCH_BOX(&m2mkd::cuda::circuit_attention));
  m.impl("circuit_attention_backward", TORCH_BOX(&m2mkd::cuda::circuit_attention_backward));
}
