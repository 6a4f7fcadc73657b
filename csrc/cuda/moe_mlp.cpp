// Expert layers on CUDA: torch's GEMMs, with one kernel for bias and activation and one for all of
// their backward. Rows past the last offset are zeroed wherever a later step could read them.

#include "../moe_arguments.h"
#include "common.h"

namespace m2mkd::cuda {

namespace {

// out = act(z + bias); zeros on padding rows. May be in place.
void activate(const char* op, Activation act, const Tensor& z, const std::optional<Tensor>& bias,
              const Tensor& offsets, const Tensor& out, void* stream) {
  check_launch(op,
               launch_activate(dtype_of(op, z), act, read(z), read(bias), read<int32_t>(offsets),
                               static_cast<int>(offsets.size(0)) - 1, to_int(op, "M", z.size(0)),
                               to_int(op, "width", z.size(1)), write(out), stream));
}

Tensor sum_columns(const char* op, const Tensor& rows, const std::optional<Tensor>& scale,
                   const Tensor& offsets, void* stream) {
  const int64_t experts = offsets.size(0) - 1, count = rows.size(0), width = rows.size(1);
  const int64_t chunks = (count + kColumnChunk - 1) / kColumnChunk;
  const Tensor partial =
      new_empty(rows, {chunks + experts, width}, compute_dtype(rows.scalar_type()));
  Tensor out = new_empty(rows, {experts, width}, rows.scalar_type());
  check_launch(
      op, launch_sum_columns(dtype_of(op, rows), read(rows), read(scale), read<int32_t>(offsets),
                             to_int(op, "E", experts), to_int(op, "M", count),
                             to_int(op, "width", width), update(partial), write(out), stream));
  return out;
}

Tensor gather(const char* op, const Tensor& x, const Tensor& token_of, void* stream) {
  Tensor out = new_empty(x, {token_of.size(0), x.size(1)}, x.scalar_type());
  check_launch(op, launch_gather(dtype_of(op, x), read(x), read<int32_t>(token_of),
                                 to_int(op, "M", token_of.size(0)), to_int(op, "D", x.size(1)),
                                 write(out), stream));
  return out;
}

Tensor sum_rows(const char* op, const Tensor& rows, const Tensor& row_of,
                const std::optional<Tensor>& weights, void* stream) {
  const int64_t tokens = row_of.size(0);
  Tensor out = new_empty(rows, {tokens, rows.size(1)}, rows.scalar_type());
  check_launch(op,
               launch_sum_rows(dtype_of(op, rows), read(rows), read<int32_t>(row_of), read(weights),
                               to_int(op, "T", tokens), to_int(op, "K", row_of.size(1)),
                               to_int(op, "D", rows.size(1)), write(out), stream));
  return out;
}

}  // namespace

Tensor grouped_linear(const Tensor& rows, const Tensor& weight, std::optional<Tensor> bias_any,
                      const Tensor& offsets) {
  const char* op = "grouped_linear";
  const Grouped a = check_grouped(op, rows, weight, offsets);
  const std::optional<Tensor> bias = check_bias(op, "bias", bias_any, a.experts, a.out, a.rows);
  const OnDevice device(a.rows);
  const ExpertGemm gemm(op, a.rows, a.offsets, a.in, a.out, device.stream());
  const Tensor out = gemm.rows_by_matrix(a.rows, a.weight, true);
  activate(op, Activation::identity, out, bias, a.offsets, out, device.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(const Tensor& grad_any,
                                                           const Tensor& rows, const Tensor& weight,
                                                           const Tensor& offsets, bool needs_rows,
                                                           bool needs_weight) {
  const char* op = "grouped_linear_backward";
  const Grouped a = check_grouped(op, rows, weight, offsets);
  const ScalarType dtype = a.rows.scalar_type();
  const OnDevice device(a.rows);
  const Tensor grad = check_grouped_grad(op, a, grad_any);
  const ExpertGemm gemm(op, a.rows, a.offsets, a.in, a.out, device.stream());
  Tensor rows_grad = new_empty(a.rows, {0, a.in}, dtype);
  Tensor weight_grad = new_empty(a.rows, {0, a.out, a.in}, dtype);
  Tensor bias_grad = new_empty(a.rows, {0, a.out}, dtype);
  if (needs_rows) {
    rows_grad = gemm.rows_by_matrix(grad, a.weight, false);
    activate(op, Activation::identity, rows_grad, std::nullopt, a.offsets, rows_grad,
             device.stream());
  }
  if (needs_weight) {
    weight_grad = gemm.rows_by_rows(grad, a.rows);
    bias_grad = sum_columns(op, grad, std::nullopt, a.offsets, device.stream());
  }
  return {rows_grad, weight_grad, bias_grad};
}

namespace {

// Gradient of the pre-activation in place of hidden_grad; gate gradients; weighted activations.
void activate_backward(const char* op, const MlpTensors& a, Activation act, const Tensor& z,
                       const Tensor& upstream, const Tensor& hidden_grad,
                       const std::optional<Tensor>& weighted, const Tensor& weight_of,
                       const Tensor& choice_of, const Tensor& gate_grad, void* stream) {
  ActivateBackward args{};
  args.z = read(z);
  args.fc1_bias = read(a.fc1_bias);
  args.fc2_bias = read(a.fc2_bias);
  args.upstream = read(upstream);
  args.hidden_grad = update(hidden_grad);
  args.weighted = write(weighted);
  args.weight_of = read(weight_of);
  args.choice_of = read<int32_t>(choice_of);
  args.gate_grad = update(gate_grad);
  args.offsets = read<int32_t>(a.offsets);
  args.experts = to_int(op, "E", a.experts);
  args.rows = to_int(op, "M", a.rows);
  args.hidden = to_int(op, "H", a.hidden);
  args.width = to_int(op, "D", a.width);
  check_launch(op, launch_activate_backward(dtype_of(op, z), act, args, stream));
}

}  // namespace

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& weights, const Tensor& row_of,
                                   const Tensor& token_of, const Tensor& offsets,
                                   const Tensor& fc1_weight, std::optional<Tensor> fc1_bias,
                                   const Tensor& fc2_weight, std::optional<Tensor> fc2_bias,
                                   std::string activation, bool save) {
  const char* op = "moe_mlp";
  const MlpTensors a = check_mlp(op, x, weights, row_of, token_of, offsets, fc1_weight, fc1_bias,
                                 fc2_weight, fc2_bias);
  const OnDevice device(x);
  const auto act = parse_activation<Activation>(op, activation);
  const ScalarType dtype = a.dtype;
  const Tensor inputs = gather(op, a.x, a.token_of, device.stream());
  const ExpertGemm gemm(op, inputs, a.offsets, a.width, a.hidden, device.stream());
  const Tensor z = gemm.rows_by_matrix(inputs, a.fc1_weight, true);
  const Tensor active = save ? new_empty(a.x, {a.rows, a.hidden}, dtype) : z;
  activate(op, act, z, a.fc1_bias, a.offsets, active, device.stream());
  const Tensor outputs = gemm.rows_by_matrix(active, a.fc2_weight, true);
  if (a.fc2_bias) {
    activate(op, Activation::identity, outputs, a.fc2_bias, a.offsets, outputs, device.stream());
  }
  const Tensor out = sum_rows(op, outputs, a.row_of, a.weights, device.stream());
  return {out, save ? z : new_empty(a.x, {0, a.hidden}, dtype)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(
    const Tensor& grad_any, const Tensor& hidden, const Tensor& x, const Tensor& weights,
    const Tensor& row_of, const Tensor& token_of, const Tensor& offsets, const Tensor& fc1_weight,
    std::optional<Tensor> fc1_bias, const Tensor& fc2_weight, std::optional<Tensor> fc2_bias,
    std::string activation, bool needs_x, bool needs_fc1, bool needs_fc2) {
  const char* op = "moe_mlp_backward";
  const MlpTensors a = check_mlp(op, x, weights, row_of, token_of, offsets, fc1_weight, fc1_bias,
                                 fc2_weight, fc2_bias);
  const OnDevice device(x);
  const auto act = parse_activation<Activation>(op, activation);
  const ScalarType dtype = a.dtype;
  check_mlp_gradient(op, a, grad_any, hidden);
  void* stream = device.stream();
  const Tensor grad = torch::stable::contiguous(grad_any);
  const Tensor upstream = gather(op, grad, a.token_of, stream);
  const ExpertGemm gemm(op, upstream, a.offsets, a.width, a.hidden, stream);
  const bool recompute = hidden.size(0) == 0;
  std::optional<Tensor> inputs;
  if (needs_fc1 || recompute) {
    inputs = gather(op, a.x, a.token_of, stream);
  }
  const Tensor z = recompute ? gemm.rows_by_matrix(*inputs, a.fc1_weight, true)
                             : torch::stable::contiguous(hidden);

  Tensor choice_of = new_empty(a.row_of, {a.rows}, ScalarType::Int);
  torch::stable::fill_(choice_of, -1);
  const Tensor weight_of = new_zeros(a.weights, {a.rows}, a.weights.scalar_type());
  check_launch(op, launch_invert_rows(dtype_of(op, a.x), read<int32_t>(a.row_of), read(a.weights),
                                      static_cast<int>(a.tokens * a.k), update<int32_t>(choice_of),
                                      update(weight_of), stream));

  const Tensor hidden_grad = gemm.rows_by_matrix(upstream, a.fc2_weight, false);
  const Tensor gate_grad = new_zeros(a.weights, {a.tokens, a.k}, a.weights.scalar_type());
  std::optional<Tensor> weighted;
  if (needs_fc2) {
    weighted = new_empty(a.x, {a.rows, a.hidden}, dtype);
  }
  activate_backward(op, a, act, z, upstream, hidden_grad, weighted, weight_of, choice_of, gate_grad,
                    stream);

  Tensor x_grad = new_empty(a.x, {0, a.width}, dtype);
  Tensor fc1_grad = new_empty(a.x, {0, a.hidden, a.width}, dtype);
  Tensor fc1_bias_grad = new_empty(a.x, {0, a.hidden}, dtype);
  Tensor fc2_grad = new_empty(a.x, {0, a.width, a.hidden}, dtype);
  Tensor fc2_bias_grad = new_empty(a.x, {0, a.width}, dtype);
  if (needs_fc2) {
    fc2_grad = gemm.rows_by_rows(upstream, *weighted);
    fc2_bias_grad = sum_columns(op, upstream, weight_of, a.offsets, stream);
  }
  if (needs_fc1) {
    fc1_grad = gemm.rows_by_rows(hidden_grad, *inputs);
    fc1_bias_grad = sum_columns(op, hidden_grad, std::nullopt, a.offsets, stream);
  }
  if (needs_x) {
    const Tensor input_grad = gemm.rows_by_matrix(hidden_grad, a.fc1_weight, false);
    x_grad = sum_rows(op, input_grad, a.row_of, std::nullopt, stream);
  }
  return {x_grad, gate_grad, fc1_grad, fc1_bias_grad, fc2_grad, fc2_bias_grad};
}

}  // namespace m2mkd::cuda

M2MKD_CUDA_OPS(m) {
  m.impl("grouped_linear", TORCH_BOX(&m2mkd::cuda::grouped_linear));
  m.impl("grouped_linear_backward", TORCH_BOX(&m2mkd::cuda::grouped_linear_backward));
  m.impl("moe_mlp", TORCH_BOX(&m2mkd::cuda::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&m2mkd::cuda::moe_mlp_backward));
}
