// Gate, plan, gather and combine on CUDA: checks and allocation around the launchers. Values of
// plans are not looked at here, which would wait for the device; m2mkd.ops checks experts.

#include "../moe_arguments.h"
#include "common.h"

namespace m2mkd::cuda {

std::tuple<Tensor, Tensor> topk_gate(const Tensor& logits_any, int64_t k, std::string mode) {
  const char* op = "topk_gate";
  check_rank(op, "logits", logits_any, 2);
  const int64_t tokens = logits_any.size(0), experts = logits_any.size(1);
  check_k(op, k, experts);
  const OnDevice device(logits_any);
  const Tensor logits = torch::stable::contiguous(logits_any);
  Tensor weights = new_empty(logits, {tokens, k}, logits.scalar_type());
  Tensor chosen = new_empty(logits, {tokens, k}, ScalarType::Int);
  check_launch(op, launch_topk_gate(dtype_of(op, logits), read(logits), to_int(op, "T", tokens),
                                    to_int(op, "E", experts), static_cast<int>(k),
                                    parse_gate_mode<GateMode>(op, mode), write(weights),
                                    write<int32_t>(chosen), device.stream()));
  return {weights, chosen};
}

Tensor topk_gate_backward(const Tensor& grad, const Tensor& logits, const Tensor& chosen,
                          std::string mode) {
  const char* op = "topk_gate_backward";
  const GateGradient a = check_gate_gradient(op, grad, logits, chosen);
  const OnDevice device(a.logits);
  Tensor result = new_empty(a.logits, {a.tokens, a.experts}, a.logits.scalar_type());
  check_launch(op, launch_topk_gate_backward(dtype_of(op, a.logits), read(a.grad), read(a.logits),
                                             read<int32_t>(a.chosen), to_int(op, "T", a.tokens),
                                             to_int(op, "E", a.experts), to_int(op, "K", a.k),
                                             parse_gate_mode<GateMode>(op, mode), write(result),
                                             device.stream()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> moe_plan(const Tensor& chosen, std::optional<Tensor> order,
                                            int64_t experts, std::optional<int64_t> capacity) {
  const char* op = "moe_plan";
  const Choices a = check_choices(op, chosen, order, experts, capacity);
  STD_TORCH_CHECK(experts <= kMaxExperts, op, ": ", experts, " experts, at most ", kMaxExperts,
                  " on CUDA");
  const OnDevice device(a.chosen);
  const int64_t blocks = (a.total + kPlanBlock - 1) / kPlanBlock;
  Tensor row_of = new_empty(a.chosen, {a.tokens, a.k}, ScalarType::Int);
  Tensor token_of = new_empty(a.chosen, {a.rows}, ScalarType::Int);
  Tensor offsets = new_empty(a.chosen, {experts + 1}, ScalarType::Int);
  const Tensor counts = new_empty(a.chosen, {blocks, experts}, ScalarType::Int);
  check_launch(
      op, launch_moe_plan(read<int32_t>(a.chosen), read<int64_t>(a.order),
                          static_cast<int>(a.tokens), static_cast<int>(a.k),
                          static_cast<int>(experts), capacity ? static_cast<int>(a.limit) : -1,
                          static_cast<int>(a.rows), write<int32_t>(counts), write<int32_t>(row_of),
                          write<int32_t>(token_of), write<int32_t>(offsets), device.stream()));
  return {row_of, token_of, offsets};
}

Tensor moe_gather(const Tensor& x, const Tensor& row_of, const Tensor& token_of) {
  const char* op = "moe_gather";
  const Gathering a = check_gather(op, x, row_of, token_of);
  const OnDevice device(a.x);
  Tensor out = new_empty(a.x, {a.rows, a.width}, a.x.scalar_type());
  check_launch(op, launch_gather(dtype_of(op, a.x), read(a.x), read<int32_t>(a.token_of),
                                 to_int(op, "M", a.rows), to_int(op, "D", a.width), write(out),
                                 device.stream()));
  return out;
}

namespace {

Tensor sum_rows(const char* op, const Tensor& rows, const std::optional<Tensor>& weights,
                const Tensor& row_of) {
  const TokenRows a = check_token_rows(op, rows, weights, row_of);
  const OnDevice device(a.rows);
  Tensor out = new_empty(a.rows, {a.tokens, a.width}, a.rows.scalar_type());
  check_launch(op, launch_sum_rows(dtype_of(op, a.rows), read(a.rows), read<int32_t>(a.row_of),
                                   read(a.weights), to_int(op, "T", a.tokens), to_int(op, "K", a.k),
                                   to_int(op, "D", a.width), write(out), device.stream()));
  return out;
}

}  // namespace

Tensor moe_gather_backward(const Tensor& grad, const Tensor& row_of) {
  return sum_rows("moe_gather_backward", grad, std::nullopt, row_of);
}

Tensor moe_combine(const Tensor& rows, const Tensor& weights, const Tensor& row_of) {
  return sum_rows("moe_combine", rows, weights, row_of);
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& grad_any, const Tensor& rows,
                                                const Tensor& weights, const Tensor& row_of) {
  const char* op = "moe_combine_backward";
  const TokenRows a = check_token_rows(op, rows, weights, row_of);
  const OnDevice device(a.rows);
  const Tensor grad = check_token_grad(op, a, grad_any);
  Tensor grad_rows = new_zeros(a.rows, {a.rows.size(0), a.width}, a.rows.scalar_type());
  Tensor grad_weights = new_empty(*a.weights, {a.tokens, a.k}, a.weights->scalar_type());
  check_launch(
      op, launch_combine_backward(dtype_of(op, a.rows), read(grad), read(a.rows), read(a.weights),
                                  read<int32_t>(a.row_of), static_cast<int>(a.tokens),
                                  static_cast<int>(a.k), to_int(op, "D", a.width),
                                  update(grad_rows), write(grad_weights), device.stream()));
  return {grad_rows, grad_weights};
}

}  // namespace m2mkd::cuda

M2MKD_CUDA_OPS(m) {
  m.impl("topk_gate", TORCH_BOX(&m2mkd::cuda::topk_gate));
  m.impl("topk_gate_backward", TORCH_BOX(&m2mkd::cuda::topk_gate_backward));
  m.impl("moe_plan", TORCH_BOX(&m2mkd::cuda::moe_plan));
  m.impl("moe_gather", TORCH_BOX(&m2mkd::cuda::moe_gather));
  m.impl("moe_gather_backward", TORCH_BOX(&m2mkd::cuda::moe_gather_backward));
  m.impl("moe_combine", TORCH_BOX(&m2mkd::cuda::moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&m2mkd::cuda::moe_combine_backward));
}
