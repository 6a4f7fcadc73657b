// Entry points of the CUDA kernels: raw pointers, sizes and a stream, without torch. Pointers are
// to device memory, row-major and dense. Each returns the launch's cudaError_t as an int.

#pragma once

#include <cstdint>

namespace m2mkd::cuda {

enum class DType { f32, f64, f16, bf16 };
enum class GateMode { selected, all, all_renorm };
enum class Activation { identity, gelu, gelu_tanh, relu, silu };

int launch_topk_gate(DType dtype, const void* logits, int tokens, int experts, int k, GateMode mode,
                     void* weights, int32_t* chosen, void* stream);

int launch_topk_gate_backward(DType dtype, const void* grad, const void* logits,
                              const int32_t* chosen, int tokens, int experts, int k, GateMode mode,
                              void* result, void* stream);

// Most experts that plan kernels can count in shared memory.
constexpr int kMaxExperts = 1024;
// Choices per block of the plan kernels; counts is [ceil(tokens * k / kPlanBlock), experts].
constexpr int kPlanBlock = 256;

// limit < 0 means no capacity; order may be null; rows is the length of token_of.
int launch_moe_plan(const int32_t* chosen, const int64_t* order, int tokens, int k, int experts,
                    int limit, int rows, int32_t* counts, int32_t* row_of, int32_t* token_of,
                    int32_t* offsets, void* stream);

// out[r] = x[token_of[r]], zeros where that is negative.
int launch_gather(DType dtype, const void* x, const int32_t* token_of, int rows, int width,
                  void* out, void* stream);

// out[t] = sum over k of weights[t, k] rows[row_of[t, k]] in order of k; weights may be null.
int launch_sum_rows(DType dtype, const void* rows, const int32_t* row_of, const void* weights,
                    int tokens, int k, int width, void* out, void* stream);

// Writes only the rows that row_of names; grad_weights is written everywhere.
int launch_combine_backward(DType dtype, const void* grad, const void* rows, const void* weights,
                            const int32_t* row_of, int tokens, int k, int width, void* grad_rows,
                            void* grad_weights, void* stream);

// choice_of[row_of[i]] = i and weight_of[row_of[i]] = weights[i]; both must be pre-filled.
int launch_invert_rows(DType dtype, const int32_t* row_of, const void* weights, int choices,
                       int32_t* choice_of, void* weight_of, void* stream);

// out = act(z + bias[expert]), zeros on rows past offsets[experts]; bias may be null.
int launch_activate(DType dtype, Activation act, const void* z, const void* bias,
                    const int32_t* offsets, int experts, int rows, int width, void* out,
                    void* stream);

struct ActivateBackward {
  const void* z;
  const void* fc1_bias;      // may be null
  const void* fc2_bias;      // may be null
  const void* upstream;      // [rows, width]
  void* hidden_grad;         // [rows, hidden], in: gradient of the activation, out: of z
  void* weighted;            // [rows, hidden], weight times activation; may be null
  const void* weight_of;     // [rows], compute type
  const int32_t* choice_of;  // [rows]
  void* gate_grad;           // [choices], compute type
  const int32_t* offsets;
  int experts, rows, hidden, width;
};
int launch_activate_backward(DType dtype, Activation act, const ActivateBackward& args,
                             void* stream);

// Rows that column sums add before they meet those of other chunks.
constexpr int kColumnChunk = 128;

// out[e] = sum over the rows of expert e of scale[row] rows[row], in a fixed order; scale may be
// null. `count` rows; partial is scratch, [ceil(count / kColumnChunk) + experts, width] in the
// compute type.
int launch_sum_columns(DType dtype, const void* rows, const void* scale, const int32_t* offsets,
                       int experts, int count, int width, void* partial, void* out, void* stream);

// Attention along a circuit's edges: see csrc/library.cpp. Widths go up to kMaxHeadWidth; scores,
// biases and log-sum-exps are in the compute type.
constexpr int kMaxHeadWidth = 256;

struct CircuitForward {
  const void *q, *k, *v;  // [batch, heads, receivers or senders, width]
  const void* bias;       // [edges] (bias_stride 0) or [batch, edges] (bias_stride edges), or null
  int64_t bias_stride;
  const int32_t* row_ptr;
  const int32_t* sender;
  double scale;
  int batch, heads, receivers, senders, edges, width;
  void* out;
  void* lse;  // [batch, heads, receivers]
};
int launch_circuit_forward(DType dtype, const CircuitForward& args, void* stream);

struct CircuitBackward {
  const void *grad, *out, *q, *k, *v;
  const void* bias;  // as in CircuitForward
  int64_t bias_stride;
  const void* lse;
  const int32_t *row_ptr, *sender;              // by receiver
  const int32_t *col_ptr, *receiver, *edge_id;  // by sender
  double scale;
  int batch, heads, receivers, senders, edges, width;
  void* delta;  // [batch, heads, receivers], compute type: written by the first, read by the second
  void* q_grad;
  void *k_grad, *v_grad;
  void* edge_grad;  // [batch, parts, edges], compute type, or null where not wanted
  int parts;        // see circuit_parts; heads where edge_grad is null
};

// Into how many parts launch_circuit_receivers should cut the heads of each example where edge_grad
// is wanted: more parts are more blocks, and as many summands for the caller to add up.
int circuit_parts(DType dtype, const CircuitBackward& args);

// Writes delta, q_grad and edge_grad, whose entries are sums over the heads of a part.
int launch_circuit_receivers(DType dtype, const CircuitBackward& args, void* stream);

// Writes k_grad and v_grad.
int launch_circuit_senders(DType dtype, const CircuitBackward& args, void* stream);

// out[s, i] = sum over p of terms[s, p, i], in order of p.
int launch_sum_parts(DType dtype, const void* terms, int sums, int parts, int count, void* out,
                     void* stream);

// Copies device integers to the host and waits for them.
int read_integers(const int32_t* from, int count, int32_t* to, void* stream);

}  // namespace m2mkd::cuda
