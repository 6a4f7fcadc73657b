// Every launcher of csrc/cuda on the emulator against plain loops in double, in all dtypes, on
// sizes that fill packs, blocks and warps and on sizes that do not. The exit status tells.

#include "far_rows.h"
#include "launch_fits.h"
#include "launcher_testing.h"

namespace {

// ---- 16-bit types round as CUDA's: to nearest, ties to even
// --------------------------------------

void test_rounding() {
  const struct {
    float value;
    uint16_t half, bfloat16;
  } cases[] = {
      {0.0f, 0x0000, 0x0000},
      {-0.0f, 0x8000, 0x8000},
      {1.0f, 0x3c00, 0x3f80},
      {1.00048828125f, 0x3c00, 0x3f80},  // tie of half
      {1.00146484375f, 0x3c02, 0x3f80},  // tie of half, upwards
      {1.00390625f, 0x3c04, 0x3f80},     // tie of bfloat16
      {1.01171875f, 0x3c0c, 0x3f82},     // the same, upwards
      {65519.0f, 0x7bff, 0x4780},
      {65520.0f, 0x7c00, 0x4780},
      {5.9604645e-8f, 0x0001, 0x3380},
      {2.9802322e-8f, 0x0000, 0x3300},  // smallest half, and tie
      {3.4e38f, 0x7c00, 0x7f80},
      {-INFINITY, 0xfc00, 0xff80},
      {NAN, 0x7fff, 0x7fff},
  };
  for (const auto& c : cases) {
    const uint16_t half = __float2half_rn(c.value).bits;
    const uint16_t bfloat16 = __float2bfloat16_rn(c.value).bits;
    if (half != c.half || bfloat16 != c.bfloat16) {
      ++failures;
      std::printf("FAILED rounding of %.9g: half %04x, bfloat16 %04x\n", double(c.value), half,
                  bfloat16);
    }
  }
}

// ---- mixtures of experts
// -------------------------------------------------------------------------

struct Sizes {
  int tokens, k, experts, width, hidden, limit;
};

// What the plan must be, by its definition: choices in listing order, put behind each other.
struct Plan {
  Ints chosen, row_of, token_of, offsets;

  explicit Plan(const Sizes& s)
      : chosen(s.tokens * s.k), row_of(s.tokens * s.k, -1), offsets(s.experts + 1) {
    std::vector<Ints> members(s.experts);
    for (int i = 0; i < s.tokens * s.k; ++i) {
      chosen[i] = (i / s.k * 7 + i / s.k / 5 + i % s.k) % s.experts;
    }
    for (int i = 0; i < s.tokens * s.k; ++i) {
      // With a capacity, all first choices come before second ones.
      const int choice = s.limit < 0 ? i : i % s.tokens * s.k + i / s.tokens;
      Ints& own = members[chosen[choice]];
      if (s.limit < 0 || int(own.size()) < s.limit) {
        own.push_back(choice);
      }
    }
    for (int e = 0; e < s.experts; ++e) {
      for (const int choice : members[e]) {
        row_of[choice] = int(token_of.size());
        token_of.push_back(choice / s.k);
      }
      offsets[e + 1] = int(token_of.size());
    }
    token_of.resize(s.tokens * s.k, -1);  // padding
  }

  int rows() const { return int(token_of.size()); }
  int expert(int row) const {
    for (size_t e = 0; e + 1 < offsets.size(); ++e) {
      if (row < offsets[e + 1]) {
        return int(e);
      }
    }
    return -1;
  }
};

void test_plan(const Sizes& s, const Plan& plan) {
  const int blocks = (s.tokens * s.k + kPlanBlock - 1) / kPlanBlock;
  Ints row_of(plan.row_of.size()), token_of(plan.rows()), offsets(s.experts + 1);
  const Ints counts(blocks * s.experts);
  launch_moe_plan(read(plan.chosen), nullptr, s.tokens, s.k, s.experts, s.limit, plan.rows(),
                  write(counts), write(row_of), write(token_of), write(offsets), nullptr);
  finish("plan");
  expect("row_of", row_of, plan.row_of);
  expect("token_of", token_of, plan.token_of);
  expect("offsets", offsets, plan.offsets);
}

// A plan of more blocks than the scan takes in two rounds, of which the last one runs: the counts
// of the others, all full, are there already.
void test_many_blocks() {
  const int blocks = 2 * kPlanBlock + 2, tokens = blocks * kPlanBlock;
  const Ints chosen(tokens), counts(blocks, kPlanBlock);
  Ints row_of(tokens, -2), token_of(tokens), offsets(2);
  m2mkd::emulator::run_last_blocks(1);
  launch_moe_plan(read(chosen), nullptr, tokens, 1, 1, -1, tokens, update(counts), update(row_of),
                  update(token_of), write(offsets), nullptr);
  finish("plan of many blocks");
  expect("offsets of many blocks", offsets, {0, tokens});
  expect("row_of of many blocks", {row_of.back()}, {tokens - 1});
}

void test_gate(DType dtype, const Sizes& s) {
  const Floats logits = Floats::random(dtype, s.tokens * s.experts, 1);
  Floats weights(dtype, s.tokens * s.k), result(dtype, s.tokens * s.experts);
  Ints chosen(s.tokens * s.k);
  launch_topk_gate(dtype, logits.read(), s.tokens, s.experts, s.k, GateMode::all, weights.write(),
                   write(chosen), nullptr);
  finish("topk_gate");
  const auto probability = [&](int token, int e) {
    double sum = 0;
    for (int i = 0; i < s.experts; ++i) {
      sum += std::exp(logits[token * s.experts + i]);
    }
    return std::exp(logits[token * s.experts + e]) / sum;
  };
  expect("topk_gate", weights, dtype, [&](int i) { return probability(i / s.k, chosen[i]); });
  for (int i = 0; i < s.tokens * s.k; ++i) {
    int better = 0;  // experts that come before the chosen one
    const double own = logits[i / s.k * s.experts + chosen[i]];
    for (int e = 0; e < s.experts; ++e) {
      const double other = logits[i / s.k * s.experts + e];
      better += other > own || (other == own && e < chosen[i]);
    }
    failures += better != i % s.k;
  }
  const Floats grad = Floats::random(dtype, s.tokens * s.k, 2);
  launch_topk_gate_backward(dtype, grad.read(), logits.read(), read(chosen), s.tokens, s.experts,
                            s.k, GateMode::all, result.write(), nullptr);
  finish("topk_gate_backward");
  expect("topk_gate_backward", result, dtype, [&](int i) {
    const int token = i / s.experts, e = i % s.experts;
    double own = 0, mean = 0;
    for (int j = 0; j < s.k; ++j) {
      const double g = grad[token * s.k + j];
      mean += g * probability(token, chosen[token * s.k + j]);
      own += chosen[token * s.k + j] == e ? g : 0;
    }
    return probability(token, e) * (own - mean);
  });
}

void test_rows(DType dtype, const Sizes& s, const Plan& plan) {
  const int rows = plan.rows(), d = s.width, choices = s.tokens * s.k;
  const Floats x = Floats::random(dtype, s.tokens * d, 3), y = Floats::random(dtype, rows * d, 4);
  const Floats weights = Floats::random(compute(dtype), choices, 5);
  Floats gathered(dtype, rows * d), summed(dtype, s.tokens * d), grad_rows(dtype, rows * d);
  Floats grad_weights(compute(dtype), choices), weight_of(compute(dtype), rows);
  Ints choice_of(rows, -1);
  launch_gather(dtype, x.read(), read(plan.token_of), rows, d, gathered.write(), nullptr);
  finish("gather");
  expect("gather", gathered, dtype, [&](int i) {
    const int token = plan.token_of[i / d];
    return token < 0 ? 0 : x[token * d + i % d];
  });
  launch_sum_rows(dtype, y.read(), read(plan.row_of), weights.read(), s.tokens, s.k, d,
                  summed.write(), nullptr);
  finish("sum_rows");
  expect("sum_rows", summed, dtype, [&](int i) {
    double sum = 0;
    for (int c = i / d * s.k; c < (i / d + 1) * s.k; ++c) {
      sum += plan.row_of[c] < 0 ? 0 : weights[c] * y[plan.row_of[c] * d + i % d];
    }
    return sum;
  });
  launch_combine_backward(dtype, x.read(), y.read(), weights.read(), read(plan.row_of), s.tokens,
                          s.k, d, grad_rows.update(), grad_weights.write(), nullptr);
  finish("combine_backward");
  launch_invert_rows(dtype, read(plan.row_of), weights.read(), choices, update(choice_of),
                     weight_of.update(), nullptr);
  finish("invert_rows");
  Ints expected_choice(rows, -1);
  for (int c = 0; c < choices; ++c) {
    if (plan.row_of[c] >= 0) {
      expected_choice[plan.row_of[c]] = c;
    }
  }
  expect("choice_of", choice_of, expected_choice);
  expect("weight_of", weight_of, compute(dtype),
         [&](int i) { return choice_of[i] < 0 ? 0 : weights[choice_of[i]]; });
  expect("grad_rows", grad_rows, dtype, [&](int i) {
    const int choice = choice_of[i / d];
    return choice < 0 ? 0 : weights[choice] * x[choice / s.k * d + i % d];
  });
  expect("grad_weights", grad_weights, dtype, [&](int c) {
    double sum = 0;
    for (int n = 0; n < d && plan.row_of[c] >= 0; ++n) {
      sum += x[c / s.k * d + n] * y[plan.row_of[c] * d + n];
    }
    return sum;
  });
}

double silu(double x) { return x / (1 + std::exp(-x)); }
double silu_slope(double x) {
  const double p = 1 / (1 + std::exp(-x));
  return p + x * p * (1 - p);
}

void test_experts(DType dtype, const Sizes& s, const Plan& plan) {
  const int rows = plan.rows(), h = s.hidden, d = s.width;
  const Floats z = Floats::random(dtype, rows * h, 6);
  const Floats bias = Floats::random(dtype, s.experts * h, 7);
  const Floats bias2 = Floats::random(dtype, s.experts * d, 8);
  const Floats upstream = Floats::random(dtype, rows * d, 9);
  const Floats weight_of = Floats::random(compute(dtype), rows, 10);
  const Floats before = Floats::random(dtype, rows * h, 11);
  Floats active(dtype, rows * h), hidden_grad = before, weighted(dtype, rows * h);
  Floats gate_grad(compute(dtype), rows), sums(dtype, s.experts * h);
  const auto input = [&](int i) { return z[i] + bias[plan.expert(i / h) * h + i % h]; };
  launch_activate(dtype, Activation::silu, z.read(), bias.read(), read(plan.offsets), s.experts,
                  rows, h, active.write(), nullptr);
  finish("activate");
  expect("activate", active, dtype,
         [&](int i) { return plan.expert(i / h) < 0 ? 0 : silu(input(i)); });
  Floats kept(dtype, rows * h);
  for (int i = 0; i < rows * h; ++i) {
    kept.set(i, -0.0);  // which adding a bias of 0 would change
  }
  launch_activate(dtype, Activation::identity, kept.update(), nullptr, read(plan.offsets),
                  s.experts, rows, h, kept.update(), nullptr);
  finish("identity in place");
  int wrong = 0;
  for (int i = 0; i < rows * h; ++i) {
    wrong += std::signbit(kept[i]) != (plan.expert(i / h) >= 0);
  }
  if (wrong > 0) {
    ++failures;
    std::printf("FAILED identity in place: %d elements are wrong\n", wrong);
  }
  Ints choice_of(rows);
  for (int r = 0; r < rows; ++r) {
    choice_of[r] = plan.expert(r) < 0 ? -1 : rows - 1 - r;
  }
  ActivateBackward args{z.read(),
                        bias.read(),
                        bias2.read(),
                        upstream.read(),
                        hidden_grad.update(),
                        weighted.write(),
                        weight_of.read(),
                        read(choice_of),
                        gate_grad.update(),
                        read(plan.offsets),
                        s.experts,
                        rows,
                        h,
                        d};
  launch_activate_backward(dtype, Activation::silu, args, nullptr);
  finish("activate_backward");
  expect("hidden_grad", hidden_grad, dtype, [&](int i) {
    return plan.expert(i / h) < 0 ? 0 : weight_of[i / h] * before[i] * silu_slope(input(i));
  });
  expect("weighted", weighted, dtype,
         [&](int i) { return plan.expert(i / h) < 0 ? 0 : weight_of[i / h] * silu(input(i)); });
  expect("gate_grad", gate_grad, dtype, [&](int choice) {
    const int row = rows - 1 - choice, e = plan.expert(row);
    double sum = 0;
    for (int i = 0; i < h && e >= 0; ++i) {
      sum += before[row * h + i] * silu(input(row * h + i));
    }
    for (int i = 0; i < d && e >= 0; ++i) {
      sum += upstream[row * d + i] * bias2[e * d + i];
    }
    return sum;
  });
  const int chunks = (rows + kColumnChunk - 1) / kColumnChunk + s.experts;
  const Floats partial(compute(dtype), chunks * h);
  launch_sum_columns(dtype, z.read(), weight_of.read(), read(plan.offsets), s.experts, rows, h,
                     partial.update(), sums.write(), nullptr);
  finish("sum_columns");
  expect("sum_columns", sums, dtype, [&](int i) {
    double sum = 0;
    for (int r = plan.offsets[i / h]; r < plan.offsets[i / h + 1]; ++r) {
      sum += weight_of[r] * z[r * h + i % h];
    }
    return sum;
  });
}

// ---- circuits
// ------------------------------------------------------------------------------------

// Receiver u hears sender v where (3 u + v) % 4 == 0; the transpose, and the edges' numbers there.
struct Graph {
  Ints row_ptr = {0}, sender, col_ptr = {0}, receiver, edge_id;

  Graph(int receivers, int senders) {
    for (int u = 0; u < receivers; ++u) {
      for (int v = 0; v < senders; ++v) {
        if ((3 * u + v) % 4 == 0) {
          sender.push_back(v);
        }
      }
      row_ptr.push_back(int(sender.size()));
    }
    for (int v = 0; v < senders; ++v) {
      for (int u = 0; u < receivers; ++u) {
        for (int e = row_ptr[u]; e < row_ptr[u + 1]; ++e) {
          if (sender[e] == v) {
            receiver.push_back(u);
            edge_id.push_back(e);
          }
        }
      }
      col_ptr.push_back(int(receiver.size()));
    }
  }
  int edges() const { return int(sender.size()); }
};

void test_circuit(DType dtype, int receivers, int senders, int width) {
  const Graph graph(receivers, senders);
  const int heads = 2;
  const double scale = 0.5;
  const Floats q = Floats::random(dtype, heads * receivers * width, 12);
  const Floats k = Floats::random(dtype, heads * senders * width, 13);
  const Floats v = Floats::random(dtype, heads * senders * width, 14);
  const Floats bias = Floats::random(compute(dtype), graph.edges(), 15);
  const Floats grad = Floats::random(dtype, heads * receivers * width, 16);
  Floats out(dtype, heads * receivers * width), lse(compute(dtype), heads * receivers);
  launch_circuit_forward(
      dtype,
      {q.read(), k.read(), v.read(), bias.read(), 0, read(graph.row_ptr), read(graph.sender), scale,
       1, heads, receivers, senders, graph.edges(), width, out.write(), lse.write()},
      nullptr);
  finish("circuit_forward");
  const auto dot = [&](const Floats& a, int row, const Floats& b, int other) {
    double sum = 0;
    for (int i = 0; i < width; ++i) {
      sum += a[row * width + i] * b[other * width + i];
    }
    return sum;
  };
  const auto weight = [&](int row, int e) {  // row = head * receivers + receiver
    const int first = row / receivers * senders;
    const auto score = [&](int edge) {
      return std::exp(scale * dot(q, row, k, first + graph.sender[edge]) + bias[edge]);
    };
    double sum = 0;
    for (int i = graph.row_ptr[row % receivers]; i < graph.row_ptr[row % receivers + 1]; ++i) {
      sum += score(i);
    }
    return score(e) / sum;
  };
  expect("circuit_forward", out, dtype, [&](int i) {
    const int row = i / width, u = row % receivers;
    double sum = 0;
    for (int e = graph.row_ptr[u]; e < graph.row_ptr[u + 1]; ++e) {
      sum += weight(row, e) * v[(row / receivers * senders + graph.sender[e]) * width + i % width];
    }
    return sum;
  });
  CircuitBackward b{};
  Floats delta(compute(dtype), heads * receivers), q_grad(dtype, q.count());
  Floats k_grad(dtype, k.count()), v_grad(dtype, v.count());
  const auto inputs = [&] {
    b.grad = grad.read(), b.out = out.read(), b.q = q.read(), b.k = k.read(), b.v = v.read();
    b.bias = bias.read(), b.lse = lse.read(), b.row_ptr = read(graph.row_ptr);
    b.sender = read(graph.sender), b.col_ptr = read(graph.col_ptr);
    b.receiver = read(graph.receiver), b.edge_id = read(graph.edge_id);
  };
  b.scale = scale, b.batch = 1, b.heads = heads, b.receivers = receivers, b.senders = senders;
  b.edges = graph.edges(), b.width = width;
  inputs();
  // One part also, whose blocks take one head after the other.
  b.parts = width % 16 == 0 ? 1 : circuit_parts(dtype, b);
  const Floats terms(compute(dtype), b.parts * graph.edges());
  b.delta = delta.write(), b.q_grad = q_grad.write(), b.edge_grad = terms.write();
  launch_circuit_receivers(dtype, b, nullptr);
  finish("circuit_receivers");
  Floats bias_grad(compute(dtype), graph.edges());
  launch_sum_parts(dtype, terms.read(), 1, b.parts, graph.edges(), bias_grad.write(), nullptr);
  finish("sum_parts");
  inputs();
  b.delta = delta.update(), b.k_grad = k_grad.write(), b.v_grad = v_grad.write();
  launch_circuit_senders(dtype, b, nullptr);
  finish("circuit_senders");
  const auto score_grad = [&](int row, int e) {
    const int first = row / receivers * senders;
    double mean = 0;
    for (int i = graph.row_ptr[row % receivers]; i < graph.row_ptr[row % receivers + 1]; ++i) {
      mean += weight(row, i) * dot(grad, row, v, first + graph.sender[i]);
    }
    return weight(row, e) * (dot(grad, row, v, first + graph.sender[e]) - mean);
  };
  const auto sum_over_receivers = [&](int i, const Floats& of, const auto& factor) {
    const int head = i / width / senders, sender = i / width % senders;
    double sum = 0;
    for (int at = graph.col_ptr[sender]; at < graph.col_ptr[sender + 1]; ++at) {
      const int row = head * receivers + graph.receiver[at];
      sum += factor(row, graph.edge_id[at]) * of[row * width + i % width];
    }
    return sum;
  };
  expect("bias_grad", bias_grad, dtype, [&](int e) {
    int u = 0;
    while (graph.row_ptr[u + 1] <= e) {
      ++u;
    }
    return score_grad(u, e) + score_grad(receivers + u, e);
  });
  expect("q_grad", q_grad, dtype, [&](int i) {
    const int row = i / width, first = row / receivers * senders;
    double sum = 0;
    for (int e = graph.row_ptr[row % receivers]; e < graph.row_ptr[row % receivers + 1]; ++e) {
      sum += scale * score_grad(row, e) * k[(first + graph.sender[e]) * width + i % width];
    }
    return sum;
  });
  expect("k_grad", k_grad, dtype,
         [&](int i) { return scale * sum_over_receivers(i, q, score_grad); });
  expect("v_grad", v_grad, dtype, [&](int i) { return sum_over_receivers(i, grad, weight); });
}

}  // namespace

int main() {
  test_rounding();
  test_fits();
  const Sizes many_experts{40, 1, 600, 1, 1, -1};  // more than two rounds of the plan's scan
  test_plan(many_experts, Plan(many_experts));
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    for (const Sizes& s :
         {Sizes{33, 2, 4, 7, 13, -1}, Sizes{150, 2, 5, 16, 24, -1}, Sizes{70, 2, 5, 16, 40, 11},
          Sizes{1, 1, 1, 1, 1, -1}, Sizes{3, 2, 2, 301, 37, -1}}) {
      const Plan plan(s);
      test_plan(s, plan);
      test_gate(dtype, s);
      test_rows(dtype, s, plan);
      test_experts(dtype, s, plan);
    }
    test_circuit(dtype, 9, 13, 7);
    test_circuit(dtype, 24, 20, 16);
    // More than 32 edges a receiver, and a sender: a second round of a warp.
    test_circuit(dtype, 2, 140, 7);
    test_circuit(dtype, 140, 2, 7);
  }
  test_many_blocks();
  test_far_rows();
  test_far_heads();
  std::printf(failures == 0 ? "all launchers agree with plain loops\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
