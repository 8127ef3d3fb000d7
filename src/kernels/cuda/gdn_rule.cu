// The delta rule token by token, and the mixer that strings the stages together.
#include <climits>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gdn_stages.cuh"
#include "kernels/cuda/norm.h"

namespace tokenspeed::kernels::cuda {
namespace {

// Eight lanes share a row of S; a warp holds 4 * kRowsPerLane rows, a block kWarps times that.
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerLane = 2;
constexpr int kWarps = 2;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlockRows = kWarps * (kWarp / kLanesPerRow) * kRowsPerLane;

__device__ inline float row_sum(float x) {
#pragma unroll
  for (int offset = kLanesPerRow / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

template <int kKeyDim>
__global__ void __launch_bounds__(kThreads) rule_kernel(GatedDeltaRule args, int limit) {
  constexpr int kPerLane = kKeyDim / kLanesPerRow;
  const int sequence = blockIdx.z;
  if (args.batch.token_begin[sequence + 1] - args.batch.token_begin[sequence] >= limit) return;
  const int head = blockIdx.y;
  const int lane = threadIdx.x % kLanesPerRow;
  const int first_value = blockIdx.x * kBlockRows + static_cast<int>(threadIdx.x) / kLanesPerRow * kRowsPerLane;
  const int value_dim = static_cast<int>(args.shape.value_dim);
  const int value_heads = static_cast<int>(args.shape.value_heads);
  const int key_head = head / static_cast<int>(args.shape.value_heads / args.shape.key_heads);
  const int64_t key_columns = args.shape.key_heads * kKeyDim;

  // Lane l holds elements l, l + 8, ... of its rows.
  float state[kRowsPerLane][kPerLane] = {};
  const auto slot_row = [&](int slot, int r) {
    return reinterpret_cast<float*>(args.state.recurrent + slot * args.state.slot_stride) +
           (static_cast<int64_t>(head) * value_dim + first_value + r) * kKeyDim;
  };
  if (const int slot = args.batch.state_in[sequence]; slot >= 0) {
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) state[r][i] = slot_row(slot, r)[i * kLanesPerRow + lane];
    }
  }

  for (int64_t token = args.batch.token_begin[sequence]; token < args.batch.token_begin[sequence + 1]; ++token) {
    const bf16* row = static_cast<const bf16*>(args.qkv.data) + token * args.qkv.stride;
    float q[kPerLane], k[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      q[i] = __bfloat162float(row[key_head * kKeyDim + i * kLanesPerRow + lane]);
      k[i] = __bfloat162float(row[key_columns + key_head * kKeyDim + i * kLanesPerRow + lane]);
    }
    const float beta = args.beta[token * value_heads + head];
    const float decay = args.decay[token * value_heads + head];
#pragma unroll
    for (int r = 0; r < kRowsPerLane; ++r) {
      const float v = __bfloat162float(row[2 * key_columns + head * value_dim + first_value + r]);
      float memory = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        state[r][i] *= decay;
        memory += state[r][i] * k[i];
      }
      const float delta = beta * (v - row_sum(memory));
      float out = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        state[r][i] += delta * k[i];
        out += state[r][i] * q[i];
      }
      out = row_sum(out);
      if (lane == 0) {
        static_cast<bf16*>(args.out.data)[token * args.out.stride + head * value_dim + first_value + r] =
            __float2bfloat16(out);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsPerLane; ++r) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      slot_row(args.batch.state_out[sequence], r)[i * kLanesPerRow + lane] = state[r][i];
  }
}

constexpr int64_t kAlignment = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int64_t conv_bytes(const GdnShape& shape, int64_t tokens) { return aligned(tokens * shape.channels() * 2); }
bool has_chunks(const GdnShape& shape, int64_t tokens) {
  return shape.key_dim == 128 && shape.value_dim == 128 && tokens >= kChunkedRuleTokens;
}
int64_t gate_bytes(const GdnShape& shape, int64_t tokens) { return aligned(tokens * shape.value_heads * 4); }

}  // namespace

void recurrent_rule(const GatedDeltaRule& args, int limit, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.shape.value_dim / kBlockRows),
                  static_cast<unsigned>(args.shape.value_heads), static_cast<unsigned>(args.batch.sequences));
  switch (args.shape.key_dim) {
    case 32:
      rule_kernel<32><<<grid, kThreads, 0, stream>>>(args, limit);
      break;
    case 64:
      rule_kernel<64><<<grid, kThreads, 0, stream>>>(args, limit);
      break;
    default:
      rule_kernel<128><<<grid, kThreads, 0, stream>>>(args, limit);
      break;
  }
}

void gated_delta_rule(const GatedDeltaRule& args, cudaStream_t stream) { recurrent_rule(args, INT_MAX, stream); }

int64_t gdn_mixer_workspace_bytes(const GdnShape& shape, int64_t tokens) {
  return conv_bytes(shape, tokens) + 2 * gate_bytes(shape, tokens) +
         (has_chunks(shape, tokens) ? chunked_rule_workspace_bytes(shape, tokens) : 0);
}

void gdn_mixer(const GdnMixer& args, cudaStream_t stream) {
  const int64_t tokens = args.batch.tokens;
  std::byte* workspace = static_cast<std::byte*>(args.workspace);
  const Rows convolved = {workspace, DType::kBFloat16, args.shape.channels()};
  float* beta = reinterpret_cast<float*>(workspace + conv_bytes(args.shape, tokens));
  float* decay = reinterpret_cast<float*>(workspace + conv_bytes(args.shape, tokens) + gate_bytes(args.shape, tokens));
  causal_conv_normalised({args.shape, args.batch, args.state, args.qkv, args.conv_weight, convolved}, stream);
  gdn_gates({tokens, args.shape.value_heads, args.b, args.a, args.a_log, args.dt_bias, beta, decay}, stream);
  const GatedDeltaRule rule{args.shape, args.batch, args.state, convolved, beta, decay, args.out};
  // In a batch of one token each no sequence is long enough for chunks.
  if (has_chunks(args.shape, tokens) && tokens - args.batch.sequences + 1 >= kChunkedRuleTokens) {
    chunked_rule(rule, decay + gate_bytes(args.shape, tokens) / 4, stream);
    if (args.batch.sequences > 1) recurrent_rule(rule, kChunkedRuleTokens, stream);
  } else {
    gated_delta_rule(rule, stream);
  }
  gated_rms_norm({tokens, args.shape.value_heads, args.shape.value_dim, args.out, args.z, args.norm_weight,
                  args.epsilon, args.out},
                 stream);
}

}  // namespace tokenspeed::kernels::cuda
