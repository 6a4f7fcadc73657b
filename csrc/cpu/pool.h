// Memory for what a training step saves and for work space, kept for the next step.
//
// Blocks beyond malloc's mmap threshold (32 MB at most) are otherwise returned to the system at
// every free, and taking 155 MB anew costs 50 ms and more in page faults: as much as all the other
// work between the GEMMs.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <mutex>
#include <vector>

#include "../checks.h"

namespace m2mkd::cpu {

class Pool {
 public:
  // Never destroyed: tensors may outlive static destruction.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  struct Block {
    void* data;
    int64_t bytes;
  };

  // The smallest kept block that fits without wasting more than a quarter, or fresh memory.
  Block take(int64_t wanted) {
    const int64_t bytes = (wanted + kPage - 1) / kPage * kPage;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = kept_.end();
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        if (it->bytes >= bytes && it->bytes <= bytes + bytes / 4 &&
            (best == kept_.end() || it->bytes < best->bytes)) {
          best = it;
        }
      }
      if (best != kept_.end()) {
        const Block block = *best;
        total_ -= block.bytes;
        kept_.erase(best);
        return block;
      }
    }
    void* data = std::aligned_alloc(kPage, bytes);
    STD_TORCH_CHECK(data != nullptr, "m2mkd: out of memory for ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return {data, bytes};
  }

  // Keeps the block; where that exceeds the limit the longest unused ones go.
  void give_back(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(block);
    total_ += block.bytes;
    while (total_ > kLimit) {
      total_ -= kept_.front().bytes;
      std::free(kept_.front().data);
      kept_.erase(kept_.begin());
    }
  }

 private:
  static constexpr int64_t kPage = int64_t{2} << 20;
  static constexpr int64_t kLimit = int64_t{1} << 30;

  std::mutex mutex_;
  std::vector<Block> kept_;
  int64_t total_ = 0;
};

// An uninitialised CPU tensor, from the pool where it is large.
inline Tensor pooled_empty(const Tensor& like, const std::vector<int64_t>& sizes,
                           ScalarType dtype) {
  constexpr int64_t kLarge = int64_t{1} << 20;
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = i + 1 < sizes.size() ? strides[i + 1] * sizes[i + 1] : 1;
    bytes *= sizes[i];
  }
  if (bytes < kLarge) {
    return new_empty(like, sizes, dtype);
  }
  const Pool::Block block = Pool::instance().take(bytes);
  return torch::stable::from_blob(block.data, {sizes.data(), sizes.size()},
                                  {strides.data(), strides.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [block](void*) { Pool::instance().give_back(block); });
}

inline Tensor pooled_empty(const Tensor& like, int64_t rows, int64_t cols, ScalarType dtype) {
  return pooled_empty(like, {rows, cols}, dtype);
}

}  // namespace m2mkd::cpu
