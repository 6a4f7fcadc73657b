// Rows so far into an array that offsets to them do not fit 32 bits, without such arrays: kernels
// get addresses before the buffers by as much as they skip, and only a launch's last block runs.
// What it does must be what it does with nothing skipped; an offset cut to 32 bits is out of
// bounds.

#pragma once

#include "launcher_testing.h"

namespace {

constexpr int kNear = 64;      // rows that exist
constexpr int kOddWidth = 17;  // no packs, so that a row takes many offsets

// Results by name, those that the last block is sure to write.
using Results = std::vector<std::pair<std::string, double>>;

void add_last(Results& results, const std::string& what, const Floats& found, int count) {
  const std::string report = m2mkd::emulator::finish();
  m2mkd::emulator::run_last_blocks(1);  // of the next launches
  for (int i = found.count() - count; i < found.count(); ++i) {
    results.emplace_back(report.empty() ? what : what + ": " + report, found[i]);
  }
}

const void* before(const void* buffer, int64_t bytes) {
  return static_cast<const char*>(buffer) - bytes;
}
void* before(void* buffer, int64_t bytes) { return static_cast<char*>(buffer) - bytes; }
const int32_t* before(const int32_t* buffer, int64_t count) { return buffer - count; }
int32_t* before(int32_t* buffer, int64_t count) { return buffer - count; }

void compare(const Results& near, const Results& far) {
  for (size_t i = 0; i < near.size(); ++i) {
    if (near[i] != far[i]) {
      ++failures;
      std::printf("FAILED far from the start, %s: %g, expected %g\n", far[i].first.c_str(),
                  far[i].second, near[i].second);
      return;
    }
  }
}

// The rows of tokens and experts, `skipped` rows into every array.
Results results_of_rows(int skipped) {
  const int rows = skipped + kNear, d = kOddWidth;
  const int64_t row = int64_t(skipped) * d * 2, value = int64_t(skipped) * 4;  // bytes skipped
  const DType dtype = DType::bf16;
  const Floats x = Floats::random(dtype, kNear * d, 1), y = Floats::random(dtype, kNear * d, 2);
  const Floats weights = Floats::random(DType::f32, kNear, 3), bias = Floats::random(dtype, d, 4);
  Ints other(kNear);  // a row for every row
  for (int i = 0; i < kNear; ++i) {
    other[i] = skipped + i * 7 % kNear;
  }
  const Ints offsets = {0, rows}, last_rows = {rows - 3, rows};
  const auto of = [&](const Floats& floats) { return before(floats.read(), row); };
  const auto others = [&] { return before(read(other), skipped); };
  Results results;
  m2mkd::emulator::run_last_blocks(1);

  Floats out(dtype, kNear * d), sums(DType::f32, kNear);
  launch_gather(dtype, of(x), others(), rows, d, before(out.update(), row), nullptr);
  add_last(results, "gather", out, d);
  launch_sum_rows(dtype, of(x), others(), before(weights.read(), value), rows, 1, d,
                  before(out.update(), row), nullptr);
  add_last(results, "sum_rows", out, d);
  launch_combine_backward(dtype, of(x), of(y), before(weights.read(), value), others(), rows, 1, d,
                          before(out.update(), row), before(sums.update(), value), nullptr);
  add_last(results, "combine_backward", sums, 1);
  launch_activate(dtype, Activation::silu, of(x), nullptr, read(offsets), 1, rows, d,
                  before(out.update(), row), nullptr);
  add_last(results, "activate", out, d);
  Floats weighted(dtype, kNear * d);
  ActivateBackward args{of(x),
                        nullptr,
                        bias.read(),
                        of(y),
                        before(out.update(), row),
                        before(weighted.update(), row),
                        before(weights.read(), value),
                        others(),
                        before(sums.update(), value),
                        read(offsets),
                        1,
                        rows,
                        d,
                        d};
  launch_activate_backward(dtype, Activation::silu, args, nullptr);
  add_last(results, "activate_backward", out, d);
  const int64_t chunks = (rows - 1) / kColumnChunk;  // before the last one
  const Floats partial(DType::f32, d);
  Floats column_sums(dtype, d);
  launch_sum_columns(dtype, of(x), nullptr, read(last_rows), 1, rows, d,
                     before(partial.update(), chunks * d * 4), column_sums.update(), nullptr);
  add_last(results, "sum_columns", column_sums, d);

  Floats top(dtype, kNear);
  Ints chosen(kNear);
  launch_topk_gate(dtype, of(x), rows, d, 1, GateMode::all, before(top.update(), value / 2),
                   before(update(chosen), skipped), nullptr);
  add_last(results, "topk_gate", top, 1);
  launch_topk_gate_backward(dtype, before(top.read(), value / 2), of(x),
                            before(read(chosen), skipped), rows, d, 1, GateMode::all,
                            before(out.update(), row), nullptr);
  add_last(results, "topk_gate_backward", out, d);
  return results;
}

// The last of more columns than blocks in a grid's y could sum.
Results results_of_columns(int skipped) {
  const Floats x = Floats::random(DType::bf16, kOddWidth, 1), partial(DType::f32, kOddWidth);
  const Ints offsets = {0, 1};
  Floats sums(DType::bf16, kOddWidth);
  Results results;
  m2mkd::emulator::run_last_blocks(1);
  launch_sum_columns(DType::bf16, before(x.read(), skipped * 2), nullptr, read(offsets), 1, 1,
                     skipped + kOddWidth, before(partial.update(), skipped * 4),
                     before(sums.update(), skipped * 2), nullptr);
  add_last(results, "sum_columns", sums, kOddWidth);
  return results;
}

// Far enough for offsets, and as far as rows go.
void test_far_rows() {
  for (const int skipped : {1 << 28, INT32_MAX - kNear}) {
    compare(results_of_rows(0), results_of_rows(skipped));
  }
  compare(results_of_columns(0), results_of_columns(32 << 16));
}

// The last of three examples of one head: two receivers that hear three and one of many senders,
// and the same backwards. Every array but those of the two begins `skipped` entries earlier.
Results results_of_heads(int skipped) {
  const int d = kOddWidth, kExamples = 3, kFew = 2, kMany = 8, kEdges = 4;
  const int many = skipped + kMany, edges = skipped + kEdges;
  const DType dtype = DType::bf16;
  const Floats few_a = Floats::random(dtype, kExamples * kFew * d, 1);
  const Floats few_b = Floats::random(dtype, kExamples * kFew * d, 2);
  // What exists of an array with many entries in each example are the last ones of the last
  // example.
  const Floats many_a = Floats::random(dtype, kMany * d, 3);
  const Floats many_b = Floats::random(dtype, kMany * d, 4);
  const Floats bias = Floats::random(DType::f32, kEdges, 5);
  const Floats many_lse = Floats::random(DType::f32, kMany, 6);
  const auto of_many = [&](const auto pointer, int64_t bytes) {
    return before(pointer, (int64_t(kExamples) * many - kMany) * bytes);
  };
  const auto of_edges = [&](const auto pointer) {
    return before(pointer, (int64_t(kExamples) * edges - kEdges) * 4);
  };
  const Ints ptr = {skipped, skipped + 3, edges};
  const Ints other = {skipped + 1, skipped + 4, skipped + 7, skipped + 2};
  const Ints edge_id = {skipped + 2, skipped + 3, skipped, skipped + 1};
  Floats out(dtype, kExamples * kFew * d), out_b = out, lse(DType::f32, kExamples * kFew);
  Floats delta = lse, edge_grad(DType::f32, kEdges);
  Results results;
  m2mkd::emulator::run_last_blocks(1);

  launch_circuit_forward(
      dtype,
      {few_a.read(), of_many(many_a.read(), d * 2), of_many(many_b.read(), d * 2),
       of_edges(bias.read()), edges, read(ptr), before(read(other), skipped), 0.25, kExamples, 1,
       kFew, many, edges, d, out.update(), lse.update()},
      nullptr);
  add_last(results, "circuit_forward", out, kFew * d);

  CircuitBackward b{};
  b.scale = 0.25, b.batch = kExamples, b.heads = b.parts = 1, b.edges = edges, b.width = d;
  b.bias_stride = edges;
  b.grad = few_b.read(), b.out = out.read(), b.q = few_a.read();
  b.k = of_many(many_a.read(), d * 2), b.v = of_many(many_b.read(), d * 2);
  b.bias = of_edges(bias.read()), b.lse = lse.read(), b.row_ptr = read(ptr);
  b.sender = before(read(other), skipped), b.receivers = kFew, b.senders = many;
  b.delta = delta.update(), b.q_grad = out_b.update(), b.edge_grad = of_edges(edge_grad.update());
  launch_circuit_receivers(dtype, b, nullptr);
  add_last(results, "circuit_receivers", out_b, kFew * d);
  add_last(results, "gradients of biases", edge_grad, kEdges);

  b.q = of_many(many_a.read(), d * 2), b.grad = of_many(many_b.read(), d * 2);
  b.k = few_a.read(), b.v = few_b.read(), b.bias = of_edges(bias.read());
  b.lse = of_many(many_lse.read(), 4);
  b.delta = const_cast<void*>(of_many(many_lse.read(), 4));
  b.col_ptr = read(ptr), b.receiver = before(read(other), skipped);
  b.edge_id = before(read(edge_id), skipped), b.receivers = many, b.senders = kFew;
  b.k_grad = out.update(), b.v_grad = out_b.update();
  launch_circuit_senders(dtype, b, nullptr);
  add_last(results, "circuit_senders", out, kFew * d);
  add_last(results, "circuit_senders", out_b, kFew * d);
  return results;
}

// The last of very many heads of eight receivers and senders, each of which hears all.
Results results_of_many_heads(int heads, int d) {
  const int kRows = 8, kEdges = kRows * kRows;
  const DType dtype = DType::bf16;
  std::vector<Floats> rows;  // of the last head
  for (unsigned i = 0; i < 4; ++i) {
    rows.push_back(Floats::random(dtype, kRows * d, i));
  }
  const auto last = [&](const auto pointer, int bytes) {
    return before(pointer, int64_t(heads - 1) * kRows * bytes);
  };
  const auto of = [&](int i) { return last(rows[i].read(), d * 2); };
  Ints ptr(kRows + 1), other(kEdges), edge_id(kEdges);
  for (int e = 0; e < kEdges; ++e) {
    ptr[e / kRows + 1] = e + 1;
    other[e] = e % kRows;
    edge_id[e] = e % kRows * kRows + e / kRows;
  }
  Floats out(dtype, kRows * d), k_grad = out, v_grad = out;
  Floats lse(DType::f32, kRows), delta = lse;
  Results results;
  m2mkd::emulator::run_last_blocks(1);

  launch_circuit_forward(
      dtype,
      {of(0), of(1), of(2), nullptr, 0, read(ptr), read(other), 0.25, 1, heads, kRows, kRows,
       kEdges, d, last(out.update(), d * 2), last(lse.update(), 4)},
      nullptr);
  add_last(results, "circuit_forward", out, out.count());
  add_last(results, "log-sum-exp", lse, kRows);

  CircuitBackward b{};
  const auto inputs = [&] {
    b.grad = of(3), b.q = of(0), b.k = of(1), b.v = of(2), b.lse = last(lse.read(), 4);
  };
  b.scale = 0.25, b.batch = 1, b.heads = b.parts = heads, b.receivers = b.senders = kRows;
  b.edges = kEdges, b.width = d;
  inputs();
  b.out = last(out.read(), d * 2), b.row_ptr = read(ptr), b.sender = read(other);
  b.delta = last(delta.update(), 4), b.q_grad = last(k_grad.update(), d * 2);
  launch_circuit_receivers(dtype, b, nullptr);
  add_last(results, "circuit_receivers", k_grad, k_grad.count());
  add_last(results, "delta", delta, kRows);

  inputs();
  b.delta = const_cast<void*>(last(delta.read(), 4));
  b.col_ptr = read(ptr), b.receiver = read(other), b.edge_id = read(edge_id);
  b.k_grad = last(k_grad.update(), d * 2), b.v_grad = last(v_grad.update(), d * 2);
  launch_circuit_senders(dtype, b, nullptr);
  add_last(results, "circuit_senders", k_grad, k_grad.count());
  add_last(results, "circuit_senders", v_grad, v_grad.count());
  return results;
}

// The last of three sums of three terms, which lie 2^30 entries apart.
void test_far_sums() {
  constexpr int kThreads = 256, kTerms = 3, kCount = 1 << 30;
  constexpr int64_t kBytes = int64_t(kCount) * 4;
  alignas(256) float terms[kTerms][kThreads];  // of the last block
  Floats sums(DType::f32, kThreads);
  void* out = before(sums.update(), 3 * kBytes - int64_t(sizeof(terms[0])));
  m2mkd::emulator::space_buffers(kBytes);
  const void* first = nullptr;
  for (int term = 0; term < kTerms; ++term) {
    for (int i = 0; i < kThreads; ++i) {
      terms[term][i] = float((i + 1) << (8 * term));
    }
    const void* buffer = device_buffer(terms[term], sizeof(terms[term]), Access::read);
    first = term == 0 ? buffer : first;
    failures += before(buffer, term * kBytes) != first;
  }
  first = before(first, 2 * kTerms * kBytes + kBytes - int64_t(sizeof(terms[0])));
  m2mkd::emulator::run_last_blocks(1);
  launch_sum_parts(DType::f32, first, 3, kTerms, kCount, out, nullptr);
  finish("sum_parts, far from the start");
  expect("sum_parts, far from the start", sums, DType::f32,
         [](int i) { return double(i + 1) * 0x10101; });
}

void test_far_heads() {
  compare(results_of_heads(0), results_of_heads(1 << 30));
  for (const int width : {kOddWidth, 16}) {  // 16 is staged
    compare(results_of_many_heads(64, width), results_of_many_heads(3 << 28, width));
  }
  test_far_sums();
}

}  // namespace
