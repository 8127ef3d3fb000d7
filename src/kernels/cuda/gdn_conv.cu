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

// Convolves kRun consecutive rows of one channel. With kNormalise a block's threads are whole heads (key_dim divides
// the block), and q and k leave with unit length (q scaled by 1/sqrt(key_dim) too).
template <bool kNormalise>
__global__ void __launch_bounds__(kThreads) conv_kernel(CausalConv args) {
  const int64_t channel = blockIdx.y * int64_t{kThreads} + threadIdx.x;
  const bool active = channel < args.shape.channels();
  const int first_row = blockIdx.x * kRun;
  const int rows = min(kRun, args.batch.tokens - first_row);
  float taps[kTaps] = {};
  if (active) {
#pragma unroll
    for (int j = 0; j < kTaps; ++j) taps[j] = args.weight[channel * kTaps + j];
  }
  const int64_t key_columns = args.shape.key_heads * args.shape.key_dim;
  const bool is_query = channel < key_columns;
  const bool normalise = kNormalise && channel < 2 * key_columns;
  const int key_dim = static_cast<int>(args.shape.key_dim);

  int sequence = -1;
  float window[kTaps] = {};
  for (int i = 0; i < rows; ++i) {
    const int row = first_row + i;
    const int row_sequence = args.batch.sequence[row];
    const int first_token = args.batch.token_begin[row_sequence];
    const int index = row - first_token;
    float result = 0;
    if (active) {
      if (row_sequence != sequence) {
#pragma unroll
        for (int j = 1; j < kTaps; ++j) window[j] = input_at(args, row_sequence, first_token, channel, index - kTaps + j);
      }
#pragma unroll
      for (int j = 0; j < kTaps - 1; ++j) window[j] = window[j + 1];
      window[kTaps - 1] = input_at(args, row_sequence, first_token, channel, index);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) result += taps[j] * window[j];
      result = silu(result);
    }
    sequence = row_sequence;
    if constexpr (kNormalise) {
      // Heads are key_dim consecutive threads: 32, 64 or 128 of them.
      __shared__ float partial[kThreads / kWarp];
      const float squares = warp_sum(result * result);
      if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = squares;
      __syncthreads();
      if (normalise) {
        const int first_warp = threadIdx.x / key_dim * (key_dim / kWarp);
        float sum = 0;
        for (int w = 0; w < key_dim / kWarp; ++w) sum += partial[first_warp + w];
        result *= rsqrtf(sum + 1e-6f) * (is_query ? rsqrtf(static_cast<float>(key_dim)) : 1.0f);
      }
      __syncthreads();
    }
    if (active) static_cast<bf16*>(args.out.data)[row * args.out.stride + channel] = __float2bfloat16(result);
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
  const float a = __bfloat162float(static_cast<const bf16*>(args.a.data)[token * args.a.stride + head]) + args.dt_bias[head];
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
  const dim3 grid(static_cast<unsigned>(ceil_div(args.batch.tokens, kRun)), channel_blocks);
  conv_kernel<kNormalise><<<grid, kThreads, 0, stream>>>(args);
  conv_state_kernel<<<dim3(channel_blocks, static_cast<unsigned>(args.batch.sequences)), kThreads, 0, stream>>>(args);
}

}  // namespace

void causal_conv(const CausalConv& args, cudaStream_t stream) { convolve<false>(args, stream); }
void causal_conv_normalised(const CausalConv& args, cudaStream_t stream) { convolve<true>(args, stream); }

void gdn_gates(const GdnGates& args, cudaStream_t stream) {
  gates_kernel<<<static_cast<unsigned>(ceil_div(args.tokens * args.value_heads, kThreads)), kThreads, 0, stream>>>(args);
}

void gdn_l2_norm(const GdnL2Norm& args, cudaStream_t stream) {
  const int64_t heads = args.tokens * 2 * args.shape.key_heads;
  l2_norm_kernel<<<static_cast<unsigned>(ceil_div(heads, kThreads / kWarp)), kThreads, 0, stream>>>(args);
}

}  // namespace tokenspeed::kernels::cuda
