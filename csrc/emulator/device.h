// The emulator as op wrappers see it: the names of cuda/device.h. Tensors are the CPU's; kernels
// get copies of them in emulated device memory.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "../checks.h"
#include "runtime.h"

#define M2MKD_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(M2MKD_NAMESPACE, CPU, m)

namespace m2mkd::cuda {

inline void* device_buffer(const Tensor& tensor, emulator::Access access) {
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  return emulator::device_buffer(tensor.const_data_ptr(), bytes, access);
}

template <typename T = void>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(device_buffer(tensor, emulator::Access::read));
}

template <typename T = void>
T* update(const Tensor& tensor) {
  return static_cast<T*>(device_buffer(tensor, emulator::Access::update));
}

template <typename T = void>
T* write(const Tensor& tensor) {
  return static_cast<T*>(device_buffer(tensor, emulator::Access::write));
}

template <typename T = void>
const T* read(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}

template <typename T = void>
T* write(const std::optional<Tensor>& tensor) {
  return tensor ? write<T>(*tensor) : nullptr;
}

inline void check_launch(const char* op, int /*error*/) {
  const std::string report = emulator::finish();
  STD_TORCH_CHECK(report.empty(), op, ": ", report);
}

class OnDevice {
 public:
  explicit OnDevice(const Tensor& /*tensor*/) {}
  void* stream() const { return nullptr; }
};

// The CPU's grouped GEMM takes any address; CUDA's does not.
inline void check_operand(const Tensor& operand) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(operand.const_data_ptr()) % 16 == 0,
                  "grouped GEMM: an operand's address is not a multiple of 16 bytes");
}

inline void matmul_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace m2mkd::cuda
