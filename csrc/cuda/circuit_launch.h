// How launches of the circuit kernels are fitted to a problem and the device.

#pragma once

#include <initializer_list>

#include "circuit_warp.h"
#include "launchers.h"

namespace m2mkd::cuda {

// How a launch divides the rows of every (batch, head), or of every batch with its heads in parts.
struct Split {
  bool staged;
  int rows;  // per block
  int row_blocks;
  int parts;
  int shared_bytes;
};

constexpr int kDirectThreads = 128;  // of a block
// Blocks wanted per multiprocessor: some two waves of what its registers (direct) or its shared
// memory (staged) hold at a time.
constexpr int kDirectBlocks = 10;
constexpr int kStagedBlocks = 4;
// Reads from shared memory that each row copied there must serve.
constexpr int kStagingGain = 4;

// Whether rows may be copied to shared memory. float64 ones are not: they serve to check gradients,
// and this halves the number of kernels for them.
template <typename T>
constexpr bool kStages = sizeof(T) < 8;

// Divides `pairs` times `all_rows` rows, each against some of `others` rows, into blocks.
//
// Direct blocks read the other side through L1 and L2. Staging copies both of its tables,
// 2 * others rows, once per block, which then reads 2 * rows * edges / all_rows of them: it pays
// where that is kStagingGain times as much, from rows = kStagingGain / density on. It is done where
// the tables fit, a head has that many rows, and there are blocks for every multiprocessor. Beyond
// such minima rows follow from the blocks wanted, so that a block stays with one head, whose rows
// it has in L1 or shared memory, as long as it can; where that leaves too few blocks, `pairs` are
// cut further, into at most `most_parts` parts each.
//
// There are at most max(pairs, 3 * blocks wanted) blocks, so their number fits an int.
template <typename T>
Split split_rows(int64_t pairs, int most_parts, int all_rows, int others, int64_t edges, int width,
                 bool packed, int staged_threads) {
  const DeviceLimits device = device_limits();
  const auto split = [&](int64_t blocks_wanted, int64_t least, int64_t warps) {
    const int64_t even = pairs * all_rows / blocks_wanted;
    const int64_t wanted = even > least ? even : least;
    const int64_t rows = (wanted + warps - 1) / warps * warps;
    const int64_t row_blocks = (all_rows + rows - 1) / rows;
    const int64_t parts = blocks_wanted / (pairs * row_blocks);
    const int some = parts < 1 ? 1 : parts < most_parts ? int(parts) : most_parts;
    return Split{false, int(rows < all_rows ? rows : all_rows), int(row_blocks), some, 0};
  };
  const int64_t bytes = 2 * int64_t(sizeof(T)) * width * others;
  if (kStages<T> && packed && edges > 0 && bytes <= device.shared_bytes) {
    const int64_t repaid = kStagingGain * int64_t(all_rows) * others / edges;
    Split staged = split(kStagedBlocks * device.multiprocessors, repaid, staged_threads / kWarp);
    if (repaid <= all_rows && pairs * staged.parts * staged.row_blocks >= device.multiprocessors) {
      staged.staged = true;
      staged.shared_bytes = int(bytes);
      return staged;
    }
  }
  return split(kDirectBlocks * device.multiprocessors, 1, kDirectThreads / kWarp);
}

// Lets a staged kernel have more than the usual 48 KB of shared memory. Always the same number, so
// that host threads do not get in each other's way between this and their launch.
template <class L, typename Kernel>
void allow_shared(Kernel* kernel) {
  if constexpr (L::kStaged) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         device_limits().shared_bytes);
  }
}

// Whether rows of this width in these tensors can be moved in packs.
template <typename T>
bool in_packs(int width, std::initializer_list<const void*> tensors) {
  uintptr_t address = 0;
  for (const void* tensor : tensors) {
    address |= reinterpret_cast<uintptr_t>(tensor);
  }
  return width % kPack<T> == 0 && address % 16 == 0;
}

// Calls f with the Layout for `packs` packs.
template <typename T, bool Staged, typename F>
int with_packs(int packs, F&& f) {
  constexpr int N = kPack<T>;
  if constexpr (sizeof(T) == 8) {
    return packs <= 8    ? f(Layout<T, N, 8, 1, Staged>{})
           : packs <= 32 ? f(Layout<T, N, 32, 1, Staged>{})
                         : f(Layout<T, N, 32, 4, Staged>{});
  } else {
    if constexpr (sizeof(T) == 4) {
      if (packs > 32) {
        return f(Layout<T, N, 32, 2, Staged>{});
      }
    } else if (packs <= 1) {
      return f(Layout<T, N, 1, 1, Staged>{});
    }
    return packs <= 2    ? f(Layout<T, N, 2, 1, Staged>{})
           : packs <= 4  ? f(Layout<T, N, 4, 1, Staged>{})
           : packs <= 8  ? f(Layout<T, N, 8, 1, Staged>{})
           : packs <= 16 ? f(Layout<T, N, 16, 1, Staged>{})
                         : f(Layout<T, N, 32, 1, Staged>{});
  }
}

// Calls f with the Layout for a width of at most kMaxHeadWidth.
template <typename T, typename F>
int with_layout(int width, bool packed, bool staged, F&& f) {
  if (!packed) {
    return width <= kWarp ? f(Layout<T, 1, 32, 1, false>{}) : f(Layout<T, 1, 32, 8, false>{});
  }
  if constexpr (kStages<T>) {
    if (staged) {
      return with_packs<T, true>(width / kPack<T>, f);
    }
  }
  return with_packs<T, false>(width / kPack<T>, f);
}

}  // namespace m2mkd::cuda
