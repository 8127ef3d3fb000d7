// decode_gdn: the whole mixer of few tokens in one launch.
//
// A cluster of 8 blocks owns one key head of one sequence: its r = value_heads / key_heads value heads have 128 r state
// rows, of which a block keeps 16 r in registers, 8 lanes per row:
//
//      state row (value dim):  | lane 0: k 0..3, 32..35, 64..67, 96..99 | lane 1: k 4..7, 36..39 ... | ... lane 7 |
//
// The state, conv tail and conv weights do not depend on the projections of this step and are read before the wait. Per
// token the products S k and S q are formed together from the old state (o = decay S q + d (k . q)), so there is one
// reduction over lanes per token. Blocks of a cluster tell each other the squares for the gated norm and meet once
// after that; the conv tail of q and k, which all eight read, is written then.
#include <cooperative_groups.h>

#include <string>
#include <utility>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kDim = 128;
constexpr int kCluster = 8;
constexpr int kMaxHeads = 4;                           // value heads per key head
constexpr int kMaxRows = kDim * kMaxHeads / kCluster;  // state rows per block
constexpr int kLanes = 8;                              // per state row
constexpr int kTaps = 4;

struct GdnParameters {
  SequenceBatch batch;
  std::byte* recurrent;
  std::byte* conv;
  int64_t slot_stride;
  const bf16* qkv;
  int64_t qkv_stride;
  const bf16* z;
  int64_t z_stride;
  const bf16* b;
  int64_t b_stride;
  const bf16* a;
  int64_t a_stride;
  const float* conv_weight;
  const float* a_log;
  const float* dt_bias;
  const float* norm_weight;
  float epsilon;
  bf16* out;
  int64_t out_stride;
  int key_heads;
  int channels;
};

struct GdnShared {
  float q[kDecodeTokens][kDim];
  float k[kDecodeTokens][kDim];
  float v[kDecodeTokens][kMaxRows];
  float o[kDecodeTokens][kMaxRows];
  float kq[kDecodeTokens];
  float decay[kDecodeTokens][kMaxHeads];
  float beta[kDecodeTokens][kMaxHeads];
  float squares[kCluster][kDecodeTokens][2];  // from each block: of its rows of its first head and of the next
  float inverse[kDecodeTokens][2];
};

// Convolution of channel item i of the block: 0..127 q, 128..255 k, then the block's own value rows.
template <int kItems>
struct Convolution {
  float tail[kItems][kTaps - 1];
  float4 weight[kItems];

  __device__ static int channel(const GdnParameters& p, int key_head, int heads, int first_row, int item) {
    if (item < kDim) return key_head * kDim + item;
    if (item < 2 * kDim) return p.key_heads * kDim + key_head * kDim + item - kDim;
    return 2 * p.key_heads * kDim + key_head * heads * kDim + first_row + item - 2 * kDim;
  }
};

template <int kHeads>
__global__ void __launch_bounds__(kDim* kHeads) decode_gdn_kernel(const __grid_constant__ GdnParameters p) {
  namespace cg = cooperative_groups;
  constexpr int kRows = kDim * kHeads / kCluster;
  constexpr int kThreads = kRows * kLanes;
  constexpr int kItemCount = 2 * kDim + kRows;
  constexpr int kItems = (kItemCount + kThreads - 1) / kThreads;
  static_assert(kThreads * 8 >= kDecodeTokens * kRows, "one output per thread");
  __shared__ GdnShared s;
  cg::cluster_group cluster = cg::this_cluster();

  const int key_head = blockIdx.x / kCluster;
  const int rank = blockIdx.x % kCluster;
  const int first_row = rank * kRows;  // of the key head's 128 r state rows
  const int sequence = blockIdx.y;
  const int token_begin = p.batch.token_begin[sequence];
  const int tokens = p.batch.token_begin[sequence + 1] - token_begin;
  const int state_in = p.batch.state_in[sequence];
  const int state_out = p.batch.state_out[sequence];
  const int thread = threadIdx.x;
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  if (tokens == 0) {
    wait_for_predecessor();
    allow_successor();
    return;  // the whole cluster does
  }

  auto started = cluster.barrier_arrive();  // a block's shared memory may be written once it runs
  const int row = thread / kLanes;
  const int part = thread % kLanes;
  const int64_t state_at = (static_cast<int64_t>(key_head) * kHeads * kDim + first_row + row) * kDim + part * 4;
  float4 state[4] = {};
  if (state_in >= 0) {
    const float* const from = reinterpret_cast<const float*>(p.recurrent + state_in * p.slot_stride) + state_at;
#pragma unroll
    for (int j = 0; j < 4; ++j) state[j] = *reinterpret_cast<const float4*>(from + j * 32);
  }
  Convolution<kItems> conv;
  int channels[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = thread + i * kThreads;
    if (item >= kItemCount) break;
    channels[i] = conv.channel(p, key_head, kHeads, first_row, item);
    conv.weight[i] = *reinterpret_cast<const float4*>(p.conv_weight + channels[i] * kTaps);
    const bf16* const from = reinterpret_cast<const bf16*>(p.conv + state_in * p.slot_stride) + channels[i];
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) conv.tail[i][j] = state_in >= 0 ? __bfloat162float(from[j * p.channels]) : 0.0f;
  }

  const int out_token = thread / kRows;
  const int out_row = thread % kRows;
  const int value_dim = key_head * kHeads * kDim + first_row + out_row;
  const float norm_weight = p.norm_weight[value_dim % kDim];
  const float minus_rate = -expf(p.a_log[key_head * kHeads + thread % kHeads]);
  const float dt_bias = p.dt_bias[key_head * kHeads + thread % kHeads];

  wait_for_predecessor();
  allow_successor();
  // What later stages need of this thread, early.
  float z = 0;
  if (out_token < tokens) z = __bfloat162float(p.z[(token_begin + out_token) * p.z_stride + value_dim]);
  float a = 0;
  float b = 0;
  const int gate_token = thread / kHeads;
  const int gate_head = thread % kHeads;
  if (gate_token < tokens) {
    b = __bfloat162float(p.b[(token_begin + gate_token) * p.b_stride + key_head * kHeads + gate_head]);
    a = __bfloat162float(p.a[(token_begin + gate_token) * p.a_stride + key_head * kHeads + gate_head]);
  }

#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = thread + i * kThreads;
    if (item >= kItemCount) break;
    const bf16* const from = p.qkv + token_begin * p.qkv_stride + channels[i];
    float u[kDecodeTokens];
#pragma unroll
    for (int t = 0; t < kDecodeTokens; ++t) u[t] = t < tokens ? __bfloat162float(from[t * p.qkv_stride]) : 0.0f;
    float(&tail)[kTaps - 1] = conv.tail[i];
    const float4 w = conv.weight[i];
#pragma unroll
    for (int t = 0; t < kDecodeTokens; ++t) {
      if (t >= tokens) break;
      const float c = silu(w.x * tail[0] + w.y * tail[1] + w.z * tail[2] + w.w * u[t]);
      tail[0] = tail[1];
      tail[1] = tail[2];
      tail[2] = u[t];
      if (item < kDim) {
        s.q[t][item] = c;
      } else if (item < 2 * kDim) {
        s.k[t][item - kDim] = c;
      } else {
        s.v[t][item - 2 * kDim] = c;
      }
    }
  }
  if (gate_token < tokens) {
    a += dt_bias;
    const float softplus = a > 20.0f ? a : log1pf(expf(a));
    s.beta[gate_token][gate_head] = sigmoid(b);
    s.decay[gate_token][gate_head] = expf(minus_rate * softplus);
  }
  __syncthreads();
  for (int t = warp; t < tokens; t += kThreads / kWarp) {
    float4& q = *reinterpret_cast<float4*>(&s.q[t][lane * 4]);
    float4& k = *reinterpret_cast<float4*>(&s.k[t][lane * 4]);
    const float qq = warp_sum(q.x * q.x + q.y * q.y + q.z * q.z + q.w * q.w);
    const float kk = warp_sum(k.x * k.x + k.y * k.y + k.z * k.z + k.w * k.w);
    const float qk = warp_sum(q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w);
    const float scale_q = rsqrtf(qq + 1e-6f) * 0.08838834764831845f;  // 1 / sqrt(128)
    const float scale_k = rsqrtf(kk + 1e-6f);
    q = {q.x * scale_q, q.y * scale_q, q.z * scale_q, q.w * scale_q};
    k = {k.x * scale_k, k.y * scale_k, k.z * scale_k, k.w * scale_k};
    if (lane == 0) s.kq[t] = qk * scale_q * scale_k;
  }
  __syncthreads();

  const int head = (first_row + row) / kDim;
  for (int t = 0; t < tokens; ++t) {
    float4 k[4];
    float sk = 0;
    float sq = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      k[j] = *reinterpret_cast<const float4*>(&s.k[t][j * 32 + part * 4]);
      const float4 q = *reinterpret_cast<const float4*>(&s.q[t][j * 32 + part * 4]);
      sk += state[j].x * k[j].x + state[j].y * k[j].y + state[j].z * k[j].z + state[j].w * k[j].w;
      sq += state[j].x * q.x + state[j].y * q.y + state[j].z * q.z + state[j].w * q.w;
    }
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
      sk += __shfl_xor_sync(~0u, sk, offset);
      sq += __shfl_xor_sync(~0u, sq, offset);
    }
    const float decay = s.decay[t][head];
    const float delta = s.beta[t][head] * (s.v[t][row] - decay * sk);
    if (part == 0) s.o[t][row] = round_bf16(decay * sq + delta * s.kq[t]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      state[j].x = decay * state[j].x + delta * k[j].x;
      state[j].y = decay * state[j].y + delta * k[j].y;
      state[j].z = decay * state[j].z + delta * k[j].z;
      state[j].w = decay * state[j].w + delta * k[j].w;
    }
  }
  float* const to = reinterpret_cast<float*>(p.recurrent + state_out * p.slot_stride) + state_at;
#pragma unroll
  for (int j = 0; j < 4; ++j) *reinterpret_cast<float4*>(to + j * 32) = state[j];
  __syncthreads();

  cluster.barrier_wait(std::move(started));
  const int first_head = first_row / kDim;
  for (int t = warp; t < tokens; t += kThreads / kWarp) {
    float first = 0;
    float second = 0;
#pragma unroll
    for (int r = lane; r < kRows; r += kWarp) {
      const float square = s.o[t][r] * s.o[t][r];
      const bool is_first = (first_row + r) / kDim == first_head;
      first += is_first ? square : 0.0f;
      second += is_first ? 0.0f : square;
    }
    first = warp_sum(first);
    second = warp_sum(second);
    // Lane 2 i + j tells block i the j-th sum.
    if (lane < 2 * kCluster) {
      *cluster.map_shared_rank(&s.squares[rank][t][lane % 2], lane / 2) = lane % 2 == 0 ? first : second;
    }
  }
  cluster.sync();
  if (thread < 2 * tokens) {
    const int t = thread / 2;
    const int wanted = first_head + thread % 2;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < kCluster; ++other) {
      const int at = wanted - other * kRows / kDim;  // its first head
      if (at == 0 || at == 1) sum += s.squares[other][t][at];
    }
    s.inverse[t][thread % 2] = rsqrtf(sum / kDim + p.epsilon);
  }
  // Every block has read the tails by now.
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = thread + i * kThreads;
    if (item >= kItemCount) break;
    if (item < 2 * kDim && rank != 0) continue;
    bf16* const tail = reinterpret_cast<bf16*>(p.conv + state_out * p.slot_stride) + channels[i];
#pragma unroll
    for (int j = 0; j < kTaps - 1; ++j) tail[j * p.channels] = __float2bfloat16_rn(conv.tail[i][j]);
  }
  __syncthreads();
  if (out_token < tokens) {
    const float inverse = s.inverse[out_token][(first_row + out_row) / kDim != first_head];
    p.out[(token_begin + out_token) * p.out_stride + value_dim] =
        __float2bfloat16_rn(norm_weight * s.o[out_token][out_row] * inverse * silu(z));
  }
}

}  // namespace

Status decode_gdn(const GdnMixer& args, const Launch& launch) {
  const auto bad = [](const std::string& what) { return invalid_argument("decode_gdn: " + what); };
  const GdnShape& shape = args.shape;
  if (shape.key_dim != kDim || shape.value_dim != kDim || shape.conv_kernel != kTaps) {
    return bad("head dims must be 128 and the convolution's kernel 4");
  }
  const int64_t heads = shape.key_heads > 0 ? shape.value_heads / shape.key_heads : 0;
  if (heads < 1 || heads > kMaxHeads || heads * shape.key_heads != shape.value_heads) {
    return bad(std::to_string(shape.value_heads) + " value heads on " + std::to_string(shape.key_heads) +
               " key heads; 1 to 4 per key head are taken");
  }
  if (args.batch.tokens > kDecodeTokens) return bad("more than 8 tokens");
  if (args.state.conv_dtype != DType::kBFloat16 || args.qkv.dtype != DType::kBFloat16)
    return bad("rows must be bfloat16");
  GdnParameters p = {args.batch,
                     args.state.recurrent,
                     args.state.conv,
                     args.state.slot_stride,
                     static_cast<const bf16*>(args.qkv.data),
                     args.qkv.stride,
                     static_cast<const bf16*>(args.z.data),
                     args.z.stride,
                     static_cast<const bf16*>(args.b.data),
                     args.b.stride,
                     static_cast<const bf16*>(args.a.data),
                     args.a.stride,
                     args.conv_weight,
                     args.a_log,
                     args.dt_bias,
                     args.norm_weight,
                     args.epsilon,
                     static_cast<bf16*>(args.out.data),
                     args.out.stride,
                     static_cast<int>(shape.key_heads),
                     static_cast<int>(shape.channels())};
  const dim3 grid(static_cast<unsigned>(shape.key_heads * kCluster), static_cast<unsigned>(args.batch.sequences));
  const int threads = static_cast<int>(kDim * heads);
  switch (heads) {
    case 1:
      return launch_kernel("decode_gdn", launch, decode_gdn_kernel<1>, grid, threads, 0, kCluster, p);
    case 2:
      return launch_kernel("decode_gdn", launch, decode_gdn_kernel<2>, grid, threads, 0, kCluster, p);
    case 3:
      return launch_kernel("decode_gdn", launch, decode_gdn_kernel<3>, grid, threads, 0, kCluster, p);
    default:
      return launch_kernel("decode_gdn", launch, decode_gdn_kernel<4>, grid, threads, 0, kCluster, p);
  }
}

}  // namespace tokenspeed::kernels::cuda
