// The card as op wrappers see it. csrc/emulator/device.h has the same names for tests without one.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "../checks.h"

// Opens the block that registers CUDA kernels: M2MKD_CUDA_OPS(m) { m.impl(...); }
#define M2MKD_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(m2mkd, CUDA, m)

namespace m2mkd::cuda {

// Pointers for launchers, null for an absent tensor. What a launcher may do with each is checked by
// the emulator only: `read` is not written, `write` gets every element from the launch and holds
// nothing before, `update` is read and written, or written in part.
template <typename T = void>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T = void>
T* update(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T = void>
T* write(const Tensor& tensor) {
  return update<T>(tensor);
}

template <typename T = void>
const T* read(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}

template <typename T = void>
T* write(const std::optional<Tensor>& tensor) {
  return tensor ? write<T>(*tensor) : nullptr;
}

// Ends a launch: raises for a cudaError_t, with torch's message.
inline void check_launch(const char* op, int error) {
  if (error == 0) {
    return;
  }
  char* text = nullptr;
  torch_c10_cuda_check_msg(error, __FILE__, op, __LINE__, true, &text);
  const std::string message = text != nullptr ? text : "CUDA error " + std::to_string(error);
  torch_c10_cuda_free_error_msg(text);
  STD_TORCH_CHECK(false, op, ": ", message);
}

// Makes a tensor's device current and knows its stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// For the emulator, whose grouped GEMM is the CPU's: that of CUDA looks at its operands itself.
inline void check_operand(const Tensor& /*operand*/) {}

// out = a b for matrices of any strides.
inline void matmul_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace m2mkd::cuda
