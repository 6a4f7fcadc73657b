// How launches of the circuit kernels are fitted to widths, addresses and sizes, on the host alone:
// also to sizes too large to run.

#pragma once

#include "circuit_launch.h"
#include "launcher_testing.h"

namespace {

// ---- every width gets lanes and packs that hold a row
// ----------------------------------------------------------------------------------------------

template <typename T>
void test_layout(int width, bool packed, bool staged) {
  with_layout<T>(width, packed, staged, [&](auto layout) {
    using L = decltype(layout);
    const bool holds = width <= L::G * L::kElements && width % L::N == 0 && kWarp % L::G == 0;
    if (!holds || L::N != (packed ? kPack<T> : 1) || L::kStaged != (staged && kStages<T>)) {
      ++failures;
      std::printf("FAILED layout of width %d, %d bytes each: %d x %d x %d%s\n", width,
                  int(sizeof(T)), L::N, L::G, L::C, L::kStaged ? ", staged" : "");
    }
    return 0;
  });
}

template <typename T>
void test_layouts() {
  for (int width = 1; width <= kMaxHeadWidth; ++width) {
    test_layout<T>(width, false, false);
    for (const bool staged : {false, true}) {
      if (width % kPack<T> == 0) {
        test_layout<T>(width, true, staged);
      }
    }
  }
}

// Rows move in packs where all tensors' addresses and the width allow it, and only there.
template <typename T>
void test_packs() {
  alignas(16) char rows[32];
  for (int moved = 0; moved < 3; ++moved) {
    for (int bytes = 0; bytes < 16; bytes += sizeof(T)) {
      const auto at = [&](int tensor) { return rows + (tensor == moved ? bytes : 0); };
      for (int width = 1; width <= 2 * kPack<T>; ++width) {
        if (in_packs<T>(width, {at(0), at(1), at(2)}) != (bytes == 0 && width % kPack<T> == 0)) {
          ++failures;
          std::printf("FAILED packs of width %d, tensor %d moved by %d bytes\n", width, moved,
                      bytes);
        }
      }
    }
  }
}

// ---- every division into blocks covers its rows once and can be launched
// ----------------------------------------------------------------------------------------------

struct Shape {
  int64_t pairs;
  int most_parts, rows, others;
  int64_t edges;
  int width;
};

// What is wrong with a division, or null.
template <typename T>
const char* fault_of(const Shape& s, const Split& split, bool packed) {
  const DeviceLimits device = device_limits();
  const int64_t blocks = s.pairs * split.parts * split.row_blocks;
  const int64_t few = 3 * std::max(kDirectBlocks, kStagedBlocks) * device.multiprocessors;
  const double bytes = 2.0 * sizeof(T) * s.width * s.others;
  const double pairs_of_rows = double(s.rows) * s.others;
  if (split.rows < 1 || int64_t(split.rows) * split.row_blocks < s.rows ||
      int64_t(split.rows) * (split.row_blocks - 1) >= s.rows) {
    return "blocks do not cover the rows once";
  }
  if (split.parts < 1 || split.parts > s.most_parts) {
    return "wrong number of parts";
  }
  if (blocks > std::max(s.pairs, few)) {
    return "too many blocks";
  }
  if (!split.staged) {
    return split.shared_bytes == 0 ? nullptr : "shared memory for nothing";
  }
  if (!packed || !kStages<T> || split.shared_bytes != bytes || bytes > device.shared_bytes) {
    return "staged where tables cannot be";
  }
  if (blocks < device.multiprocessors ||
      double(split.rows) * s.edges <= kStagingGain * pairs_of_rows - s.edges) {
    return "staged where that does not pay";
  }
  return nullptr;
}

template <typename T>
void test_split(const Shape& s, bool packed) {
  const int threads = 320;  // of a staged block
  const Split split =
      split_rows<T>(s.pairs, s.most_parts, s.rows, s.others, s.edges, s.width, packed, threads);
  if (const char* fault = fault_of<T>(s, split, packed)) {
    ++failures;
    std::printf("FAILED split of %lld x %d rows against %d, %lld edges, width %d: %s\n",
                static_cast<long long>(s.pairs), s.rows, s.others, static_cast<long long>(s.edges),
                s.width, fault);
  }
}

template <typename T>
void test_splits() {
  const int most = INT32_MAX - 32;  // of anything, as the op checks
  for (const int64_t pairs : {int64_t(1), int64_t(7), int64_t(5000), int64_t(most)}) {
    for (const int rows : {1, 9, 330, 70000, most}) {
      for (const int others : {1, 20, 900, 7270, 1 << 20, most}) {
        for (const int64_t edges : {int64_t(0), int64_t(1), int64_t(rows),
                                    std::min(int64_t(rows) * others, int64_t(most))}) {
          for (const int width : {8, 64, kMaxHeadWidth}) {
            for (const int parts : {1, 12}) {
              test_split<T>({pairs, parts, rows, others, edges, width}, true);
              test_split<T>({pairs, parts, rows, others, edges, width}, false);
            }
          }
        }
      }
    }
  }
}

// One of NAC's sizes with a tenth of the edges: 80 KiB of tables, which blocks of 40 rows or more
// repay.
void test_a_split() {
  const Split split = split_rows<float>(48, 1, 256, 160, 256 * 16, 64, true, 320);
  if (!split.staged || split.shared_bytes != 80 << 10 || split.rows != 256) {
    ++failures;
    std::printf("FAILED split of 48 x 256 rows: %s, %d bytes, %d rows\n",
                split.staged ? "staged" : "direct", split.shared_bytes, split.rows);
  }
}

void test_fits() {
  test_layouts<float>();
  test_packs<float>();
  test_layouts<double>();
  test_packs<double>();
  test_layouts<__half>();
  test_packs<__half>();
  test_splits<float>();
  test_splits<double>();
  test_splits<__half>();
  test_a_split();
}

}  // namespace
