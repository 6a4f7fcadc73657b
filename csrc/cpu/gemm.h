// Matrix products on raw row-major blocks, through torch's own GEMM.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "../checks.h"

namespace m2mkd::cpu {

// A row-major block of memory as a matrix operand; transposed reads it column by column.
template <typename T>
Tensor matrix(const T* data, int64_t rows, int64_t cols, bool transposed = false) {
  const std::array<int64_t, 2> sizes = {transposed ? cols : rows, transposed ? rows : cols};
  const std::array<int64_t, 2> strides = {transposed ? 1 : cols, transposed ? cols : 1};
  // Operands are never written through; torch has no tensor over const memory.
  return torch::stable::from_blob(const_cast<T*>(data), {sizes.data(), 2}, {strides.data(), 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  scalar_type_of<T>());
}

// out = a b, or out += a b. Goes to the CPU kernel directly, so no autocast rule interferes.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false) {
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

}  // namespace m2mkd::cpu
