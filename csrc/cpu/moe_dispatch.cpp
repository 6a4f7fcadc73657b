// Gate, plan, gather and combine on the CPU. Every output element has one writer and a fixed order
// of summation, so results repeat bit for bit.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "../checks.h"
#include "../plan.h"
#include "parallel.h"
#include "rows.h"

namespace m2mkd::cpu {

namespace {

enum class GateMode { selected, all, all_renorm };

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

// Writes the k largest of n values to top in falling order; equal values keep their order.
template <typename T>
void select_top(const T* values, int64_t n, int64_t k, int32_t* top) {
  int64_t found = 0;
  for (int64_t e = 0; e < n; ++e) {
    const auto value = static_cast<compute_t<T>>(values[e]);
    int64_t place = found;
    while (place > 0 && static_cast<compute_t<T>>(values[top[place - 1]]) < value) {
      --place;
    }
    if (place >= k) {
      continue;
    }
    found = std::min(found + 1, k);
    for (int64_t j = found - 1; j > place; --j) {
      top[j] = top[j - 1];
    }
    top[place] = static_cast<int32_t>(e);
  }
}

// Softmax denominator relative to the largest logit, over the chosen or over all experts. With
// renormalisation the sum over all cancels, so that mode is the softmax over the chosen.
template <typename T>
compute_t<T> denominator(const T* logits, int64_t n, const int32_t* top, int64_t k, GateMode mode) {
  using A = compute_t<T>;
  const A largest = static_cast<A>(logits[top[0]]);
  A sum = 0;
  if (mode == GateMode::all) {
    for (int64_t e = 0; e < n; ++e) {
      sum += std::exp(static_cast<A>(logits[e]) - largest);
    }
  } else {
    for (int64_t j = 0; j < k; ++j) {
      sum += std::exp(static_cast<A>(logits[top[j]]) - largest);
    }
  }
  return sum;
}

}  // namespace

std::tuple<Tensor, Tensor> topk_gate(const Tensor& logits_any, int64_t k, std::string mode_name) {
  const char* op = "topk_gate";
  check_rank(op, "logits", logits_any, 2);
  const GateMode mode = parse_mode(op, mode_name);
  const int64_t tokens = logits_any.size(0), experts = logits_any.size(1);
  STD_TORCH_CHECK(k >= 1 && k <= experts, op, ": k=", k, " with ", experts, " experts");
  const Tensor logits = torch::stable::contiguous(logits_any);
  Tensor weights = new_empty(logits, {tokens, k}, logits.scalar_type());
  Tensor chosen = new_empty(logits, {tokens, k}, ScalarType::Int);
  dispatch_float(op, logits.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = compute_t<T>;
    const T* logit = const_data<T>(logits);
    T* weight = mutable_data<T>(weights);
    int32_t* choice = mutable_data<int32_t>(chosen);
    parallel_items(tokens, experts * 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* row = logit + t * experts;
        int32_t* top = choice + t * k;
        select_top(row, experts, k, top);
        const A sum = denominator(row, experts, top, k, mode);
        for (int64_t j = 0; j < k; ++j) {
          const A shifted = static_cast<A>(row[top[j]]) - static_cast<A>(row[top[0]]);
          weight[t * k + j] = static_cast<T>(std::exp(shifted) / sum);
        }
      }
    });
  });
  return {weights, chosen};
}

// With p the softmax over the experts that count and g the gradient of the chosen weights:
// d logit_e = p_e (g_e - sum_j g_j p_j), g_e = 0 where e was not chosen.
Tensor topk_gate_backward(const Tensor& grad_any, const Tensor& logits_any,
                          const Tensor& chosen_any, std::string mode_name) {
  const char* op = "topk_gate_backward";
  const GateMode mode = parse_mode(op, mode_name);
  check_rank(op, "logits", logits_any, 2);
  check_rank(op, "grad", grad_any, 2);
  const int64_t tokens = logits_any.size(0), experts = logits_any.size(1), k = grad_any.size(1);
  check_shape(op, "grad", grad_any, {tokens, k});
  check_shape(op, "experts", chosen_any, {tokens, k});
  check_dtype(op, "grad", grad_any, logits_any.scalar_type());
  check_dtype(op, "experts", chosen_any, ScalarType::Int);
  const Tensor grad = torch::stable::contiguous(grad_any);
  const Tensor logits = torch::stable::contiguous(logits_any);
  const Tensor chosen = torch::stable::contiguous(chosen_any);
  check_entries(op, "experts", const_data<int32_t>(chosen), tokens * k, 0, experts);
  Tensor result = new_zeros(logits, {tokens, experts}, logits.scalar_type());
  dispatch_float(op, logits.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = compute_t<T>;
    const T* logit = const_data<T>(logits);
    const T* upstream = const_data<T>(grad);
    const int32_t* choice = const_data<int32_t>(chosen);
    T* out = mutable_data<T>(result);
    parallel_items(tokens, experts * 64, [&](int64_t begin, int64_t end) {
      std::vector<A> down(experts);
      for (int64_t t = begin; t < end; ++t) {
        const T* row = logit + t * experts;
        const int32_t* top = choice + t * k;
        const A sum = denominator(row, experts, top, k, mode);
        const auto p = [&](int64_t e) {
          return std::exp(static_cast<A>(row[e]) - static_cast<A>(row[top[0]])) / sum;
        };
        A mean = 0;
        for (int64_t j = 0; j < k; ++j) {
          mean += static_cast<A>(upstream[t * k + j]) * p(top[j]);
        }
        std::fill(down.begin(), down.end(), A(0));
        if (mode == GateMode::all) {
          for (int64_t e = 0; e < experts; ++e) {
            down[e] = -p(e) * mean;
          }
        }
        for (int64_t j = 0; j < k; ++j) {
          const A shared = mode == GateMode::all ? A(0) : mean;
          down[top[j]] += p(top[j]) * (static_cast<A>(upstream[t * k + j]) - shared);
        }
        store(out + t * experts, down.data(), experts);
      }
    });
  });
  return result;
}

// Stable counting sort of choices by expert. Choices are listed token by token; with a capacity,
// choice by choice (all first choices, then all second ones...) with tokens in the given order, and
// what comes after an expert's capacity-th choice is dropped. Rows are numbered in listing order.
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
  const Tensor chosen = torch::stable::contiguous(chosen_any);
  const std::optional<Tensor> order = contiguous(order_any);
  if (order) {
    check_shape(op, "order", *order, {tokens});
    check_dtype(op, "order", *order, ScalarType::Long);
  }
  const int32_t* choice = const_data<int32_t>(chosen);
  check_entries(op, "experts", choice, total, 0, experts);
  const int64_t limit = capacity.value_or(total);
  // experts * limit may not fit in 64 bits, so compare by division.
  const int64_t rows =
      capacity && limit < (total + experts - 1) / experts ? experts * limit : total;
  Tensor row_of = new_empty(chosen, {tokens, k}, ScalarType::Int);
  Tensor token_of = new_empty(chosen, {rows}, ScalarType::Int);
  Tensor offsets = new_empty(chosen, {experts + 1}, ScalarType::Int);
  int32_t* row = mutable_data<int32_t>(row_of);
  int32_t* token = mutable_data<int32_t>(token_of);
  int32_t* offset = mutable_data<int32_t>(offsets);

  std::vector<int64_t> next(experts + 1, 0);
  for (int64_t i = 0; i < total; ++i) {
    ++next[choice[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) {
    next[e + 1] = next[e] + std::min(next[e + 1], limit);
  }
  std::copy(next.begin(), next.end(), offset);
  std::fill(token + offset[experts], token + rows, -1);
  const auto place = [&](int64_t t, int64_t j) {
    const int32_t e = choice[t * k + j];
    if (next[e] < offset[e + 1]) {
      token[next[e]] = static_cast<int32_t>(t);
      row[t * k + j] = static_cast<int32_t>(next[e]++);
    } else {
      row[t * k + j] = -1;
    }
  };
  if (!capacity) {
    for (int64_t i = 0; i < total; ++i) {
      place(i / k, i % k);
    }
    return {row_of, token_of, offsets};
  }
  const int64_t* rank = const_data<int64_t>(order);
  if (rank != nullptr) {
    for (int64_t i = 0; i < tokens; ++i) {
      STD_TORCH_CHECK(rank[i] >= 0 && rank[i] < tokens, op, ": order[", i, "] is ", rank[i]);
    }
  }
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t i = 0; i < tokens; ++i) {
      place(rank != nullptr ? rank[i] : i, j);
    }
  }
  return {row_of, token_of, offsets};
}

Tensor moe_gather(const Tensor& x_any, const Tensor& /*row_of*/, const Tensor& token_of_any) {
  const char* op = "moe_gather";
  check_rank(op, "x", x_any, 2);
  check_rank(op, "token_of", token_of_any, 1);
  check_dtype(op, "token_of", token_of_any, ScalarType::Int);
  const Tensor x = torch::stable::contiguous(x_any);
  const Tensor token_of = torch::stable::contiguous(token_of_any);
  const int64_t rows = token_of.size(0), width = x.size(1);
  const int32_t* token = const_data<int32_t>(token_of);
  check_entries(op, "token_of", token, rows, -1, x.size(0));
  Tensor out = new_empty(x, {rows, width}, x.scalar_type());
  const int64_t bytes = width * static_cast<int64_t>(x.element_size());
  const char* from = const_data<char>(x);
  char* to = mutable_data<char>(out);
  parallel_items(rows, 2 * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (token[r] >= 0) {
        std::memcpy(to + r * bytes, from + token[r] * bytes, bytes);
      } else {
        std::memset(to + r * bytes, 0, bytes);
      }
    }
  });
  return out;
}

namespace {

// out_t = sum over k of w_tk rows[row_tk], in the order of k; weight may be null for ones.
template <typename T>
void sum_rows(const T* rows, const int32_t* row_of, const compute_t<T>* weight, T* out,
              int64_t tokens, int64_t k, int64_t width) {
  using A = compute_t<T>;
  parallel_items(tokens, (k + 1) * width * int64_t{sizeof(T)}, [&](int64_t begin, int64_t end) {
    std::vector<A> sums(width);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sums.begin(), sums.end(), A(0));
      for (int64_t i = t * k; i < (t + 1) * k; ++i) {
        if (row_of[i] >= 0) {
          add_scaled(sums.data(), rows + row_of[i] * width, static_cast<const T*>(nullptr),
                     weight != nullptr ? weight[i] : A(1), width);
        }
      }
      store(out + t * width, sums.data(), width);
    }
  });
}

}  // namespace

Tensor moe_gather_backward(const Tensor& grad_any, const Tensor& row_of_any) {
  const char* op = "moe_gather_backward";
  check_rank(op, "grad", grad_any, 2);
  check_rank(op, "row_of", row_of_any, 2);
  check_dtype(op, "row_of", row_of_any, ScalarType::Int);
  const Tensor grad = torch::stable::contiguous(grad_any);
  const Tensor row_of = torch::stable::contiguous(row_of_any);
  const int64_t tokens = row_of.size(0), k = row_of.size(1), width = grad.size(1);
  const int32_t* row = const_data<int32_t>(row_of);
  check_entries(op, "row_of", row, tokens * k, -1, grad.size(0));
  Tensor out = new_empty(grad, {tokens, width}, grad.scalar_type());
  dispatch_float(op, grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    sum_rows<T>(const_data<T>(grad), row, nullptr, mutable_data<T>(out), tokens, k, width);
  });
  return out;
}

Tensor moe_combine(const Tensor& rows_any, const Tensor& weights_any, const Tensor& row_of_any) {
  const char* op = "moe_combine";
  check_rank(op, "rows", rows_any, 2);
  check_rank(op, "row_of", row_of_any, 2);
  check_dtype(op, "row_of", row_of_any, ScalarType::Int);
  check_dtype(op, "weights", weights_any, compute_dtype(rows_any.scalar_type()));
  const Tensor rows = torch::stable::contiguous(rows_any);
  const Tensor weights = torch::stable::contiguous(weights_any);
  const Tensor row_of = torch::stable::contiguous(row_of_any);
  const int64_t tokens = row_of.size(0), k = row_of.size(1), width = rows.size(1);
  check_shape(op, "weights", weights, {tokens, k});
  const int32_t* row = const_data<int32_t>(row_of);
  check_entries(op, "row_of", row, tokens * k, -1, rows.size(0));
  Tensor out = new_empty(rows, {tokens, width}, rows.scalar_type());
  dispatch_float(op, rows.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    sum_rows<T>(const_data<T>(rows), row, const_data<compute_t<T>>(weights), mutable_data<T>(out),
                tokens, k, width);
  });
  return out;
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
  const Tensor grad = torch::stable::contiguous(grad_any);
  const Tensor rows = torch::stable::contiguous(rows_any);
  const Tensor weights = torch::stable::contiguous(weights_any);
  const Tensor row_of = torch::stable::contiguous(row_of_any);
  const int64_t tokens = row_of.size(0), k = row_of.size(1), width = rows.size(1);
  check_shape(op, "weights", weights, {tokens, k});
  check_shape(op, "grad", grad, {tokens, width});
  const int32_t* row = const_data<int32_t>(row_of);
  check_entries(op, "row_of", row, tokens * k, -1, rows.size(0));
  Tensor grad_rows = new_zeros(rows, {rows.size(0), width}, rows.scalar_type());
  Tensor grad_weights = new_zeros(weights, {tokens, k}, weights.scalar_type());
  dispatch_float(op, rows.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = compute_t<T>;
    const T* upstream = const_data<T>(grad);
    const T* source = const_data<T>(rows);
    const A* weight = const_data<A>(weights);
    T* down = mutable_data<T>(grad_rows);
    A* weight_grad = mutable_data<A>(grad_weights);
    parallel_items(tokens, 3 * k * width * int64_t{sizeof(T)}, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * k; i < end * k; ++i) {
        if (row[i] >= 0) {
          const T* grad_row = upstream + i / k * width;
          scale(down + row[i] * width, grad_row, weight[i], width);
          weight_grad[i] = dot(grad_row, source + row[i] * width, width);
        }
      }
    });
  });
  return {grad_rows, grad_weights};
}

}  // namespace m2mkd::cpu

STABLE_TORCH_LIBRARY_IMPL(m2mkd, CPU, m) {
  m.impl("topk_gate", TORCH_BOX(&m2mkd::cpu::topk_gate));
  m.impl("topk_gate_backward", TORCH_BOX(&m2mkd::cpu::topk_gate_backward));
  m.impl("moe_plan", TORCH_BOX(&m2mkd::cpu::moe_plan));
  m.impl("moe_gather", TORCH_BOX(&m2mkd::cpu::moe_gather));
  m.impl("moe_gather_backward", TORCH_BOX(&m2mkd::cpu::moe_gather_backward));
  m.impl("moe_combine", TORCH_BOX(&m2mkd::cpu::moe_combine));
  m.impl("moe_combine_backward", TORCH_BOX(&m2mkd::cpu::moe_combine_backward));
}
