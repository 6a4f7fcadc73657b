#include <array>

#include "common.h"

namespace m2mkd::cuda {

namespace {

Tensor part(const Tensor& tensor, int64_t begin, int64_t end) {
  Tensor source = tensor;
  return torch::stable::narrow(source, 0, begin, end - begin);
}

// A contiguous tensor as the grouped GEMM takes it: at a whole 16-byte address, which views into
// larger tensors may miss, and a row behind the other, which contiguous tensors of one row need not
// be.
Tensor in_packs(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (address % 16 == 0 && tensor.stride(last - 1) == tensor.size(last)) {
    return tensor;
  }
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i <= last; ++i) {
    sizes.push_back(tensor.size(i));
  }
  Tensor copy = new_empty(tensor, sizes, tensor.scalar_type());
  return torch::stable::copy_(copy, tensor);
}

}  // namespace

Tensor ExpertGemm::grouped(const Tensor& a, const Tensor& b) const {
  check_operand(a);
  check_operand(b);
  Tensor all = offsets_;
  const std::optional<Tensor> ends = torch::stable::narrow(all, 0, 1, offsets_.size(0) - 1);
  std::array<StableIValue, 5> stack = {
      torch::stable::detail::from(a), torch::stable::detail::from(b),
      torch::stable::detail::from(ends), torch::stable::detail::from(std::optional<Tensor>()),
      torch::stable::detail::from(std::optional<ScalarType>())};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_grouped_mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor ExpertGemm::rows_by_matrix(const Tensor& rows, const Tensor& m, bool transpose) const {
  const auto oriented = [&](const Tensor& x) {
    return transpose ? torch::stable::transpose(x, 1, 2) : x;
  };
  if (grouped_) {
    return grouped(in_packs(rows), oriented(in_packs(m)));
  }
  const Tensor right = oriented(m);
  const Tensor out = new_empty(rows, {rows.size(0), right.size(2)}, rows.scalar_type());
  for (size_t e = 0; e + 1 < bounds_.size(); ++e) {
    if (bounds_[e] < bounds_[e + 1]) {
      matmul_out(part(out, bounds_[e], bounds_[e + 1]), part(rows, bounds_[e], bounds_[e + 1]),
                 torch::stable::select(right, 0, static_cast<int64_t>(e)));
    }
  }
  return out;
}

Tensor ExpertGemm::rows_by_rows(const Tensor& left, const Tensor& right) const {
  if (grouped_) {
    return grouped(torch::stable::transpose(in_packs(left), 0, 1), in_packs(right));
  }
  const int64_t experts = offsets_.size(0) - 1;
  const Tensor out = new_zeros(left, {experts, left.size(1), right.size(1)}, left.scalar_type());
  for (size_t e = 0; e + 1 < bounds_.size(); ++e) {
    if (bounds_[e] < bounds_[e + 1]) {
      matmul_out(torch::stable::select(out, 0, static_cast<int64_t>(e)),
                 torch::stable::transpose(part(left, bounds_[e], bounds_[e + 1]), 0, 1),
                 part(right, bounds_[e], bounds_[e + 1]));
    }
  }
  return out;
}

}  // namespace m2mkd::cuda
