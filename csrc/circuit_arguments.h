// Arguments of circuit attention, checked as the CPU's and the CUDA wrappers both need them. Values
// of graphs are checked where they can be read (cpu/circuit_attention.cpp).

#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "checks.h"

namespace m2mkd {

// B examples, H heads, U receivers, V senders, N edges, D head width.
struct CircuitSizes {
  int64_t batch, heads, receivers, senders, edges, width;
  bool own_biases;  // of each example, [B, N], not [N]

  std::vector<int64_t> bias_sizes() const {
    return own_biases ? std::vector{batch, edges} : std::vector{edges};
  }
};

// Raises unless the arguments lie on one device and fit together, in heads no wider than `widest`.
inline CircuitSizes check_circuit(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                  const std::optional<Tensor>& bias, const Tensor& row_ptr,
                                  const Tensor& sender, const Tensor& col_ptr,
                                  const Tensor& receiver, const Tensor& edge_id, int64_t widest) {
  const NamedTensors graph{{"row_ptr", &row_ptr},
                           {"sender", &sender},
                           {"col_ptr", &col_ptr},
                           {"receiver", &receiver},
                           {"edge_id", &edge_id}};
  check_together(op, q, {{"k", &k}, {"v", &v}, {"bias", pointer(bias)}});
  check_together(op, q, graph);
  check_rank(op, "q", q, 4);
  check_rank(op, "k", k, 4);
  check_rank(op, "sender", sender, 1);
  const CircuitSizes sizes{.batch = q.size(0),
                           .heads = q.size(1),
                           .receivers = q.size(2),
                           .senders = k.size(2),
                           .edges = sender.size(0),
                           .width = q.size(3),
                           .own_biases = bias && bias->dim() != 1};
  STD_TORCH_CHECK(sizes.width >= 1 && sizes.width <= widest, op, ": head width is ", sizes.width,
                  ", outside [1, ", widest, "]");
  for (const auto& [name, tensor] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    check_shape(op, name, *tensor, {sizes.batch, sizes.heads, sizes.senders, sizes.width});
    check_dtype(op, name, *tensor, q.scalar_type());
  }
  check_shape(op, "row_ptr", row_ptr, {sizes.receivers + 1});
  check_shape(op, "col_ptr", col_ptr, {sizes.senders + 1});
  check_shape(op, "receiver", receiver, {sizes.edges});
  check_shape(op, "edge_id", edge_id, {sizes.edges});
  for (const auto& [name, tensor] : graph) {
    check_dtype(op, name, *tensor, ScalarType::Int);
  }
  if (bias) {
    check_dtype(op, "bias", *bias, compute_dtype(q.scalar_type()));
    check_shape(op, "bias", *bias, sizes.bias_sizes());
  }
  return sizes;
}

// The upstream gradient, and what the forward pass gave, against the other arguments.
inline void check_circuit_gradient(const char* op, const CircuitSizes& sizes, const Tensor& q,
                                   const Tensor& grad, const Tensor& out, const Tensor& lse) {
  check_together(op, q, {{"grad", &grad}, {"out", &out}, {"lse", &lse}});
  for (const auto& [name, tensor] : {std::pair{"grad", &grad}, std::pair{"out", &out}}) {
    check_shape(op, name, *tensor, {sizes.batch, sizes.heads, sizes.receivers, sizes.width});
    check_dtype(op, name, *tensor, q.scalar_type());
  }
  check_shape(op, "lse", lse, {sizes.batch, sizes.heads, sizes.receivers});
  check_dtype(op, "lse", lse, compute_dtype(q.scalar_type()));
}

}  // namespace m2mkd
