// One linear layer per expert on the CPU, over rows sorted by expert.

#include <torch/csrc/stable/library.h>

#include "../moe_arguments.h"
#include "../plan.h"
#include "experts.h"
#include "gemm.h"
#include "rows.h"

namespace m2mkd::cpu {

namespace {

// Where each expert's rows begin and end.
std::vector<int64_t> bounds_of(const char* op, const Grouped& a) {
  return check_offsets(op, const_data<int32_t>(a.offsets), a.experts, a.count);
}

// Column sums of rows [begin, end) in order of rows; every column has one writer.
template <typename T>
void sum_columns(const T* rows, int64_t begin, int64_t end, int64_t width, T* out) {
  using A = compute_t<T>;
  constexpr int64_t kColumns = 64;
  const int64_t blocks = (width + kColumns - 1) / kColumns;
  parallel_items(
      blocks, (end - begin) * kColumns * int64_t{sizeof(T)}, [&](int64_t lo, int64_t hi) {
        for (int64_t b = lo; b < hi; ++b) {
          A sums[kColumns] = {};
          const int64_t first = b * kColumns, n = std::min(kColumns, width - first);
          for (int64_t r = begin; r < end; ++r) {
            add_scaled(sums, rows + r * width + first, static_cast<const T*>(nullptr), A(1), n);
          }
          store(out + first, sums, n);
        }
      });
}

}  // namespace

Tensor grouped_linear(const Tensor& rows, const Tensor& weight, std::optional<Tensor> bias_any,
                      const Tensor& offsets) {
  const char* op = "grouped_linear";
  const Grouped a = check_grouped(op, rows, weight, offsets);
  const std::vector<int64_t> bounds = bounds_of(op, a);
  const std::optional<Tensor> bias = check_bias(op, "bias", bias_any, a.experts, a.out, a.rows);
  Tensor result = new_empty(a.rows, {a.count, a.out}, a.rows.scalar_type());
  dispatch_float(op, a.rows.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* out = mutable_data<T>(result);
    for (int64_t e = 0; e < a.experts; ++e) {
      const int64_t begin = bounds[e], n = bounds[e + 1] - begin;
      if (n == 0) {
        continue;
      }
      const Tensor product = matrix(out + begin * a.out, n, a.out);
      const Tensor left = matrix(const_data<T>(a.rows) + begin * a.in, n, a.in);
      const Tensor right = matrix(const_data<T>(a.weight) + e * a.out * a.in, a.out, a.in, true);
      if (bias) {
        const Tensor start = matrix(const_data<T>(*bias) + e * a.out, 1, a.out);
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(product.get(), start.get(),
                                                               left.get(), right.get(), 1.0, 1.0));
      } else {
        multiply(product, left, right);
      }
    }
    std::fill(out + bounds.back() * a.out, out + a.count * a.out, T(0));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(const Tensor& grad_any,
                                                           const Tensor& rows, const Tensor& weight,
                                                           const Tensor& offsets, bool needs_rows,
                                                           bool needs_weight) {
  const char* op = "grouped_linear_backward";
  const Grouped a = check_grouped(op, rows, weight, offsets);
  const std::vector<int64_t> bounds = bounds_of(op, a);
  const ScalarType dtype = a.rows.scalar_type();
  const Tensor grad = check_grouped_grad(op, a, grad_any);
  const int64_t experts = needs_weight ? a.experts : 0;
  Tensor rows_grad = new_empty(a.rows, {needs_rows ? a.count : 0, a.in}, dtype);
  Tensor weight_grad = new_zeros(a.rows, {experts, a.out, a.in}, dtype);
  Tensor bias_grad = new_zeros(a.rows, {experts, a.out}, dtype);
  dispatch_float(op, dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* upstream = const_data<T>(grad);
    T* down = mutable_data<T>(rows_grad);
    for (int64_t e = 0; e < a.experts; ++e) {
      const int64_t begin = bounds[e], n = bounds[e + 1] - begin;
      if (n == 0) {
        continue;
      }
      if (needs_rows) {
        multiply(matrix(down + begin * a.in, n, a.in), matrix(upstream + begin * a.out, n, a.out),
                 matrix(const_data<T>(a.weight) + e * a.out * a.in, a.out, a.in));
      }
      if (needs_weight) {
        multiply(matrix(mutable_data<T>(weight_grad) + e * a.out * a.in, a.out, a.in),
                 matrix(upstream + begin * a.out, n, a.out, true),
                 matrix(const_data<T>(a.rows) + begin * a.in, n, a.in));
        sum_columns(upstream, begin, begin + n, a.out, mutable_data<T>(bias_grad) + e * a.out);
      }
    }
    if (needs_rows) {
      std::fill(down + bounds.back() * a.in, down + a.count * a.in, T(0));
    }
  });
  return {rows_grad, weight_grad, bias_grad};
}

}  // namespace m2mkd::cpu

STABLE_TORCH_LIBRARY_IMPL(m2mkd, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&m2mkd::cpu::grouped_linear));
  m.impl("grouped_linear_backward", TORCH_BOX(&m2mkd::cpu::grouped_linear_backward));
}
