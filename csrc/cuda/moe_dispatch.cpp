// Gate, plan, gather and combine on CUDA: checks and allocation around the launchers. Values of
// plans are not looked at here, which would wait for the device; m2mkd.ops checks experts.

#include "common.h"

namespace m2mkd::cuda {

namespace {

GateMode parse_mode(const char* op, const std::string& mode) {
  if (mode == "softmax_selected") {
    return GateMode::selected;
  }
  if (mode == "softmax_all") {
    return GateMode::all;
  }
  STD_TORCH_CHECK(mode == "softmax_all_renorm", op, ": unknown mode ", mode);
  return GateMode::all_renorm;
}

}  // namespace

std::tuple<Tensor, Tensor> topk_gate(const Tensor& logits_any, int64_t k, std::string mode) {
  const char* op = "topk_gate";
  check_rank(op, "logits", logits_any, 2);
  const int64_t tokens = logits_any.size(0), experts = logits_any.size(1);
  STD_TORCH_CHECK(k >= 1 && k <= experts, op, ": k=", k, " with ", experts, " experts");
  const OnDevice device(logits_any);
  const Tensor logits = torch::stable::contiguous(logits_any);
  Tensor weights = new_empty(logits, {tokens, k}, logits.scalar_type());
  Tensor chosen = new_empty(logits, {tokens, k}, ScalarType::Int);
  check_launch(op,
               launch_topk_gate(dtype_of(op, logits), read(logits), to_int(op, "T", tokens),
                                to_int(op, "E", experts), static_cast<int>(k), parse_mode(op, mode),
                                write(weights), write<int32_t>(chosen), device.stream()));
  return {weights, chosen};
}

Tensor topk_gate_backward(const Tensor& grad_any, const Tensor& logits_any,
                          const Tensor& chosen_any, std::string mode) {
  const char* op = "topk_gate_backward";
  check_rank(op, "logits", logits_any, 2);
  check_rank(op, "grad", grad_any, 2);
  const int64_t tokens = logits_any.size(0), experts = logits_any.size(1), k = grad_any.size(1);
  check_shape(op, "grad", grad_any, {tokens, k});
  check_shape(op, "experts", chosen_any, {tokens, k});
  check_dtype(op, "grad", grad_any, logits_any.scalar_type());
  check_dtype(op, "experts", chosen_any, ScalarType::Int);
  const OnDevice device(logits_any);
  const Tensor grad = torch::stable::contiguous(grad_any);
  const Tensor logits = torch::stable::contiguous(logits_any);
  const Tensor chosen = torch::stable::contiguous(chosen_any);
  Tensor result = new_empty(logits, {tokens, experts}, logits.scalar_type());
  check_launch(op, launch_topk_gate_backward(dtype_of(op, logits), read(grad), read(logits),
                                             read<int32_t>(chosen), to_int(op, "T", tokens),
                                             to_int(op, "E", experts), to_int(op, "K", k),
                                             parse_mode(op, mode), write(result), device.stream()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> moe_plan(const Tensor& chosen_any,
                                            std::optional<Tensor> order_any, int64_t experts,
                                            std::optional<int64_t> capacity) {
  const char* op = "moe_plan";
  check_rank(op, "experts", chosen_any, 2);
  check_dtype(op, "experts", chosen_any, ScalarType::Int);
  const int64_t tokens = chosen_any.size(0), k = chosen_any.size(1), total = tokens * k;
  check_int32_range(op, "T*K", total);
  STD_TORCH_CHECK(experts >= 1 && (!capacity || *capacity >= 1), op,
                  ": needs at least one expert and a capacity of at least 1");
  STD_TORCH_CHECK(experts <= kMaxExperts, op, ": ", experts, " experts, at most ", kMaxExperts,
                  " on CUDA");
  const OnDevice device(chosen_any);
  const Tensor chosen = torch::stable::contiguous(chosen_any);
  const std::optional<Tensor> order = contiguous(order_any);
  if (order) {
    check_shape(op, "order", *order, {tokens});
    check_dtype(op, "order", *order, ScalarType::Long);
  }
  const int64_t limit = std::min(capacity.value_or(total), total);
  const int64_t rows =
      capacity && limit < (total + experts - 1) / experts ? experts * limit : total;
  const int64_t blocks = (total + kPlanBlock - 1) / kPlanBlock;
  Tensor row_of = new_empty(chosen, {tokens, k}, ScalarType::Int);
  Tensor token_of = new_empty(chosen, {rows}, ScalarType::Int);
  Tensor offsets = new_empty(chosen, {experts + 1}, ScalarType::Int);
  const Tensor counts = new_empty(chosen, {blocks, experts}, ScalarType::Int);
  check_launch(
      op, launch_moe_plan(read<int32_t>(chosen), read<int64_t>(order), static_cast<int>(tokens),
                          static_cast<int>(k), static_cast<int>(experts),
                          capacity ? static_cast<int>(limit) : -1, static_cast<int>(rows),
                          write<int32_t>(counts), write<int32_t>(row_of), write<int32_t>(token_of),
                          write<int32_t>(offsets), device.stream()));
  return {row_of, token_of, offsets};
}

Tensor moe_gather(const Tensor& x_any, const Tensor& /*row_of*/, const Tensor& token_of_any) {
  const char* op = "moe_gather";
  check_rank(op, "x", x_any, 2);
  check_rank(op, "token_of", token_of_any, 1);
  check_dtype(op, "token_of", token_of_any, ScalarType::Int);
  const OnDevice device(x_any);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor token_of = torch::stable::contiguous(token_of_any);
  const int64_t rows = token_of.size(0), width = x.size(1);
  Tensor out = new_empty(x, {rows, width}, x.scalar_type());
  check_launch(
      op, launch_gather(dtype_of(op, x), read(x), read<int32_t>(token_of), to_int(op, "M", rows),
                        to_int(op, "D", width), write(out), device.stream()));
  return out;
}

namespace {

Tensor sum_rows(const char* op, const Tensor& rows_any, const std::optional<Tensor>& weights_any,
                const Tensor& row_of_any) {
  check_rank(op, "rows", rows_any, 2);
  check_rank(op, "row_of", row_of_any, 2);
  check_dtype(op, "row_of", row_of_any, ScalarType::Int);
  const OnDevice device(rows_any);
  const Tensor rows = torch::stable::contiguous(rows_any);
  const Tensor row_of = torch::stable::contiguous(row_of_any);
  const std::optional<Tensor> weights = contiguous(weights_any);
  const int64_t tokens = row_of.size(0), k = row_of.size(1), width = rows.size(1);
  if (weights) {
    check_shape(op, "weights", *weights, {tokens, k});
    check_dtype(op, "weights", *weights, compute_dtype(rows.scalar_type()));
  }
  Tensor out = new_empty(rows, {tokens, width}, rows.scalar_type());
  check_launch(op, launch_sum_rows(dtype_of(op, rows), read(rows), read<int32_t>(row_of),
                                   read(weights), to_int(op, "T", tokens), to_int(op, "K", k),
                                   to_int(op, "D", width), write(out), device.stream()));
  return out;
}

}  // namespace

Tensor moe_gather_backward(const Tensor& grad, const Tensor& row_of) {
  return sum_rows("moe_gather_backward", grad, std::nullopt, row_of);
}

Tensor moe_combine(const Tensor& rows, const Tensor& weights, const Tensor& row_of) {
  return sum_rows("moe_combine", rows, weights, row_of);
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& grad_any, const Tensor& rows_any,
                                                const Tensor& weights_any,
                                                const Tensor& row_of_any) {
  const char* op = "moe_combine_backward";
  check_rank(op, "rows", rows_any, 2);
  check_rank(op, "row_of", row_of_any, 2);
  check_dtype(op, "row_of", row_of_any, ScalarType::Int);
  check_dtype(op, "grad", grad_any, rows_any.scalar_type());
  check_dtype(op, "weights", weights_any, compute_dtype(rows_any.scalar_type()));
  const OnDevice device(rows_any);
  const Tensor grad = torch::stable::contiguous(grad_any);
  const Tensor rows = torch::stable::contiguous(rows_any);
  const Tensor weights = torch::stable::contiguous(weights_any);
  const Tensor row_of = torch::stable::contiguous(row_of_any);
  const int64_t tokens = row_of.size(0), k = row_of.size(1), width = rows.size(1);
  check_shape(op, "weights", weights, {tokens, k});
  check_shape(op, "grad", grad, {tokens, width});
  check_int32_range(op, "T*K", tokens * k);
  Tensor grad_rows = new_zeros(rows, {rows.size(0), width}, rows.scalar_type());
  Tensor grad_weights = new_empty(weights, {tokens, k}, weights.scalar_type());
  check_launch(
      op, launch_combine_backward(dtype_of(op, rows), read(grad), read(rows), read(weights),
                                  read<int32_t>(row_of), static_cast<int>(tokens),
                                  static_cast<int>(k), to_int(op, "D", width), update(grad_rows),
                                  write(grad_weights), device.stream()));
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
