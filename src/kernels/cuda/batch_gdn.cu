// The Gated DeltaNet mixer of many sequences of one token each: a block per sequence and value head. The copy engine
// brings the head's state to shared memory, three blocks' on a multiprocessor; it is written once, from registers. A
// warp has 16 rows (values) of the state, a lane four keys of each. The blocks of a key head form a cluster: they
// convolve the same queries and keys, whose history only one of them moves on, after all have read it.
#include <string>

#include "kernels/cuda/batch.h"
#include "kernels/cuda/batch_tiles.cuh"
#include "kernels/cuda/common.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kDim = 128;
constexpr int kWarps = 8;
constexpr int kGdnThreads = kWarps * kWarp;
constexpr int kRows = kDim / kWarps;  // of the state, per warp
constexpr int kHistory = 3;
constexpr int kStateBytes = kDim * kDim * 4;
constexpr int kBlocks = 3;  // per multiprocessor

__device__ inline float4 unpack4(uint2 raw) {
  return {bf16_low(raw.x), bf16_high(raw.x), bf16_low(raw.y), bf16_high(raw.y)};
}
__device__ inline float dot(const float4& a, const float4& b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// Adds up the first 2 * kWidth values over pairs of lanes 2 * kWidth apart: a lane keeps half of the values.
template <int kWidth>
__device__ inline void halve(float (&a)[kRows]) {
  const bool upper = threadIdx.x & (2 * kWidth);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float other = __shfl_xor_sync(~0u, upper ? a[i] : a[i + kWidth], 2 * kWidth);
    a[i] = (upper ? a[i + kWidth] : a[i]) + other;
  }
}
// Sums of sixteen values over the warp's lanes: lane l gets the sum of value l / 2.
__device__ inline float scatter_sums(float (&a)[kRows]) {
  static_assert(kRows == 16);
  halve<8>(a);
  halve<4>(a);
  halve<2>(a);
  halve<1>(a);
  return a[0] + __shfl_xor_sync(~0u, a[0], 1);
}

__global__ void __launch_bounds__(kGdnThreads, kBlocks) gdn_kernel(const __grid_constant__ GdnMixer p, void* split) {
  extern __shared__ __align__(128) float4 state[];  // [value][key / 4]
  __shared__ __align__(16) float mixed[3][kDim];    // q, k, v
  __shared__ uint64_t arrived;
  __shared__ float squares[kWarps];
  __shared__ __align__(16) bf16 result[kDim];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int head = blockIdx.x;
  const int row = blockIdx.y;
  const int per_key = static_cast<int>(p.shape.value_heads / p.shape.key_heads);
  const int key_head = head / per_key;
  const int slot_in = p.batch.state_in[row];
  const int slot_out = p.batch.state_out[row];

  const auto state_at = [&](int slot) {
    return reinterpret_cast<float4*>(p.state.recurrent + slot * p.state.slot_stride) +
           static_cast<int64_t>(head) * kDim * (kDim / 4);
  };
  const uint32_t barrier = shared_address(&arrived);
  if (thread == 0 && slot_in >= 0) {
    barrier_init(barrier, 1);
    publish_barriers();
    barrier_arrive_expecting(barrier, kStateBytes);
    bulk_copy(shared_address(state), state_at(slot_in), kStateBytes, barrier);
  }
  // Warps 0, 1, 2 convolve q, k, v: four channels a lane.
  const int64_t channels = p.shape.channels();
  const int64_t key_columns = p.shape.key_heads * kDim;
  const int64_t channel =
      (warp == 2 ? 2 * key_columns + int64_t{head} * kDim : warp * key_columns + int64_t{key_head} * kDim) + lane * 4;
  uint2 history[kHistory] = {};
  float4 taps[4];
  if (warp < 3) {
    if (slot_in >= 0) {
      const bf16* const from = reinterpret_cast<const bf16*>(p.state.conv + slot_in * p.state.slot_stride) + channel;
#pragma unroll
      for (int i = 0; i < kHistory; ++i) history[i] = *reinterpret_cast<const uint2*>(from + i * channels);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) taps[i] = reinterpret_cast<const float4*>(p.conv_weight)[channel + i];
  }
  const float weight = p.norm_weight[warp * kRows + lane / 2];
  const float rate = -expf(p.a_log[head]);
  const float bias = p.dt_bias[head];
  wait_for_predecessor();
  allow_successor();

  const auto element = [&](const Rows& rows, int64_t column) {
    return __bfloat162float(static_cast<const bf16*>(rows.data)[row * rows.stride + column]);
  };
  const float a = element(p.a, head) + bias;
  const float beta = 1.0f / (1.0f + expf(-element(p.b, head)));
  const float decay = expf(rate * (a > 20.0f ? a : log1pf(expf(a))));
  const float z = element(p.z, head * kDim + warp * kRows + lane / 2);
  uint2 input = {};
  if (warp < 3) {
    input = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(p.qkv.data) + row * p.qkv.stride + channel);
    const float4 u[4] = {unpack4(history[0]), unpack4(history[1]), unpack4(history[2]), unpack4(input)};
    float4 c;
    c.x = silu(taps[0].x * u[0].x + taps[0].y * u[1].x + taps[0].z * u[2].x + taps[0].w * u[3].x);
    c.y = silu(taps[1].x * u[0].y + taps[1].y * u[1].y + taps[1].z * u[2].y + taps[1].w * u[3].y);
    c.z = silu(taps[2].x * u[0].z + taps[2].y * u[1].z + taps[2].z * u[2].z + taps[2].w * u[3].z);
    c.w = silu(taps[3].x * u[0].w + taps[3].y * u[1].w + taps[3].z * u[2].w + taps[3].w * u[3].w);
    float scale = 1.0f;
    if (warp < 2) scale = rsqrtf(warp_sum(dot(c, c)) + 1e-6f) * (warp == 0 ? rsqrtf(float{kDim}) : 1.0f);
    reinterpret_cast<float4*>(mixed[warp])[lane] = {c.x * scale, c.y * scale, c.z * scale, c.w * scale};
  }
  cluster_arrive();
  __syncthreads();

  const float4 key = reinterpret_cast<const float4*>(mixed[1])[lane];
  const float4 query = reinterpret_cast<const float4*>(mixed[0])[lane];
  if (slot_in >= 0) barrier_wait(barrier, 0);
  const float4* const own = state + warp * kRows * (kDim / 4) + lane;
  const auto decayed = [&](int i) {
    if (slot_in < 0) return float4{};
    const float4 s = own[i * (kDim / 4)];
    return float4{s.x * decay, s.y * decay, s.z * decay, s.w * decay};
  };
  float sums[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) sums[i] = dot(decayed(i), key);
  const float delta = beta * (mixed[2][warp * kRows + lane / 2] - scatter_sums(sums));
  float4* const to = state_at(slot_out) + warp * kRows * (kDim / 4) + lane;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float d = __shfl_sync(~0u, delta, 2 * i);
    float4 s = decayed(i);
    s = {s.x + d * key.x, s.y + d * key.y, s.z + d * key.z, s.w + d * key.w};
    __stcs(to + i * (kDim / 4), s);
    sums[i] = dot(s, query);
  }
  const float out = round_bf16(scatter_sums(sums));  // of value warp * kRows + lane / 2, in two lanes
  const float square = warp_sum(out * out) * 0.5f;
  if (lane == 0) squares[warp] = square;
  cluster_wait();
  if (warp == 2 || (warp < 2 && head % per_key == 0)) {
    bf16* const next = reinterpret_cast<bf16*>(p.state.conv + slot_out * p.state.slot_stride) + channel;
    *reinterpret_cast<uint2*>(next) = history[1];
    *reinterpret_cast<uint2*>(next + channels) = history[2];
    *reinterpret_cast<uint2*>(next + 2 * channels) = input;
  }
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += squares[w];
  if (lane % 2 == 0) {
    result[warp * kRows + lane / 2] = __float2bfloat16_rn(weight * (out * rsqrtf(sum / kDim + p.epsilon)) * silu(z));
  }
  __syncthreads();
  if (warp != 0) return;
  const bool valid = lane < kDim / 8;
  const uint4 raw = reinterpret_cast<const uint4*>(result)[valid ? lane : 0];
  if (valid)
    *reinterpret_cast<uint4*>(static_cast<bf16*>(p.out.data) + row * p.out.stride + head * kDim + lane * 8) = raw;
  if (split != nullptr) {
    SplitRows(split, p.batch.tokens, p.shape.value_heads * kDim)
        .write(raw, row, head * (kDim / 8) + lane % (kDim / 8), valid);
  }
}

}  // namespace

bool batch_gdn_fits(const GdnShape& shape) {
  const int64_t per_key = shape.key_heads > 0 ? shape.value_heads / shape.key_heads : 0;
  return shape.key_dim == kDim && shape.value_dim == kDim && shape.conv_kernel == 4 && per_key >= 1 && per_key <= 8 &&
         shape.value_heads == per_key * shape.key_heads;
}

Status batch_gdn(const GdnMixer& args, void* split, const Launch& launch) {
  if (!batch_gdn_fits(args.shape) || args.batch.tokens != args.batch.sequences) {
    return invalid_argument("batch_gdn: takes heads of 128 and one token per sequence; " +
                            std::to_string(args.batch.tokens) + " tokens of " + std::to_string(args.batch.sequences) +
                            " sequences were given");
  }
  const dim3 grid(static_cast<unsigned>(args.shape.value_heads), static_cast<unsigned>(args.batch.sequences));
  return launch_kernel("batch_gdn", launch, gdn_kernel, grid, kGdnThreads, kStateBytes,
                       static_cast<int>(args.shape.value_heads / args.shape.key_heads), args, split);
}

}  // namespace tokenspeed::kernels::cuda
