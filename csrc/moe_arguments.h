// Arguments of the mixture-of-experts ops, checked and contiguous, as the CPU's and the CUDA
// wrappers both need them. Values of plans are checked where they can be read (plan.h).
// T tokens, D width, H hidden width, E experts, K choices per token, M routed rows.

#pragma once

#include <algorithm>
#include <string>
#include <tuple>

#include "checks.h"

namespace m2mkd {

// Mode is an enum with members selected, all and all_renorm.
template <typename Mode>
Mode parse_gate_mode(const char* op, const std::string& name) {
  if (name == "softmax_selected") {
    return Mode::selected;
  }
  if (name == "softmax_all") {
    return Mode::all;
  }
  STD_TORCH_CHECK(name == "softmax_all_renorm", op, ": unknown mode ", name);
  return Mode::all_renorm;
}

// Kind is an enum with members gelu, gelu_tanh, relu and silu.
template <typename Kind>
Kind parse_activation(const char* op, const std::string& name) {
  if (name == "gelu") {
    return Kind::gelu;
  }
  if (name == "gelu_tanh") {
    return Kind::gelu_tanh;
  }
  if (name == "relu") {
    return Kind::relu;
  }
  STD_TORCH_CHECK(name == "silu", op, ": unknown activation ", name,
                  "; use gelu, gelu_tanh, relu or silu");
  return Kind::silu;
}

// Every token chooses: kernels read its first choice.
inline void check_k(const char* op, int64_t k, int64_t experts) {
  STD_TORCH_CHECK(k >= 1 && k <= experts, op, ": k=", k, " with ", experts, " experts");
}

struct GateGradient {
  Tensor grad, logits, chosen;
  int64_t tokens, experts, k;
};

inline GateGradient check_gate_gradient(const char* op, const Tensor& grad, const Tensor& logits,
                                        const Tensor& chosen) {
  check_together(op, grad, {{"logits", &logits}, {"experts", &chosen}});
  check_rank(op, "logits", logits, 2);
  check_rank(op, "grad", grad, 2);
  const int64_t tokens = logits.size(0), k = grad.size(1);
  check_shape(op, "grad", grad, {tokens, k});
  check_shape(op, "experts", chosen, {tokens, k});
  check_dtype(op, "grad", grad, logits.scalar_type());
  check_dtype(op, "experts", chosen, ScalarType::Int);
  check_k(op, k, logits.size(1));
  using torch::stable::contiguous;
  return {contiguous(grad), contiguous(logits), contiguous(chosen), tokens, logits.size(1), k};
}

// limit: rows an expert may take; rows: M, or with a capacity the most that M can be.
struct Choices {
  Tensor chosen;
  std::optional<Tensor> order;
  int64_t tokens, k, total, limit, rows;
};

inline Choices check_choices(const char* op, const Tensor& chosen,
                             const std::optional<Tensor>& order, int64_t experts,
                             std::optional<int64_t> capacity) {
  check_together(op, chosen, {{"order", pointer(order)}});
  check_rank(op, "experts", chosen, 2);
  check_dtype(op, "experts", chosen, ScalarType::Int);
  const int64_t tokens = chosen.size(0), k = chosen.size(1), total = tokens * k;
  check_int32_range(op, "T*K", total);
  STD_TORCH_CHECK(experts >= 1 && (!capacity || *capacity >= 1), op,
                  ": needs at least one expert and a capacity of at least 1");
  if (order) {
    check_shape(op, "order", *order, {tokens});
    check_dtype(op, "order", *order, ScalarType::Long);
  }
  const int64_t limit = std::min(capacity.value_or(total), total);
  // experts * limit may not fit in 64 bits, so compare by division.
  const bool is_bounded = capacity && limit < (total + experts - 1) / experts;
  return {torch::stable::contiguous(chosen),   contiguous(order), tokens, k, total, limit,
          is_bounded ? experts * limit : total};
}

struct Gathering {
  Tensor x, token_of;
  int64_t rows, width;
};

inline Gathering check_gather(const char* op, const Tensor& x, const Tensor& row_of,
                              const Tensor& token_of) {
  check_together(op, x, {{"row_of", &row_of}, {"token_of", &token_of}});
  check_rank(op, "x", x, 2);
  check_rank(op, "token_of", token_of, 1);
  check_dtype(op, "token_of", token_of, ScalarType::Int);
  return {torch::stable::contiguous(x), torch::stable::contiguous(token_of), token_of.size(0),
          x.size(1)};
}

// Rows that are summed by token.
struct TokenRows {
  Tensor rows, row_of;
  std::optional<Tensor> weights;
  int64_t tokens, k, width;
};

inline TokenRows check_token_rows(const char* op, const Tensor& rows,
                                  const std::optional<Tensor>& weights, const Tensor& row_of) {
  check_together(op, rows, {{"weights", pointer(weights)}, {"row_of", &row_of}});
  check_rank(op, "rows", rows, 2);
  check_rank(op, "row_of", row_of, 2);
  check_dtype(op, "row_of", row_of, ScalarType::Int);
  const int64_t tokens = row_of.size(0), k = row_of.size(1);
  check_int32_range(op, "T*K", tokens * k);
  if (weights) {
    check_shape(op, "weights", *weights, {tokens, k});
    check_dtype(op, "weights", *weights, compute_dtype(rows.scalar_type()));
  }
  return {torch::stable::contiguous(rows),
          torch::stable::contiguous(row_of),
          contiguous(weights),
          tokens,
          k,
          rows.size(1)};
}

// The gradient of summed rows, contiguous.
inline Tensor check_token_grad(const char* op, const TokenRows& a, const Tensor& grad) {
  check_together(op, a.rows, {{"grad", &grad}});
  check_shape(op, "grad", grad, {a.tokens, a.width});
  check_dtype(op, "grad", grad, a.rows.scalar_type());
  return torch::stable::contiguous(grad);
}

struct Grouped {
  Tensor rows, weight, offsets;
  int64_t experts, in, out, count;
};

inline Grouped check_grouped(const char* op, const Tensor& rows, const Tensor& weight,
                             const Tensor& offsets) {
  check_together(op, rows, {{"weight", &weight}, {"offsets", &offsets}});
  check_rank(op, "rows", rows, 2);
  check_rank(op, "weight", weight, 3);
  const int64_t experts = weight.size(0), in = weight.size(2), count = rows.size(0);
  check_shape(op, "rows", rows, {count, in});
  check_shape(op, "offsets", offsets, {experts + 1});
  check_dtype(op, "weight", weight, rows.scalar_type());
  check_dtype(op, "offsets", offsets, ScalarType::Int);
  using torch::stable::contiguous;
  return {contiguous(rows),
          contiguous(weight),
          contiguous(offsets),
          experts,
          in,
          weight.size(1),
          count};
}

// The gradient of rows that went through their experts, contiguous.
inline Tensor check_grouped_grad(const char* op, const Grouped& a, const Tensor& grad) {
  check_together(op, a.rows, {{"grad", &grad}});
  check_shape(op, "grad", grad, {a.count, a.out});
  check_dtype(op, "grad", grad, a.rows.scalar_type());
  return torch::stable::contiguous(grad);
}

// A bias [E, size] of rows, contiguous, or none.
inline std::optional<Tensor> check_bias(const char* op, const char* name,
                                        const std::optional<Tensor>& bias, int64_t experts,
                                        int64_t size, const Tensor& rows) {
  if (bias) {
    check_together(op, rows, {{name, &*bias}});
    check_shape(op, name, *bias, {experts, size});
    check_dtype(op, name, *bias, rows.scalar_type());
  }
  return contiguous(bias);
}

// What forward and backward of moe_mlp share.
struct MlpTensors {
  Tensor x, weights, row_of, token_of, offsets, fc1_weight, fc2_weight;
  std::optional<Tensor> fc1_bias, fc2_bias;
  int64_t tokens, k, width, hidden, experts, rows;
  ScalarType dtype;
};

inline MlpTensors check_mlp(const char* op, const Tensor& x, const Tensor& weights,
                            const Tensor& row_of, const Tensor& token_of, const Tensor& offsets,
                            const Tensor& fc1_weight, const std::optional<Tensor>& fc1_bias,
                            const Tensor& fc2_weight, const std::optional<Tensor>& fc2_bias) {
  check_together(op, x,
                 {{"weights", &weights},
                  {"row_of", &row_of},
                  {"token_of", &token_of},
                  {"offsets", &offsets},
                  {"fc1_weight", &fc1_weight},
                  {"fc2_weight", &fc2_weight}});
  check_rank(op, "x", x, 2);
  check_rank(op, "row_of", row_of, 2);
  check_rank(op, "token_of", token_of, 1);
  check_rank(op, "fc1_weight", fc1_weight, 3);
  const int64_t tokens = x.size(0), width = x.size(1), k = row_of.size(1);
  const int64_t experts = fc1_weight.size(0), hidden = fc1_weight.size(1);
  const ScalarType dtype = x.scalar_type();
  check_int32_range(op, "T*K", tokens * k);
  check_shape(op, "row_of", row_of, {tokens, k});
  check_shape(op, "weights", weights, {tokens, k});
  check_shape(op, "offsets", offsets, {experts + 1});
  check_shape(op, "fc1_weight", fc1_weight, {experts, hidden, width});
  check_shape(op, "fc2_weight", fc2_weight, {experts, width, hidden});
  check_dtype(op, "fc1_weight", fc1_weight, dtype);
  check_dtype(op, "fc2_weight", fc2_weight, dtype);
  check_dtype(op, "weights", weights, compute_dtype(dtype));
  for (const auto& [name, part] : {std::pair{"row_of", &row_of}, std::pair{"token_of", &token_of},
                                   std::pair{"offsets", &offsets}}) {
    check_dtype(op, name, *part, ScalarType::Int);
  }
  using torch::stable::contiguous;
  return {contiguous(x),
          contiguous(weights),
          contiguous(row_of),
          contiguous(token_of),
          contiguous(offsets),
          contiguous(fc1_weight),
          contiguous(fc2_weight),
          check_bias(op, "fc1_bias", fc1_bias, experts, hidden, x),
          check_bias(op, "fc2_bias", fc2_bias, experts, width, x),
          tokens,
          k,
          width,
          hidden,
          experts,
          token_of.size(0),
          dtype};
}

// Upstream gradient and saved product of fc1, [M, H] or empty, against the other arguments.
inline void check_mlp_gradient(const char* op, const MlpTensors& a, const Tensor& grad,
                               const Tensor& hidden) {
  check_together(op, a.x, {{"grad", &grad}, {"hidden", &hidden}});
  check_shape(op, "grad", grad, {a.tokens, a.width});
  check_dtype(op, "grad", grad, a.dtype);
  check_shape(op, "hidden", hidden, {hidden.size(0) == 0 ? 0 : a.rows, a.hidden});
  check_dtype(op, "hidden", hidden, a.dtype);
}

}  // namespace m2mkd
