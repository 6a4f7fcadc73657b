// Gate, plan, gather and combine on the CPU. Every output element has one writer and a fixed order
// of summation, so results repeat bit for bit.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "../moe_arguments.h"
#include "../plan.h"
#include "parallel.h"
#include "rows.h"

namespace m2mkd::cpu {

namespace {

enum class GateMode { selected, all, all_renorm };

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
  const GateMode mode = parse_gate_mode<GateMode>(op, mode_name);
  const int64_t tokens = logits_any.size(0), experts = logits_any.size(1);
  check_k(op, k, experts);
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
Tensor topk_gate_backward(const Tensor& grad, const Tensor& logits, const Tensor& chosen,
                          std::string mode_name) {
  const char* op = "topk_gate_backward";
  const GateMode mode = parse_gate_mode<GateMode>(op, mode_name);
  const GateGradient a = check_gate_gradient(op, grad, logits, chosen);
  const int64_t tokens = a.tokens, experts = a.experts, k = a.k;
  check_entries(op, "experts", const_data<int32_t>(a.chosen), tokens * k, 0, experts);
  Tensor result = new_zeros(a.logits, {tokens, experts}, a.logits.scalar_type());
  dispatch_float(op, a.logits.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = compute_t<T>;
    const T* logit = const_data<T>(a.logits);
    const T* upstream = const_data<T>(a.grad);
    const int32_t* choice = const_data<int32_t>(a.chosen);
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
std::tuple<Tensor, Tensor, Tensor> moe_plan(const Tensor& chosen, std::optional<Tensor> order,
                                            int64_t experts, std::optional<int64_t> capacity) {
  const char* op = "moe_plan";
  const Choices a = check_choices(op, chosen, order, experts, capacity);
  const int64_t tokens = a.tokens, k = a.k, total = a.total;
  const int32_t* choice = const_data<int32_t>(a.chosen);
  check_entries(op, "experts", choice, total, 0, experts);
  Tensor row_of = new_empty(a.chosen, {tokens, k}, ScalarType::Int);
  Tensor token_of = new_empty(a.chosen, {a.rows}, ScalarType::Int);
  Tensor offsets = new_empty(a.chosen, {experts + 1}, ScalarType::Int);
  int32_t* row = mutable_data<int32_t>(row_of);
  int32_t* token = mutable_data<int32_t>(token_of);
  int32_t* offset = mutable_data<int32_t>(offsets);

  std::vector<int64_t> next(experts + 1, 0);
  for (int64_t i = 0; i < total; ++i) {
    ++next[choice[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) {
    next[e + 1] = next[e] + std::min(next[e + 1], a.limit);
  }
  std::copy(next.begin(), next.end(), offset);
  std::fill(token + offset[experts], token + a.rows, -1);
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
  const int64_t* rank = const_data<int64_t>(a.order);
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

Tensor moe_gather(const Tensor& x, const Tensor& row_of, const Tensor& token_of) {
  const char* op = "moe_gather";
  const Gathering a = check_gather(op, x, row_of, token_of);
  const int64_t rows = a.rows;
  const int32_t* token = const_data<int32_t>(a.token_of);
  check_entries(op, "token_of", token, rows, -1, a.x.size(0));
  Tensor out = new_empty(a.x, {rows, a.width}, a.x.scalar_type());
  const int64_t bytes = a.width * static_cast<int64_t>(a.x.element_size());
  const char* from = const_data<char>(a.x);
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

namespace {

// Checks the values of row_of too.
TokenRows check_values(const char* op, TokenRows a) {
  check_entries(op, "row_of", const_data<int32_t>(a.row_of), a.tokens * a.k, -1, a.rows.size(0));
  return a;
}

Tensor sum_token_rows(const char* op, const TokenRows& a) {
  Tensor out = new_empty(a.rows, {a.tokens, a.width}, a.rows.scalar_type());
  dispatch_float(op, a.rows.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    sum_rows<T>(const_data<T>(a.rows), const_data<int32_t>(a.row_of),
                const_data<compute_t<T>>(a.weights), mutable_data<T>(out), a.tokens, a.k, a.width);
  });
  return out;
}

}  // namespace

Tensor moe_gather_backward(const Tensor& grad, const Tensor& row_of) {
  const char* op = "moe_gather_backward";
  return sum_token_rows(op, check_values(op, check_token_rows(op, grad, std::nullopt, row_of)));
}

Tensor moe_combine(const Tensor& rows, const Tensor& weights, const Tensor& row_of) {
  const char* op = "moe_combine";
  return sum_token_rows(op, check_values(op, check_token_rows(op, rows, weights, row_of)));
}

std::tuple<Tensor, Tensor> moe_combine_backward(const Tensor& grad_any, const Tensor& rows,
                                                const Tensor& weights, const Tensor& row_of) {
  const char* op = "moe_combine_backward";
  const TokenRows a = check_values(op, check_token_rows(op, rows, weights, row_of));
  const Tensor grad = check_token_grad(op, a, grad_any);
  const int64_t tokens = a.tokens, k = a.k, width = a.width;
  const int32_t* row = const_data<int32_t>(a.row_of);
  Tensor grad_rows = new_zeros(a.rows, {a.rows.size(0), width}, a.rows.scalar_type());
  Tensor grad_weights = new_zeros(*a.weights, {tokens, k}, a.weights->scalar_type());
  dispatch_float(op, a.rows.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = compute_t<T>;
    const T* upstream = const_data<T>(grad);
    const T* source = const_data<T>(a.rows);
    const A* weight = const_data<A>(a.weights);
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
