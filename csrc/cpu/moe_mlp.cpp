// Expert layers on the CPU. The GEMMs are torch's; what surrounds them (gather, bias, activation,
// combine) is done block by block while the rows are in cache, so that inference allocates nothing
// of M rows, and training only the pre-activation.

#include <torch/csrc/stable/library.h>

#include "../moe_arguments.h"
#include "../plan.h"
#include "experts.h"
#include "gemm.h"
#include "pool.h"
#include "rows.h"

namespace m2mkd::cpu {

namespace {

// Rows per block: few enough that buffers stay small, enough for the GEMMs to keep several threads
// busy (with two threads, 512 rows cost a fifth of forward's speed). In half precision backward
// takes larger blocks, because each further block of an expert rounds its weight gradients once
// more.
constexpr int64_t kForwardRows = 2048;
template <typename T>
constexpr int64_t kBackwardRows = sizeof(T) == 2 ? 4096 : 1024;

// Checked arguments with the values of the plan looked at: bounds are offsets.
struct MlpArguments : MlpTensors {
  std::vector<int64_t> bounds;
  Activation act;
};

MlpArguments check_values(const char* op, MlpTensors tensors, const std::string& activation) {
  MlpArguments a{std::move(tensors), {}, parse_activation<Activation>(op, activation)};
  a.bounds = check_offsets(op, const_data<int32_t>(a.offsets), a.experts, a.rows);
  check_entries(op, "token_of", const_data<int32_t>(a.token_of), a.bounds.back(), 0, a.tokens);
  check_entries(op, "row_of", const_data<int32_t>(a.row_of), a.tokens * a.k, -1, a.bounds.back());
  return a;
}

// The choice that each row serves, as an index into [T, K]; -1 for none.
std::vector<int64_t> choice_of_rows(const MlpArguments& a) {
  std::vector<int64_t> choice(a.rows, -1);
  const int32_t* row = const_data<int32_t>(a.row_of);
  for (int64_t i = 0; i < a.tokens * a.k; ++i) {
    if (row[i] >= 0) {
      choice[row[i]] = i;
    }
  }
  return choice;
}

template <typename T>
std::vector<compute_t<T>> weight_of_rows(const MlpArguments& a,
                                         const std::vector<int64_t>& choice) {
  const auto* weights = const_data<compute_t<T>>(a.weights);
  std::vector<compute_t<T>> weight(a.rows, 0);
  for (int64_t r = 0; r < a.rows; ++r) {
    if (choice[r] >= 0) {
      weight[r] = weights[choice[r]];
    }
  }
  return weight;
}

// Sums over tokens in the compute type: the output itself where its type is that one.
template <typename T>
struct TokenSums {
  Tensor out, sums;

  explicit TokenSums(const MlpArguments& a) : out(make(a, a.dtype)), sums(out) {
    if (scalar_type_of<T>() != scalar_type_of<compute_t<T>>()) {
      sums = make(a, scalar_type_of<compute_t<T>>());
    }
    auto* data = mutable_data<compute_t<T>>(sums);
    parallel_items(a.tokens, a.width * int64_t{sizeof(T)}, [&](int64_t begin, int64_t end) {
      std::fill(data + begin * a.width, data + end * a.width, compute_t<T>(0));
    });
  }

  static Tensor make(const MlpArguments& a, ScalarType dtype) {
    return new_empty(a.x, {a.tokens, a.width}, dtype);
  }

  compute_t<T>* data() const { return mutable_data<compute_t<T>>(sums); }

  Tensor finish() const {
    if constexpr (!std::is_same_v<T, compute_t<T>>) {
      store(mutable_data<T>(out), data(), out.numel());
    }
    return out;
  }
};

template <typename T>
void activate_block(Activation act, const T* z, const T* bias, T* out, int64_t rows, int64_t n) {
  parallel_items(rows, 2 * n * int64_t{sizeof(T)}, [&](int64_t begin, int64_t end) {
    activate(act, z + begin * n, bias, out + begin * n, end - begin, n);
  });
}

// Start of expert e's part of a bias or weight; null stays null.
template <typename T>
const T* of_expert(const T* all, int64_t e, int64_t size) {
  return all != nullptr ? all + e * size : nullptr;
}

template <typename T>
std::tuple<Tensor, Tensor> mlp_forward(const MlpArguments& a, bool save) {
  const int64_t block = largest_block(a.bounds, kForwardRows);
  const T* fc1 = const_data<T>(a.fc1_weight);
  const T* fc2 = const_data<T>(a.fc2_weight);
  const int32_t* token = const_data<int32_t>(a.token_of);
  const auto weight = weight_of_rows<T>(a, choice_of_rows(a));
  const TokenSums<T> sums(a);
  const Tensor saved = pooled_empty(a.x, save ? a.rows : 0, a.hidden, a.dtype);
  const Tensor inputs = pooled_empty(a.x, block, a.width, a.dtype);
  const Tensor actives = pooled_empty(a.x, block, a.hidden, a.dtype);
  const Tensor outputs = pooled_empty(a.x, block, a.width, a.dtype);
  T* input = mutable_data<T>(inputs);
  T* active = mutable_data<T>(actives);
  T* output = mutable_data<T>(outputs);
  for_each_block(a.bounds, kForwardRows, [&](int64_t e, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    T* z = save ? mutable_data<T>(saved) + begin * a.hidden : active;
    gather_rows(const_data<T>(a.x), token + begin, input, n, a.width);
    multiply(matrix(z, n, a.hidden), matrix(input, n, a.width),
             matrix(fc1 + e * a.hidden * a.width, a.hidden, a.width, true));
    activate_block(a.act, z, of_expert(const_data<T>(a.fc1_bias), e, a.hidden), active, n,
                   a.hidden);
    multiply(matrix(output, n, a.width), matrix(active, n, a.hidden),
             matrix(fc2 + e * a.hidden * a.width, a.width, a.hidden, true));
    scatter_add(output, of_expert(const_data<T>(a.fc2_bias), e, a.width), weight.data() + begin,
                token + begin, sums.data(), n, a.width);
  });
  if (save) {
    std::fill(mutable_data<T>(saved) + a.bounds.back() * a.hidden,
              mutable_data<T>(saved) + a.rows * a.hidden, T(0));
  }
  return {sums.finish(), saved};
}

// What backward is asked for, and where it goes. Gradients of expert parameters are [E, ...].
struct MlpGradients {
  bool needs_x, needs_fc1, needs_fc2;
  Tensor weights, fc1_weight, fc1_bias, fc2_weight, fc2_bias;
};

// The element-wise part of one block's backward: turns hidden gradients into those of the
// pre-activation in place, and leaves gate gradients, weighted activations and bias gradients.
template <typename T>
struct BlockBackward {
  const T* z;
  const T* fc1_bias;
  const T* fc2_bias;
  const T* upstream;
  T* hidden_grad;
  T* weighted;                 // null where fc2 needs no gradient
  compute_t<T>* fc1_bias_sum;  // null where fc1 needs no gradient
  compute_t<T>* fc2_bias_sum;  // null where fc2 needs no gradient
  const compute_t<T>* weight;
  const int64_t* choice;
  compute_t<T>* gate_grad;  // [T, K]

  void run(const MlpArguments& a, int64_t rows) const {
    using A = compute_t<T>;
    const int64_t lane_size = a.hidden + a.width;
    std::vector<A> partial(torch::stable::get_num_threads() * lane_size, A(0));
    parallel_lanes(3 * rows * a.hidden * int64_t{sizeof(T)}, [&](int64_t lane, int64_t lanes) {
      A* fc1_sum = fc1_bias_sum != nullptr ? partial.data() + lane * lane_size : nullptr;
      A* fc2_sum = partial.data() + lane * lane_size + a.hidden;
      for (int64_t r = rows * lane / lanes; r < rows * (lane + 1) / lanes; ++r) {
        const T* grad_row = upstream + r * a.width;
        const BackwardRow<T> row{z + r * a.hidden, fc1_bias, hidden_grad + r * a.hidden,
                                 weighted != nullptr ? weighted + r * a.hidden : nullptr, fc1_sum};
        A gate = activate_backward(a.act, row, weight[r], a.hidden);
        if (fc2_bias != nullptr) {
          gate += dot(grad_row, fc2_bias, a.width);
        }
        if (choice[r] >= 0) {
          gate_grad[choice[r]] = gate;
        }
        if (fc2_bias_sum != nullptr) {
          add_scaled(fc2_sum, grad_row, static_cast<const T*>(nullptr), weight[r], a.width);
        }
      }
    });
    for (size_t lane = 0; lane < partial.size(); lane += lane_size) {
      if (fc1_bias_sum != nullptr) {
        add_scaled(fc1_bias_sum, partial.data() + lane, static_cast<const A*>(nullptr), A(1),
                   a.hidden);
      }
      if (fc2_bias_sum != nullptr) {
        add_scaled(fc2_bias_sum, partial.data() + lane + a.hidden, static_cast<const A*>(nullptr),
                   A(1), a.width);
      }
    }
  }
};

template <typename T>
Tensor mlp_backward(const MlpArguments& a, const Tensor& grad, const Tensor& saved,
                    const MlpGradients& want) {
  using A = compute_t<T>;
  const bool recompute = saved.size(0) == 0;
  const int64_t block = largest_block(a.bounds, kBackwardRows<T>);
  const int64_t size = a.hidden * a.width;
  const T* fc1 = const_data<T>(a.fc1_weight);
  const T* fc2 = const_data<T>(a.fc2_weight);
  const int32_t* token = const_data<int32_t>(a.token_of);
  const auto choice = choice_of_rows(a);
  const auto weight = weight_of_rows<T>(a, choice);
  std::optional<TokenSums<T>> x_sums;
  if (want.needs_x) {
    x_sums.emplace(a);
  }
  const auto buffer = [&](int64_t rows, int64_t cols) {
    return pooled_empty(a.x, rows, cols, a.dtype);
  };
  const Tensor upstreams = buffer(block, a.width);
  const Tensor hidden_grads = buffer(block, a.hidden);
  const Tensor inputs = buffer(want.needs_fc1 || recompute ? block : 0, a.width);
  const Tensor weighteds = buffer(want.needs_fc2 ? block : 0, a.hidden);
  const Tensor recomputeds = buffer(recompute ? block : 0, a.hidden);
  const Tensor input_grads = buffer(want.needs_x ? block : 0, a.width);
  T* upstream = mutable_data<T>(upstreams);
  T* hidden_grad = mutable_data<T>(hidden_grads);
  T* input = mutable_data<T>(inputs);
  T* weighted = mutable_data<T>(weighteds);
  std::vector<A> fc1_bias_sums(want.needs_fc1 ? a.experts * a.hidden : 0, A(0));
  std::vector<A> fc2_bias_sums(want.needs_fc2 ? a.experts * a.width : 0, A(0));
  for_each_block(a.bounds, kBackwardRows<T>, [&](int64_t e, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    const bool further = begin > a.bounds[e];
    const T* z =
        const_data<T>(recompute ? recomputeds : saved) + (recompute ? 0 : begin * a.hidden);
    gather_rows(const_data<T>(grad), token + begin, upstream, n, a.width);
    if (want.needs_fc1 || recompute) {
      gather_rows(const_data<T>(a.x), token + begin, input, n, a.width);
    }
    if (recompute) {
      multiply(matrix(z, n, a.hidden), matrix(input, n, a.width),
               matrix(fc1 + e * size, a.hidden, a.width, true));
    }
    multiply(matrix(hidden_grad, n, a.hidden), matrix(upstream, n, a.width),
             matrix(fc2 + e * size, a.width, a.hidden));
    BlockBackward<T>{z,
                     of_expert(const_data<T>(a.fc1_bias), e, a.hidden),
                     of_expert(const_data<T>(a.fc2_bias), e, a.width),
                     upstream,
                     hidden_grad,
                     want.needs_fc2 ? weighted : nullptr,
                     want.needs_fc1 ? fc1_bias_sums.data() + e * a.hidden : nullptr,
                     want.needs_fc2 ? fc2_bias_sums.data() + e * a.width : nullptr,
                     weight.data() + begin,
                     choice.data() + begin,
                     mutable_data<A>(want.weights)}
        .run(a, n);
    if (want.needs_fc2) {
      multiply(matrix(mutable_data<T>(want.fc2_weight) + e * size, a.width, a.hidden),
               matrix(upstream, n, a.width, true), matrix(weighted, n, a.hidden), further);
    }
    if (want.needs_fc1) {
      multiply(matrix(mutable_data<T>(want.fc1_weight) + e * size, a.hidden, a.width),
               matrix(hidden_grad, n, a.hidden, true), matrix(input, n, a.width), further);
    }
    if (want.needs_x) {
      T* input_grad = mutable_data<T>(input_grads);
      multiply(matrix(input_grad, n, a.width), matrix(hidden_grad, n, a.hidden),
               matrix(fc1 + e * size, a.hidden, a.width));
      scatter_add(input_grad, static_cast<const T*>(nullptr), static_cast<const A*>(nullptr),
                  token + begin, x_sums->data(), n, a.width);
    }
  });
  for (int64_t e = 0; e < a.experts; ++e) {
    if (a.bounds[e] == a.bounds[e + 1]) {
      for (const auto& [needed, part] : {std::pair{want.needs_fc1, &want.fc1_weight},
                                         std::pair{want.needs_fc2, &want.fc2_weight}}) {
        if (needed) {
          std::fill_n(mutable_data<T>(*part) + e * size, size, T(0));
        }
      }
    }
  }
  store(mutable_data<T>(want.fc1_bias), fc1_bias_sums.data(), fc1_bias_sums.size());
  store(mutable_data<T>(want.fc2_bias), fc2_bias_sums.data(), fc2_bias_sums.size());
  return want.needs_x ? x_sums->finish() : new_empty(a.x, {0, a.width}, a.dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& weights, const Tensor& row_of,
                                   const Tensor& token_of, const Tensor& offsets,
                                   const Tensor& fc1_weight, std::optional<Tensor> fc1_bias,
                                   const Tensor& fc2_weight, std::optional<Tensor> fc2_bias,
                                   std::string activation, bool save) {
  const char* op = "moe_mlp";
  const MlpArguments a = check_values(op,
                                      check_mlp(op, x, weights, row_of, token_of, offsets,
                                                fc1_weight, fc1_bias, fc2_weight, fc2_bias),
                                      activation);
  return dispatch_float(
      op, a.dtype, [&](auto tag) { return mlp_forward<typename decltype(tag)::type>(a, save); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(
    const Tensor& grad, const Tensor& hidden, const Tensor& x, const Tensor& weights,
    const Tensor& row_of, const Tensor& token_of, const Tensor& offsets, const Tensor& fc1_weight,
    std::optional<Tensor> fc1_bias, const Tensor& fc2_weight, std::optional<Tensor> fc2_bias,
    std::string activation, bool needs_x, bool needs_fc1, bool needs_fc2) {
  const char* op = "moe_mlp_backward";
  const MlpArguments a = check_values(op,
                                      check_mlp(op, x, weights, row_of, token_of, offsets,
                                                fc1_weight, fc1_bias, fc2_weight, fc2_bias),
                                      activation);
  check_mlp_gradient(op, a, grad, hidden);
  const auto parts = [&](bool needed, const std::vector<int64_t>& sizes) {
    std::vector<int64_t> found = sizes;
    found[0] = needed ? found[0] : 0;
    return new_empty(a.x, found, a.dtype);
  };
  const MlpGradients want{needs_x,
                          needs_fc1,
                          needs_fc2,
                          new_zeros(a.weights, {a.tokens, a.k}, a.weights.scalar_type()),
                          parts(needs_fc1, {a.experts, a.hidden, a.width}),
                          parts(needs_fc1, {a.experts, a.hidden}),
                          parts(needs_fc2, {a.experts, a.width, a.hidden}),
                          parts(needs_fc2, {a.experts, a.width})};
  const Tensor x_grad = dispatch_float(op, a.dtype, [&](auto tag) {
    return mlp_backward<typename decltype(tag)::type>(a, torch::stable::contiguous(grad),
                                                      torch::stable::contiguous(hidden), want);
  });
  return {x_grad, want.weights, want.fc1_weight, want.fc1_bias, want.fc2_weight, want.fc2_bias};
}

}  // namespace m2mkd::cpu

STABLE_TORCH_LIBRARY_IMPL(m2mkd, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&m2mkd::cpu::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&m2mkd::cpu::moe_mlp_backward));
}
