// Ops for steps of 9 to 64 rows: weights stream from memory once, whatever the rows; the routed experts that any row
// chose are read once each. Pointers, layouts, dtypes and errors as in decode.h: activations bfloat16, weights
// row-major bfloat16 or float8_e4m3 with block scales, rows at 16 bytes, launches chained by programmatic dependent
// launch (every kernel waits for its predecessors before it reads anything but weights and states of earlier steps). A
// row's bits do not depend on the other rows.
#pragma once

#include <cstdint>

#include "base/status.h"
#include "kernels/cuda/launch.h"
#include "kernels/gated_delta_net.h"
#include "kernels/types.h"

namespace tokenspeed::kernels::cuda {

inline constexpr int kBatchTokens = 64;
inline constexpr int kBatchTopK = 16;
inline constexpr int kBatchExperts = 512;

// The feed-forward part of a MoE layer up to the sum over experts: for pair (t, i) of a row and the i-th of its top_k
// experts, and for (t, top_k) and the shared expert,
//   result = down_e (silu(gate_e x[t]) * (up_e x[t]))
// The activation between is rounded to bfloat16, products with FP8 weights see x and it exactly (batch_tiles.cuh).
// Bytes: (distinct experts + shared) * 3 * width * hidden * element size.
// Launches: a cluster of 8 blocks for the choice of experts, then one block per multiprocessor.
struct BatchExperts {
  int64_t rows = 0;  // 1..kBatchTokens
  int64_t experts = 0;
  int64_t top_k = 0;
  bool normalize = true;
  const float* router_logits = nullptr;  // [T, experts], row stride router_stride
  int64_t router_stride = 0;
  int64_t hidden = 0;  // a multiple of 128
  int64_t width = 0;   // of 128 with FP8, else 64
  Rows x;              // [T, hidden]
  Matrix gate_up;      // of expert 0; the others follow, and so do their scales
  Matrix down;
  Matrix shared_gate_up;      // [2 * shared_width, hidden]; data null: no shared expert
  Matrix shared_down;         // [hidden, shared_width]
  int64_t shared_width = 0;   // as width
  void* workspace = nullptr;  // batch_experts_workspace_bytes(), 256-byte aligned
};
int64_t batch_experts_workspace_bytes(int64_t rows, int64_t experts, int64_t top_k, int64_t hidden, int64_t width,
                                      int64_t shared_width);
// Whether the sizes and dtypes fit.
bool batch_experts_fits(const BatchExperts& args);
Status batch_experts(const BatchExperts& args, const Launch& launch);

// What batch_experts leaves in its workspace.
struct BatchExpertsOutput {
  const float* results = nullptr;  // [T, top_k] rows of `hidden`, then the shared expert's [T]
  const float* weights = nullptr;  // [T, top_k]
};
BatchExpertsOutput batch_experts_output(const BatchExperts& args);

// x[t] += sum_i weights[t, i] results[t, i] + sigmoid(gate_logit[t]) results of the shared expert, i ascending, fp32,
// one rounding; then out[t] = norm(x[t]) as RmsNorm defines it. Without experts (results null) only the norm, without a
// norm_weight only the sum.
struct BatchNorm {
  int64_t rows = 0;
  int64_t columns = 0;  // a multiple of 8, at most 8192
  Rows x;               // the residual stream
  BatchExpertsOutput experts;
  int64_t top_k = 0;
  const float* shared_gate_logit = nullptr;  // [T], stride shared_gate_stride; null: no shared expert
  int64_t shared_gate_stride = 1;
  const float* norm_weight = nullptr;
  float epsilon = 1e-6f;
  Rows out;
  void* split = nullptr;  // optional: out once more as batch_split() writes it; columns a multiple of 128
};
Status batch_norm(const BatchNorm& args, const Launch& launch);

// y[t, 0:n] = (y[t] before, if accumulate) + x[t] . w[n] for every segment; x as FP8 weights see it is exact
// (batch_tiles.cuh), sums are fp32 in an order that depends on the shapes and on which of 16, 32 and 64 the rows reach
// first. Bytes: sum of n * k * element size. Launch: at most one block per multiprocessor, in clusters that share k.
struct BatchSegment {
  Matrix weight;  // bfloat16 or float8_e4m3, [n, k], k a multiple of 128 (at least 256 with FP8)
  Rows y;         // bfloat16 or float32
  bool accumulate = false;
};
inline constexpr int kBatchSegments = 4;
struct BatchLinear {
  int64_t rows = 0;
  Rows x;                       // [T, k]
  const void* split = nullptr;  // x as batch_split() writes it, which spares every block of an FP8 product doing so
  int32_t segment_count = 0;
  BatchSegment segments[kBatchSegments];
};
// The rows as FP8 products take them: the columns of batch_tiles.cuh as they lie in shared memory, then their scales.
int64_t batch_split_bytes(int64_t rows, int64_t columns);
Status batch_split(const Rows& x, int64_t rows, int64_t columns, void* split, const Launch& launch);
bool batch_linear_fits(const BatchLinear& args);
Status batch_linear(const BatchLinear& args, const Launch& launch);

// GdnMixer of many sequences of one token each: bfloat16 rows and conv state, key_dim = value_dim = 128, conv_kernel 4,
// up to 8 value heads per key head. fp32 between the stages, o rounded to bfloat16 before its norm. workspace is not
// used. `split`, when not null, takes out once more as batch_split() writes it. Bytes: 2 * value_heads * 64 KiB per
// sequence. Launch: a block per sequence and value head, in clusters of a key head's blocks.
bool batch_gdn_fits(const GdnShape& shape);
Status batch_gdn(const GdnMixer& args, void* split, const Launch& launch);

}  // namespace tokenspeed::kernels::cuda
