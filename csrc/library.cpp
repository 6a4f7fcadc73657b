// Every operator's schema, once. Kernels are registered beside their code (cpu/, cuda/); fake
// kernels, autograd and autocast rules live in m2mkd/ops. T tokens, D width, H hidden width,
// E experts, K choices per token, M routed rows.

#include <torch/csrc/stable/library.h>

// The emulator's build has a namespace of its own, to be loaded beside the real operators.
#ifndef M2MKD_NAMESPACE
#define M2MKD_NAMESPACE m2mkd
#endif

STABLE_TORCH_LIBRARY(M2MKD_NAMESPACE, m) {
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

  // Attention along a circuit's edges. B batch, H heads, U receivers, V senders, D head width,
  // N edges. q [B, H, U, D]; k and v [B, H, V, D]; bias [N] or [B, N], float32, or float64 with
  // float64 queries; row_ptr [U + 1] and sender [N] by receiver, col_ptr [V + 1], receiver [N] and
  // edge_id [N] by sender, int32. On a CPU these are checked to stay within bounds and, in
  // backward, to list the same edges, those of a sender by rising number. Returns the output and
  // the log-sum-exp of each receiver's scores, [B, H, U] in the dtype of bias, -inf where it has no
  // edge (or only biases of -inf).
  m.def(
      "circuit_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor row_ptr, "
      "Tensor sender, Tensor col_ptr, Tensor receiver, Tensor edge_id, float scale) "
      "-> (Tensor, Tensor)");
  // Returns the gradients of q, k, v and bias; that of bias is empty where it is not asked for.
  m.def(
      "circuit_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, "
      "Tensor out, Tensor lse, Tensor row_ptr, Tensor sender, Tensor col_ptr, Tensor receiver, "
      "Tensor edge_id, float scale, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}
