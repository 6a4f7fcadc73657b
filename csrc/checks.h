// Argument checks and small tensor helpers shared by the op wrappers. The Python side has checked
// the same things with friendlier words; these keep C++ callers from reading out of bounds.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace m2mkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Element-wise arithmetic is done in float, or in double on doubles.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>) {
    return ScalarType::Double;
  } else if constexpr (std::is_same_v<T, float>) {
    return ScalarType::Float;
  } else if constexpr (std::is_same_v<T, c10::Half>) {
    return ScalarType::Half;
  } else {
    static_assert(std::is_same_v<T, c10::BFloat16>);
    return ScalarType::BFloat16;
  }
}

// Calls f(TypeTag<T>{}) with the C++ type of a floating dtype.
template <typename F>
auto dispatch_float(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(TypeTag<float>{});
    case ScalarType::Double:
      return f(TypeTag<double>{});
    case ScalarType::Half:
      return f(TypeTag<c10::Half>{});
    case ScalarType::BFloat16:
      return f(TypeTag<c10::BFloat16>{});
    default:
      STD_TORCH_CHECK(false, op, ": needs float16, bfloat16, float32 or float64, got ",
                      toString(dtype));
  }
}

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        const std::vector<int64_t>& shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  }
  std::string expected, found;
  if (!same) {
    for (int64_t size : shape) {
      expected += std::to_string(size) + " ";
    }
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      found += std::to_string(tensor.size(i)) + " ";
    }
  }
  STD_TORCH_CHECK(same, op, ": ", name, " has sizes [ ", found, "], expected [ ", expected, "]");
}

inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank) {
  STD_TORCH_CHECK(tensor.dim() == rank, op, ": ", name, " has ", tensor.dim(),
                  " dimensions, expected ", rank);
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " is ",
                  toString(tensor.scalar_type()), ", expected ", toString(dtype));
}

// Tensors by name; null for one that was not given.
using NamedTensors = std::initializer_list<std::pair<const char*, const Tensor*>>;

inline const Tensor* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

// Raises unless all lie where `first` does: a kernel would take their addresses for its device's.
inline void check_together(const char* op, const Tensor& first, NamedTensors others) {
  for (const auto& [name, tensor] : others) {
    STD_TORCH_CHECK(tensor == nullptr || tensor->device() == first.device(), op, ": ", name,
                    " is on another device than other tensors");
  }
}

inline void check_int32_range(const char* op, const char* what, int64_t count) {
  STD_TORCH_CHECK(count <= INT32_MAX, op, ": ", what, " is ", count, ", over the int32 limit");
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor new_zeros(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* const_data(const std::optional<Tensor>& tensor) {
  return tensor ? const_data<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace m2mkd
