// What precedes the delta rule: causal convolution with SiLU, l2 norm of q and k, gates.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gdn_stages.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kTaps = 4;
constexpr int kHistory = kTaps - 1;
constexpr int kThreads = 128;
constexpr int kRun = 8;  // tokens one thread convolves one after the other

__device__ inline const bf16* conv_slot(const GdnState& state, int slot) {
  return reinterpret_cast<const bf16*>(state.conv + slot * state.slot_stride);
}

// The input `back` tokens before the sequence's first token of the step, back in 1..3.
__device__ inline float before_step(const CausalConv& args, int sequence, int64_t channel, int back) {
  const int slot = args.batch.state_in[sequence];
  if (slot < 0) return 0.0f;
  return __bfloat162float(conv_slot(args.state, slot)[(kHistory - back) * args.shape.channels() + channel]);
}

__device__ inline float input_at(const CausalConv& args, int sequence, int first_token, int64_t channel, int index) {
  if (index < 0) return before_step(args, sequence, channel, -index);
  return __bfloat162float(static_cast<const bf16*>(args.qkv.data)[(first_token + index) * args.qkv.stride + channel]);
}

constexpr int kPerLane = 4;  // consecutive channels; a warp has 128 of them, whole heads

// kPerLane channels of one input row.
__device__ inline uint2 inputs_at(const CausalConv& args, int sequence, int first_token, int64_t channel, int index) {
  if (index >= 0) {
    return *reinterpret_cast<const uint2*>(static_cast<const bf16*>(args.qkv.data) +
                                           (first_token + index) * args.qkv.stride + channel);
  }
  const int slot = args.batch.state_in[sequence];
  if (slot < 0) return uint2{};
  return *reinterpret_cast<const uint2*>(conv_slot(args.state, slot) + (kHistory + index) * args.shape.channels() +
                                         channel);
}

__device__ inline void unpack(uint2 packed, float (&x)[kPerLane]) {
  const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed.x));
  const float2 high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed.y));
  x[0] = low.x;
  x[1] = low.y;
  x[2] = high.x;
  x[3] = high.y;
}

// Convolves kRun consecutive rows. With kNormalise q and k leave with unit length (q scaled by 1/sqrt(key_dim) too);
// key_dim / kPerLane lanes hold a head.
template <bool kNormalise>
__global__ void __launch_bounds__(kThreads) conv_kernel(CausalConv args) {
  const int64_t channel = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * kPerLane;
  const bool active = channel < args.shape.channels();
  const int first_row = blockIdx.x * kRun;
  const int rows = min(kRun, args.batch.tokens - first_row);
  float taps[kPerLane][kTaps] = {};
  uint2 inputs[kRun] = {};
  if (active) {
    const bf16* const from = static_cast<const bf16*>(args.qkv.data) + first_row * args.qkv.stride + channel;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < rows) inputs[i] = *reinterpret_cast<const uint2*>(from + i * args.qkv.stride);
    }
#pragma unroll
    for (int c = 0; c < kPerLane; ++c) {
      const float4 w = *reinterpret_cast<const float4*>(args.weight + (channel + c) * kTaps);
      taps[c][0] = w.x;
      taps[c][1] = w.y;
      taps[c][2] = w.z;
      taps[c][3] = w.w;
    }
  }
  const int64_t key_columns = args.shape.key_heads * args.shape.key_dim;
  const int head_lanes = static_cast<int>(args.shape.key_dim) / kPerLane;
  const float query_scale = rsqrtf(static_cast<float>(args.shape.key_dim));

  int sequence = -1;
  float window[kTaps][kPerLane] = {};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i >= rows) break;
    const int row = first_row + i;
    const int row_sequence = args.batch.sequence[row];
    if (row_sequence != sequence && active) {
      const int first_token = args.batch.token_begin[row_sequence];
#pragma unroll
      for (int j = 1; j < kTaps; ++j) {
        unpack(inputs_at(args, row_sequence, first_token, channel, row - first_token - kTaps + j), window[j]);
      }
    }
    sequence = row_sequence;
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) {
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) window[j][c] = window[j + 1][c];
    }
    unpack(inputs[i], window[kTaps - 1]);
    float result[kPerLane] = {};
    float squares = 0;
#pragma unroll
    for (int c = 0; c < kPerLane; ++c) {
#pragma unroll
      for (int j = 0; j < kTaps; ++j) result[c] += taps[c][j] * window[j][c];
      result[c] = silu(result[c]);
      squares += result[c] * result[c];
    }
    if constexpr (kNormalise) {
      for (int offset = head_lanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
      const float length = rsqrtf(squares + 1e-6f) * (channel < key_columns ? query_scale : 1.0f);
      const float scale = channel < 2 * key_columns ? length : 1.0f;
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) result[c] *= scale;
    }
    if (!active) continue;
    const __nv_bfloat162 low = __floats2bfloat162_rn(result[0], result[1]);
    const __nv_bfloat162 high = __floats2bfloat162_rn(result[2], result[3]);
    *reinterpret_cast<uint2*>(static_cast<bf16*>(args.out.data) + row * args.out.stride + channel) =
        make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
  }
}

// The last three inputs of each sequence become state_out's. Runs after the convolution, which still reads state_in.
__global__ void conv_state_kernel(CausalConv args) {
  const int64_t channel = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (channel >= args.shape.channels()) return;
  const int sequence = blockIdx.y;
  const int first_token = args.batch.token_begin[sequence];
  const int tokens = args.batch.token_begin[sequence + 1] - first_token;
  float last[kHistory];
#pragma unroll
  for (int j = 0; j < kHistory; ++j) last[j] = input_at(args, sequence, first_token, channel, tokens - kHistory + j);
  bf16* out = const_cast<bf16*>(conv_slot(args.state, args.batch.state_out[sequence]));
#pragma unroll
  for (int j = 0; j < kHistory; ++j) out[j * args.shape.channels() + channel] = __float2bfloat16(last[j]);
}

__global__ void gates_kernel(GdnGates args) {
  const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (index >= args.tokens * args.value_heads) return;
  const int64_t token = index / args.value_heads;
  const int64_t head = index % args.value_heads;
  const float b = __bfloat162float(static_cast<const bf16*>(args.b.data)[token * args.b.stride + head]);
  const float a =
      __bfloat162float(static_cast<const bf16*>(args.a.data)[token * args.a.stride + head]) + args.dt_bias[head];
  const float softplus = a > 20.0f ? a : log1pf(expf(a));
  args.beta[index] = 1.0f / (1.0f + expf(-b));
  args.decay[index] = expf(-expf(args.a_log[head]) * softplus);
}

// One warp per q or k head of a token.
__global__ void l2_norm_kernel(GdnL2Norm args) {
  const int64_t heads = 2 * args.shape.key_heads;
  const int64_t index = blockIdx.x * int64_t{kThreads / kWarp} + threadIdx.x / kWarp;
  if (index >= args.tokens * heads) return;
  const int key_dim = static_cast<int>(args.shape.key_dim);
  bf16* x = static_cast<bf16*>(args.qkv.data) + index / heads * args.qkv.stride + index % heads * key_dim;
  float squares = 0;
  for (int i = threadIdx.x % kWarp; i < key_dim; i += kWarp) {
    const float v = __bfloat162float(x[i]);
    squares += v * v;
  }
  const bool is_query = index % heads < args.shape.key_heads;
  const float scale = rsqrtf(warp_sum(squares) + 1e-6f) * (is_query ? rsqrtf(static_cast<float>(key_dim)) : 1.0f);
  for (int i = threadIdx.x % kWarp; i < key_dim; i += kWarp) x[i] = __float2bfloat16(__bfloat162float(x[i]) * scale);
}

template <bool kNormalise>
void convolve(const CausalConv& args, cudaStream_t stream) {
  const unsigned channel_blocks = static_cast<unsigned>(ceil_div(args.shape.channels(), kThreads));
  const dim3 grid(static_cast<unsigned>(ceil_div(args.batch.tokens, kRun)),
                  static_cast<unsigned>(ceil_div(args.shape.channels(), kThreads * kPerLane)));
  conv_kernel<kNormalise><<<grid, kThreads, 0, stream>>>(args);
  conv_state_kernel<<<dim3(channel_blocks, static_cast<unsigned>(args.batch.sequences)), kThreads, 0, stream>>>(args);
}

}  // namespace

void causal_conv(const CausalConv& args, cudaStream_t stream) { convolve<false>(args, stream); }
void causal_conv_normalised(const CausalConv& args, cudaStream_t stream) { convolve<true>(args, stream); }

void gdn_gates(const GdnGates& args, cudaStream_t stream) {
  gates_kernel<<<static_cast<unsigned>(ceil_div(args.tokens * args.value_heads, kThreads)), kThreads, 0, stream>>>(
      args);
}

void gdn_l2_norm(const GdnL2Norm& args, cudaStream_t stream) {
  const int64_t heads = args.tokens * 2 * args.shape.key_heads;
  l2_norm_kernel<<<static_cast<unsigned>(ceil_div(heads, kThreads / kWarp)), kThreads, 0, stream>>>(args);
}

}  // namespace tokenspeed::kernels::cuda
