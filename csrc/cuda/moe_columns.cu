// Sums of an expert's rows, column by column: gradients of biases.

#include "launchers.h"
#include "moe_experts.h"

namespace m2mkd::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = kThreads / kWarp;  // rows that a block adds at a time

// Column sums come in two passes, so that the work is even however rows are shared among experts.
// This one: a block per kColumnChunk rows and 32 packs of columns, of which there are
// `column_blocks`; all in x, since a grid's y ends at 65535. The rows of expert e in chunk c
// are summed into partial[c + e]: along the rows either c or e grows, so no two share an entry, and
// the first pass needs no list of them. Eight rows are added at a time, their sums in order.
template <typename T, int N>
__global__ void sum_chunks_kernel(const T* rows, const compute_t<T>* scale, const int32_t* offsets,
                                  int experts, int packs, int column_blocks,
                                  compute_t<T>* partial) {
  using P = Pack<T, N>;
  using A = compute_t<T>;
  // Padded so that neither the writes nor the reads below meet in a bank; two doubles still do.
  constexpr int kStride = kWarp + kWarp / N;
  M2MKD_SHARED(A, sums, kLanes * N * kStride);
  const int column = threadIdx.x % kWarp, lane = threadIdx.x / kWarp;
  const int64_t chunk = blockIdx.x / column_blocks;
  const int first_pack = blockIdx.x % column_blocks * kWarp;
  const int pack = first_pack + column;
  const int64_t chunk_begin = chunk * kColumnChunk;
  const int64_t chunk_end = chunk_begin + kColumnChunk;
  if (chunk_begin >= offsets[experts]) {
    return;
  }
  for (int e = expert_of(offsets, experts, int(chunk_begin)); e < experts && offsets[e] < chunk_end;
       ++e) {
    const int64_t begin = offsets[e] > chunk_begin ? offsets[e] : chunk_begin;
    const int64_t end = offsets[e + 1] < chunk_end ? offsets[e + 1] : chunk_end;
    if (begin >= end) {
      continue;
    }
    A own[N] = {};
    if (pack < packs) {
      for (int64_t row = begin + lane; row < end; row += kLanes) {
        const A weight = scale != nullptr ? scale[row] : A(1);
        const P values = reinterpret_cast<const P*>(rows)[row * packs + pack];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          own[n] += weight * values.get(n);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sums[(lane * N + n) * kStride + column] = own[n];
    }
    __syncthreads();
    // Element i of the block's columns; consecutive threads write consecutive ones.
    for (int i = threadIdx.x; i < kWarp * N; i += blockDim.x) {
      A total = 0;
      for (int l = 0; l < kLanes; ++l) {
        total += sums[(l * N + i % N) * kStride + i / N];
      }
      const int64_t element = int64_t(first_pack) * N + i;
      if (element < int64_t(packs) * N) {
        partial[(chunk + e) * packs * N + element] = total;
      }
    }
    __syncthreads();
  }
}

// The other pass: a thread per column of an expert adds its chunks in order.
template <typename T>
__global__ void add_chunks_kernel(const compute_t<T>* partial, const int32_t* offsets, int experts,
                                  int width, T* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(experts) * width) {
    return;
  }
  const int expert = int(i / width);
  const int64_t begin = offsets[expert], end = offsets[expert + 1];
  compute_t<T> total = 0;
  if (begin < end) {
    const int64_t last = (end - 1) / kColumnChunk;
    for (int64_t chunk = begin / kColumnChunk; chunk <= last; ++chunk) {
      total += partial[(chunk + expert) * width + i % width];
    }
  }
  out[i] = narrow<T>(total);
}

template <typename T, int N>
void sum_columns(const void* rows, const void* scale, const int32_t* offsets, int experts,
                 int count, int width, void* partial, void* out, void* stream) {
  using A = compute_t<T>;
  const int column_blocks = blocks_for(width / N, kWarp);
  if (count > 0) {
    M2MKD_LAUNCH((sum_chunks_kernel<T, N>), blocks_for(count, kColumnChunk) * column_blocks,
                 kThreads, 0, stream, static_cast<const T*>(rows), static_cast<const A*>(scale),
                 offsets, experts, width / N, column_blocks, static_cast<A*>(partial));
  }
  M2MKD_LAUNCH(add_chunks_kernel<T>, blocks_for(int64_t(experts) * width, kThreads), kThreads, 0,
               stream, static_cast<const A*>(partial), offsets, experts, width,
               static_cast<T*>(out));
}

}  // namespace

int launch_sum_columns(DType dtype, const void* rows, const void* scale, const int32_t* offsets,
                       int experts, int count, int width, void* partial, void* out, void* stream) {
  if (experts == 0 || width == 0) {
    return cudaSuccess;
  }
  M2MKD_FOR_DTYPE(
      dtype,
      if (aligned(rows) && width % kPack<T> == 0) {
        sum_columns<T, kPack<T>>(rows, scale, offsets, experts, count, width, partial, out, stream);
      } else {
        sum_columns<T, 1>(rows, scale, offsets, experts, count, width, partial, out, stream);
      });
  return cudaGetLastError();
}

}  // namespace m2mkd::cuda
