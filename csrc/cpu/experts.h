// What the expert kernels of the CPU share: walking an expert-sorted batch in blocks of rows, and
// moving rows between token order and expert order.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "parallel.h"
#include "rows.h"

namespace m2mkd::cpu {

// Calls f(expert, begin, end) for row blocks of at most `limit` rows, those of one expert of nearly
// equal size, in order of rows.
template <typename F>
void for_each_block(const std::vector<int64_t>& bounds, int64_t limit, const F& f) {
  for (size_t e = 0; e + 1 < bounds.size(); ++e) {
    const int64_t rows = bounds[e + 1] - bounds[e];
    const int64_t blocks = (rows + limit - 1) / limit;
    for (int64_t i = 0; i < blocks; ++i) {
      f(static_cast<int64_t>(e), bounds[e] + rows * i / blocks,
        bounds[e] + rows * (i + 1) / blocks);
    }
  }
}

inline int64_t largest_block(const std::vector<int64_t>& bounds, int64_t limit) {
  int64_t largest = 0;
  for_each_block(bounds, limit, [&](int64_t, int64_t begin, int64_t end) {
    largest = std::max(largest, end - begin);
  });
  return largest;
}

// out[r] = x[token[r]].
template <typename T>
void gather_rows(const T* x, const int32_t* token, T* out, int64_t rows, int64_t width) {
  const int64_t bytes = width * int64_t{sizeof(T)};
  parallel_items(rows, 2 * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::memcpy(out + r * width, x + token[r] * width, bytes);
    }
  });
}

// sums[token[r]] += weight[r] * (rows[r] + bias), in order of r; weight may be null for ones. Each
// lane owns the tokens of one residue, so a token listed twice is no race.
template <typename T>
void scatter_add(const T* rows, const T* bias, const compute_t<T>* weight, const int32_t* token,
                 compute_t<T>* sums, int64_t count, int64_t width) {
  parallel_lanes(3 * count * width * int64_t{sizeof(T)}, [&](int64_t lane, int64_t lanes) {
    for (int64_t r = 0; r < count; ++r) {
      if (token[r] % lanes == lane) {
        add_scaled(sums + token[r] * width, rows + r * width, bias,
                   weight != nullptr ? weight[r] : compute_t<T>(1), width);
      }
    }
  });
}

}  // namespace m2mkd::cpu
