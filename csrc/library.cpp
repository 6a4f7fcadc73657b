// Every operator's schema, once. Kernels are registered beside their code (cpu/, cuda/); fake
// kernels, autograd and autocast rules live in m2mkd/ops. T tokens, D width, H hidden width,
// E experts, K choices per token, M routed rows.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(m2mkd, m) {
  m.def("topk_gate(Tensor logits, int k, str mode) -> (Tensor, Tensor)");
  m.def("topk_gate_backward(Tensor grad, Tensor logits, Tensor experts, str mode) -> Tensor");

  // order: token numbers by falling priority, [T] int64; it matters only with a capacity.
  m.def(
      "moe_plan(Tensor experts, Tensor? order, int num_experts, SymInt? capacity) "
      "-> (Tensor, Tensor, Tensor)");

  m.def("moe_gather(Tensor x, Tensor row_of, Tensor token_of) -> Tensor");
  m.def("moe_gather_backward(Tensor grad, Tensor row_of) -> Tensor");

  m.def("grouped_linear(Tensor rows, Tensor weight, Tensor? bias, Tensor offsets) -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor grad, Tensor rows, Tensor weight, Tensor offsets, "
      "bool needs_rows, bool needs_weight) -> (Tensor, Tensor, Tensor)");

  // Combine weights are float32, or float64 with float64 rows.
  m.def("moe_combine(Tensor rows, Tensor weights, Tensor row_of) -> Tensor");
  m.def(
      "moe_combine_backward(Tensor grad, Tensor rows, Tensor weights, Tensor row_of) "
      "-> (Tensor, Tensor)");

  // Returns the output and, where save is true, fc1's product before bias and activation, [M, H].
  m.def(
      "moe_mlp(Tensor x, Tensor weights, Tensor row_of, Tensor token_of, Tensor offsets, "
      "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
      "str activation, bool save) -> (Tensor, Tensor)");
  // Returns the gradients of x, weights, fc1_weight, fc1_bias, fc2_weight and fc2_bias; those not
  // asked for are empty. An empty hidden is recomputed.
  m.def(
      "moe_mlp_backward(Tensor grad, Tensor hidden, Tensor x, Tensor weights, Tensor row_of, "
      "Tensor token_of, Tensor offsets, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
      "Tensor? fc2_bias, str activation, bool needs_x, bool needs_fc1, "
      "bool needs_fc2) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
