// Ops for steps of at most kDecodeTokens rows: a token at the speed of its weight bytes. Weights stream from memory
// once per step whatever T; the next launch fetches its first weights while this one runs (programmatic dependent
// launch).
//
// A layer is six launches or fewer (qwen3.5 MoE; x is the residual stream, bfloat16):
//   1 decode_linear     norm(x) -> q_gate|k|v, or qkv|z|b|a        segments of one launch, norm fused
//   2 decode_gdn        conv, l2norm, gates, rule, gated norm       or decode_attention
//   3 decode_linear     x += W out                                  accumulate
//   4 decode_linear     norm(x) -> normed, router logits, shared gate logit
//   5 decode_gate_up    top-k, silu(gate) * up of routed and shared experts; dense: norm fused, no router (4 falls
//   away) 6 decode_down       x += sum w_e down_e h_e + sigmoid(gate) down_s h_s     dense: decode_linear with
//   accumulate
//
// Common contract. All pointers are device memory; activations bfloat16 with rows at 16-byte alignment and strides that
// are multiples of 8; weights kRowMajor bfloat16, or float8_e4m3 with float32 block scales; inner sizes are multiples
// of
// 64. Nothing is allocated, the host does not wait, every op may be captured in a graph. Errors: invalid_argument for a
// shape the op does not take, internal_error for a launch that failed; both name the op.
// Bits: a row's result depends on that row only, not on T or its place (fixed order of every sum).
// A launch may read its weights, state slots, KV pages of older tokens, page tables and slot indices before its
// predecessor ends, so those must have been written two or more launches earlier.
#pragma once

#include <cstdint>
#include <span>
#include <variant>

#include "base/status.h"
#include "kernels/attention.h"
#include "kernels/cuda/launch.h"
#include "kernels/gated_delta_net.h"
#include "kernels/types.h"

namespace tokenspeed::kernels::cuda {

inline constexpr int kDecodeTokens = 8;
inline constexpr int kDecodeSegments = 4;
inline constexpr int kDecodeTopK = 16;
inline constexpr int kDecodeExperts = 512;

// One weight of a decode_linear: y[t, 0:n] = (y[t] before, if accumulate) + norm(x)[t] . w[n]. y bfloat16 or float32.
struct DecodeSegment {
  Matrix weight;
  Rows y;
  bool accumulate = false;
};

// norm(x) is x, or with norm_weight the zero-centred RMS norm of x rounded to bfloat16, which is also written to
// `normed` when that is set. FP8 weights are multiplied exactly and scaled per 128 x 128 block in fp32; sums are fp32.
// Bytes: sum of n * k * element size. Launch: min(tiles of 16 rows, multiprocessors) blocks of 512 threads.
// Rows that do not fit in shared memory together (8 of more than about 8,192 columns) are split over launches, each of
// which reads the weights.
struct DecodeLinear {
  int64_t rows = 0;                    // T, 1..kDecodeTokens
  Rows x;                              // [T, k]
  const float* norm_weight = nullptr;  // [k] or null
  float norm_epsilon = 1e-6f;
  Rows normed;  // optional, [T, k]
  // Of decode_layers() only, for the head: row i of y is that of x's row wanted[i]; null: all rows in order.
  const int32_t* wanted = nullptr;  // [wanted_count], ascending
  int32_t wanted_count = 0;
  int32_t segment_count = 0;
  DecodeSegment segments[kDecodeSegments];
};
Status decode_linear(const DecodeLinear& args, const Launch& launch);

// Routed experts as stored in checkpoints: expert e's [2 * width, hidden] (gate rows first) and [hidden, width] follow
// expert e - 1's, and so do their scales.
struct DecodeExperts {
  int64_t experts = 0;  // 0: no routed experts (dense)
  int64_t top_k = 0;
  bool normalize = true;
  const float* router_logits = nullptr;  // [T, experts], row stride router_stride
  int64_t router_stride = 0;
  Matrix gate_up;  // of expert 0
  Matrix down;
};

// h[t, i] = silu(gate_e x[t]) * (up_e x[t]) for the i-th of the row's top_k experts, and h[t, top_k] for the shared
// one, rounded to bfloat16. Each expert that any row chose is read once. ids and weights as MoeRouter defines them are
// written when the pointers are set.
// Bytes: (distinct experts + shared) * 2 * width * hidden * element size. Launch: multiprocessors x 512 threads.
struct DecodeGateUp {
  int64_t rows = 0;
  int64_t hidden = 0;
  int64_t width = 0;
  Rows x;  // [T, hidden]; normalised already unless norm_weight is set
  const float* norm_weight = nullptr;
  float norm_epsilon = 1e-6f;
  DecodeExperts routed;
  Matrix shared_gate_up;  // [2 * shared width, hidden]; data null: none
  int64_t shared_width = 0;
  void* h = nullptr;              // bfloat16 [T, top_k + 1, max(width, shared_width)]
  int32_t* expert_ids = nullptr;  // optional [T, top_k]
  float* expert_weights = nullptr;
};
Status decode_gate_up(const DecodeGateUp& args, const Launch& launch);

// y[t] = y[t] before (if accumulate) + sum_i weight[t, i] down_e h[t, i] (i ascending) + sigmoid(gate_logit[t]) down_s
// h[t, top_k], fp32, one rounding. Routing is computed again from the logits, so that weights are fetched early.
// Bytes: (distinct experts + shared) * hidden * width * element size. Launch: hidden / 16 blocks of 512 threads.
struct DecodeDown {
  int64_t rows = 0;
  int64_t hidden = 0;
  int64_t width = 0;
  DecodeExperts routed;
  Matrix shared_down;  // [hidden, shared_width]; data null: none
  int64_t shared_width = 0;
  const float* shared_gate_logit = nullptr;  // [T], row stride shared_gate_stride; null: gate 1
  int64_t shared_gate_stride = 1;
  const void* h = nullptr;
  Rows y;  // [T, hidden] bfloat16
  bool accumulate = true;
};
Status decode_down(const DecodeDown& args, const Launch& launch);

// GdnMixer in one launch for steps of few tokens: kernels/gated_delta_net.h has the formulas. bfloat16 rows and conv
// state, key_dim = value_dim = 128, conv_kernel 4, value_heads / key_heads in 1..4. workspace is not used. All stages
// are fp32; o is rounded to bfloat16 before its norm. Bytes: 2 * value_heads * 64 KiB per sequence. Launch: clusters of
// 8 blocks per key head and sequence.
Status decode_gdn(const GdnMixer& args, const Launch& launch);

// Attention of the step's tokens from the projections on: q and k norm, rope, KV write, softmax over all keys, output
// gate. Same results as AttentionPrepare followed by PagedAttention (to the tolerance of bfloat16 probabilities).
// The keys of a row are summed in segments of decode_key_segment(its position), whose results are then added in an
// order that depends on their number alone. One launch of a block per segment, KV head and sequence; where a sequence's
// rows have segments of two sizes, each of the two kinds of rows has its own.
// Every sequence has at least one token; at most kDecodeTokens tokens, or any number of sequences of one token each.
// max_context: no sequence may have context + new tokens above it; it sets the number of blocks launched, so one
// captured graph serves all contexts up to it; at most 2^20, and pages of at most 4,096 positions. KV pages bfloat16 or
// float8_e4m3 (unscaled). Bytes: per sequence,
// context * kv_heads * head_dim * 2 * element size.
struct DecodeAttention {
  AttentionShape shape;  // head_dim 256; query_heads / kv_heads <= 16
  SequenceBatch batch;
  KvPages pages;
  Rows q_gate;  // [T, query_heads * 2 * head_dim], gates beside queries
  Rows key;     // [T, kv_heads * head_dim], raw projections
  Rows value;
  const float* query_norm = nullptr;
  const float* key_norm = nullptr;
  float epsilon = 1e-6f;
  Rows out;  // [T, query_heads * head_dim]
  int64_t max_context = 0;
  void* workspace = nullptr;  // decode_attention_workspace_bytes(), zeroed once before the first use
};
// Short segments spread a short context over more multiprocessors, long ones have less to add up in the end. The limits
// are multiples of the sizes on both sides.
inline constexpr int kDecodeMiddleSegments = 16384;
inline constexpr int kDecodeLongSegments = 32768;
constexpr int decode_key_segment(int64_t position) {
  return position < kDecodeMiddleSegments ? 128 : position < kDecodeLongSegments ? 256 : 512;
}
int64_t decode_attention_workspace_bytes(const AttentionShape& shape, int64_t tokens, int64_t max_context);
Status decode_attention(const DecodeAttention& args, const Launch& launch);

// Ops one after the other with as few launches as possible: a persistent kernel runs whole layers but their attention,
// with the weights of later phases on their way (decode_layers_program.h). Same results as the single ops to their
// tolerances; a row's bits as everywhere here independent of T.
// Of what the ops of a layer write, only the residual stream (DecodeLinear::segments[0].y of those that accumulate,
// DecodeDown::y), the states and the results of projections that an op of another launch reads are written; the other
// arrays between them keep what they held.
// workspace: kDecodeLayersWorkspaceBytes, zeroed once before the first use, not shared by streams that overlap.
// Normalised rows meet their weights before they are divided by their norm: elements of x * (1 + norm weight) beyond
// 500,000 become infinite.
// A projection of a norm may have float32 results, as the head has.
// Launch: a block of 576 to 640 threads with all of its shared memory on every multiprocessor. Other kernels on the GPU
// delay it but must end without it.
using DecodePhase = std::variant<DecodeLinear, GdnMixer, DecodeAttention, DecodeGateUp, DecodeDown>;
inline constexpr int64_t kDecodeLayersWorkspaceBytes = 16 << 20;
// progress: where the persistent kernel's first block writes the numbers of two ops: the one that it begins (at its end
// that of the op after the last), and the one whose weights or states it fetches ahead; ops are counted from `first`.
// Memory that the host can read while the kernel runs and after a fault. As blocks wait for each other, every op before
// the one that comes before the first number is over, and of those behind the second nothing has begun.
struct DecodeProgress {
  uint32_t* ops = nullptr;  // [2]; null: nowhere
  uint32_t first = 0;
};
Status decode_layers(std::span<const DecodePhase> ops, void* workspace, const Launch& launch,
                     const DecodeProgress& progress = {});
// Whether the persistent kernel takes this projection behind the experts of its residual stream.
bool decode_layers_takes(const DecodeLinear& op);

// token[t] = the id of the greatest of logits[t, 0:vocabulary] (ties: the lower id); -1 if any is NaN or +inf or all
// are -inf. workspace: decode_argmax_workspace_bytes(), zeroed once before the first use.
struct DecodeArgmax {
  int64_t rows = 0;
  int64_t vocabulary = 0;
  const float* logits = nullptr;
  int64_t stride = 0;
  int32_t* tokens = nullptr;  // [T]
  void* workspace = nullptr;
};
int64_t decode_argmax_workspace_bytes(int64_t rows);
Status decode_argmax(const DecodeArgmax& args, const Launch& launch);

// Parameters of one row, in device memory (they change from step to step of one captured graph).
struct DecodeSampleRow {
  float temperature = 1.0f;  // 0: greedy
  float top_p = 1.0f;
  float min_p = 0.0f;
  int32_t top_k = 0;  // 0: off
  uint64_t seed = 0;
  int64_t position = 0;
};
// Steps 3 to 5 of kernels/sampling.h on the device (bias and penalties must have been applied to the logits): the same
// token as the CPU's but where a sum of probabilities meets top_p within rounding of double.
// Launch: one cluster of 8 blocks per row, which holds the row in shared memory. vocabulary <= 400,000.
struct DecodeSample {
  int64_t rows = 0;
  int64_t vocabulary = 0;
  const float* logits = nullptr;
  int64_t stride = 0;
  const DecodeSampleRow* parameters = nullptr;  // [T]
  int32_t* tokens = nullptr;                    // [T]; -1: a NaN or +inf among the logits, or all are -inf
};
Status decode_sample(const DecodeSample& args, const Launch& launch);

}  // namespace tokenspeed::kernels::cuda
