// What the CUDA op wrappers share: dtypes, checks, and GEMMs through torch.

#pragma once

#include <torch/csrc/stable/library.h>

#include <vector>

#include "../checks.h"
#include "../plan.h"
#include "launchers.h"

// Tensors' memory, stream, error text and GEMMs of the device: the card's, or the emulator's.
#ifdef M2MKD_EMULATOR
#include "../emulator/device.h"
#else
#include "device.h"
#endif

namespace m2mkd::cuda {

inline DType dtype_of(const char* op, const Tensor& tensor) {
  return dispatch_float(op, tensor.scalar_type(), [](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, float>) {
      return DType::f32;
    } else if constexpr (std::is_same_v<T, double>) {
      return DType::f64;
    } else if constexpr (std::is_same_v<T, c10::Half>) {
      return DType::f16;
    } else {
      return DType::bf16;
    }
  });
}

// Kernels index rows and columns with int, and loops over them run past the end by less than a
// block's threads.
inline int to_int(const char* op, const char* what, int64_t value) {
  check_int32_range(op, what, value + 256);
  return static_cast<int>(value);
}

// Offsets on the host: waits for the device.
inline std::vector<int64_t> read_offsets(const char* op, const Tensor& offsets, int64_t rows,
                                         void* stream) {
  const int64_t count = offsets.size(0);
  std::vector<int32_t> values(count);
  check_launch(
      op, read_integers(read<int32_t>(offsets), static_cast<int>(count), values.data(), stream));
  return check_offsets(op, values.data(), count - 1, rows);
}

// Products of each expert's rows with its matrices. bfloat16 with widths of whole 16-byte packs
// goes to torch's grouped GEMM, which on cards of compute capability 9.0 and 10.0 needs no offsets
// on the host (on others it loops itself); everything else is one GEMM per expert, after waiting
// for the offsets once.
class ExpertGemm {
 public:
  ExpertGemm(const char* op, const Tensor& rows, const Tensor& offsets, int64_t in, int64_t out,
             void* stream)
      : grouped_(rows.scalar_type() == ScalarType::BFloat16 && in % 8 == 0 && out % 8 == 0 &&
                 in > 0 && out > 0 && rows.size(0) > 0),
        offsets_(offsets) {
    if (!grouped_) {
      bounds_ = read_offsets(op, offsets, rows.size(0), stream);
    }
  }

  // result[r] = rows[r] m[e], or m[e] transposed, for m [E, ...]. Rows past the last offset are
  // left as they are or hold anything.
  Tensor rows_by_matrix(const Tensor& rows, const Tensor& m, bool transpose) const;

  // result[e] = sum over the rows of e of left[r]^T right[r], [E, left width, right width].
  Tensor rows_by_rows(const Tensor& left, const Tensor& right) const;

 private:
  Tensor grouped(const Tensor& a, const Tensor& b) const;

  bool grouped_;
  Tensor offsets_;
  std::vector<int64_t> bounds_;
};

}  // namespace m2mkd::cuda
