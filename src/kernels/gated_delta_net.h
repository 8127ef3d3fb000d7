// The Gated DeltaNet mixer between its input and output projections, as separate ops and as one fused op.
// Source: Yang et al., "Gated Delta Networks" (2024), with the family's conventions: decay before read, output after
// update, q scaled by 1/sqrt(key_dim), l2norm eps 1e-6 inside the root.
//
// A state slot holds, for every GDN layer of the rank, one after the other:
//     recurrent_state  float32 [value_heads][value_dim][key_dim]        ("v-first": key_dim contiguous)
//     conv_state       activation dtype [3][channels]                   (oldest input first, pre-conv inputs)
// The pointers below are those of one layer in slot 0; slot s lies at + s * slot_stride bytes.
#pragma once

#include <cstddef>

#include "kernels/types.h"

namespace tokenspeed::kernels {

struct GdnShape {
  int64_t key_heads = 0;
  int64_t value_heads = 0;  // a multiple of key_heads; value head h uses key head h / (value_heads / key_heads)
  int64_t key_dim = 128;
  int64_t value_dim = 128;
  int64_t conv_kernel = 4;
  constexpr int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

struct GdnState {
  std::byte* recurrent = nullptr;  // float32
  std::byte* conv = nullptr;
  DType conv_dtype = DType::kFloat32;
  int64_t slot_stride = 0;  // bytes
};

// Depthwise causal convolution + SiLU: c[t, ch] = silu(sum_{j<4} weight[ch, j] * u[t - 3 + j, ch]); inputs before the
// step come from state_in's conv_state (zeros when state_in is -1); the last 3 inputs go to state_out's.
// qkv and out: [T, channels] laid out [q | k | v]; out must not alias qkv.
struct CausalConv {
  GdnShape shape;
  SequenceBatch batch;
  GdnState state;
  Rows qkv;
  const float* weight = nullptr;  // [channels, conv_kernel]
  Rows out;
};

// beta = sigmoid(b), decay = exp(-exp(a_log) * softplus(a + dt_bias)); softplus(x) = x above 20. out float32 [T,
// heads].
struct GdnGates {
  int64_t tokens = 0;
  int64_t value_heads = 0;
  Rows b;                          // [T, value_heads]
  Rows a;                          // [T, value_heads]
  const float* a_log = nullptr;    // [value_heads]
  const float* dt_bias = nullptr;  // [value_heads]
  float* beta = nullptr;
  float* decay = nullptr;
};

// In place over q and k of a conv output: q <- q * rsqrt(sum q^2 + 1e-6) / sqrt(key_dim), k <- k * rsqrt(sum k^2 +
// 1e-6).
struct GdnL2Norm {
  GdnShape shape;
  int64_t tokens = 0;
  Rows qkv;
};

// Recurrence per value head, S [value_dim][key_dim] float32, tokens of a sequence in order:
//   S <- decay S;  m = S k;  d = beta (v - m);  S <- S + d k^T;  o = S q.
// Reads state_in's slot (zero when -1), writes state_out's after the last token of the step.
// FLOPs per token and value head: about 7 * key_dim * value_dim. State bytes: 2 * 4 * key_dim * value_dim per head and
// sequence, once per step whatever T.
struct GatedDeltaRule {
  GdnShape shape;
  SequenceBatch batch;
  GdnState state;
  Rows qkv;                      // normalised q, k; v
  const float* beta = nullptr;   // [T, value_heads]
  const float* decay = nullptr;  // [T, value_heads]
  Rows out;                      // [T, value_heads * value_dim]
};

// All of the above and the gated norm in one op, fp32 between the stages, one rounding of o before its norm (to
// out.dtype) and one at the end. qkv, z, b, a may be column ranges of one merged projection's output.
// Workspace: gdn_mixer_workspace_bytes().
struct GdnMixer {
  GdnShape shape;
  SequenceBatch batch;
  GdnState state;
  Rows qkv;
  Rows z;  // [T, value_heads * value_dim]
  Rows b;
  Rows a;
  const float* conv_weight = nullptr;
  const float* a_log = nullptr;
  const float* dt_bias = nullptr;
  const float* norm_weight = nullptr;  // [value_dim], plain (not 1 + w)
  float epsilon = 1e-6f;
  Rows out;
  void* workspace = nullptr;
};

int64_t gdn_mixer_workspace_bytes(const GdnShape& shape, int64_t tokens);

namespace reference {
void causal_conv(const CausalConv& args);
void gdn_gates(const GdnGates& args);
void gdn_l2_norm(const GdnL2Norm& args);
void gated_delta_rule(const GatedDeltaRule& args);
void gdn_mixer(const GdnMixer& args);
}  // namespace reference

// key_dim a multiple of 16, it and value_dim up to 256; conv_kernel 4. With float32 rows gdn_mixer gives the bits of
// the separate steps.
namespace cpu {
void causal_conv(const CausalConv& args, ThreadPool& pool);
void gdn_gates(const GdnGates& args, ThreadPool& pool);
void gdn_l2_norm(const GdnL2Norm& args, ThreadPool& pool);
void gated_delta_rule(const GatedDeltaRule& args, ThreadPool& pool);
void gdn_mixer(const GdnMixer& args, ThreadPool& pool);
}  // namespace cpu

}  // namespace tokenspeed::kernels
