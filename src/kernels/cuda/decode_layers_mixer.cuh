// The Gated DeltaNet mixer as a phase: convolution, l2norm, gates and rule. A task is one value head of one sequence,
// or where these are too few for all blocks a half or a quarter of one. A quarter is a part: 32 state rows, which the
// block's warps take at once, 16 lanes per row:
//
//      state row (value dim):  | lane 0: k 0..3, 64..67 | lane 1: k 4..7, 68..71 | ... | lane 15 |
//
// The gated norm is over a head, whose rows may lie on four blocks: parts hand on o * weight * silu(z) and their sums
// of o^2, and whoever reads the head divides (HeadNorms). The conv tails, which several blocks read, are written in the
// phase after, when all of the mixer's results have been read.
#pragma once

#include "kernels/cuda/decode_layers.cuh"

namespace tokenspeed::kernels::cuda {

inline constexpr int kMixerDim = 128;
inline constexpr int kMixerRows = 32;  // of a part
inline constexpr int kMixerParts = kMixerDim / kMixerRows;
inline constexpr int kLogMixerParts = 2;
static_assert(1 << kLogMixerParts == kMixerParts);
inline constexpr int kMixerLanes = kLayerConsumers / kMixerRows;
inline constexpr int kMixerTaps = 4;

struct MixerTask {
  int sequence = 0;
  int head;
  int key_head;
  int part;   // the first
  int parts;  // 1, 2 or 4

  // log_parts: of `parts`.
  __device__ MixerTask(const MixerPhase& p, int task, int log_parts) : parts(1 << log_parts) {
    const int log_tasks = kLogMixerParts - log_parts;  // of a head
    part = (task & ((1 << log_tasks) - 1)) << log_parts;
    // Subtractions, as divisions by what is known at run time only are long.
    for (head = task >> log_tasks; head >= p.value_heads; head -= p.value_heads) ++sequence;
    key_head = head >> p.log_group;
  }
  // Channels that the task convolves.
  __device__ int items() const { return 2 * kMixerDim + parts * kMixerRows; }
  // Of item: 0..127 q, 128..255 k, then the task's value rows.
  __device__ int channel(const MixerPhase& p, int item) const {
    if (item < kMixerDim) return key_head * kMixerDim + item;
    if (item < 2 * kMixerDim) return p.key_heads * kMixerDim + key_head * kMixerDim + item - kMixerDim;
    return 2 * p.key_heads * kMixerDim + head * kMixerDim + part * kMixerRows + item - 2 * kMixerDim;
  }
  // Of this thread's first four values of the task's i-th part; the others are 256 bytes on.
  __device__ int64_t state_offset(int i) const {
    const int row = head * kMixerDim + (part + i) * kMixerRows + threadIdx.x / kMixerLanes;
    return static_cast<int64_t>(row) * kMixerDim * 4 + threadIdx.x % kMixerLanes * 16;
  }
};
__device__ __forceinline__ int mixer_channels(const MixerPhase& p) {
  return (2 * p.key_heads + p.value_heads) * kMixerDim;
}

// What the rule takes of a token's q and k beside their products with the state.
struct MixerProducts {
  float scale_q;
  float scale_k;
  float kq;
};

template <int kRows>
struct MixerStaged {
  float q[kRows][kMixerDim];
  float k[kRows][kMixerDim];
  float v[kRows][kMixerDim];
  float decay[kRows];
  float beta[kRows];
  MixerProducts products[kRows];
};

// The last inputs of a thread's channel as they are loaded, so that nothing waits for the loads. They are needed first,
// and known before the projections.
struct MixerTail {
  uint32_t v[kMixerTaps - 1] = {};  // bfloat16

  __device__ void fetch(const MixerPhase& p, const LayerShared& shared, const MixerTask& task) {
    const int slot = shared.state_in[task.sequence];
    *this = {};
    if (slot < 0 || static_cast<int>(threadIdx.x) >= task.items()) return;
    const unsigned short* const from =
        reinterpret_cast<const unsigned short*>(p.conv + slot * p.slot_stride) + task.channel(p, threadIdx.x);
#pragma unroll
    for (int j = 0; j < kMixerTaps - 1; ++j) v[j] = __ldcg(from + j * mixer_channels(p));
  }
};
// A thread's state values of a part.
struct MixerState {
  float4 v[2] = {};

  // i: of the task's parts.
  __device__ void fetch(const MixerPhase& p, const LayerShared& shared, const MixerTask& task, int i) {
    const int slot = shared.state_in[task.sequence];
    if (slot < 0) return;
    const std::byte* const from = p.recurrent + slot * p.slot_stride + task.state_offset(i);
    v[0] = __ldcg(reinterpret_cast<const float4*>(from));
    v[1] = __ldcg(reinterpret_cast<const float4*>(from + 256));
  }
};
// What a thread knows of the head.
struct MixerWeights {
  float4 conv = {};
  float a_log = 0;
  float dt_bias = 0;

  __device__ void fetch(const MixerPhase& p, const MixerTask& task) {
    a_log = p.a_log[task.head];
    dt_bias = p.dt_bias[task.head];
    if (static_cast<int>(threadIdx.x) >= task.items()) return;
    conv = *reinterpret_cast<const float4*>(p.conv_weight + task.channel(p, threadIdx.x) * kMixerTaps);
  }
};
// What a part's results are multiplied by: of the warp's two rows, the norm's weights and the gates of token `lane`.
struct MixerGates {
  const uint2* from;
  uint2 z;
  float2 norm;

  __device__ void fetch(const MixerPhase& p, const LayerConsumer& c, const MixerTask& task, int i, int begin,
                        int tokens) {
    const int lane = threadIdx.x % kWarp;
    const int row = (task.part + i) * kMixerRows + c.warp * 2;
    norm = *reinterpret_cast<const float2*>(p.norm_weight + row);
    from = p.z + (begin + lane) * p.z_stride + (task.head * kMixerDim + row) / 2;
    z = {0, c.launch};
    if (lane < tokens) z = load_word(from);
  }
  __device__ void wait(unsigned launch, int tokens) {
    while (!__all_sync(~0u, z.y == launch)) {
      if (static_cast<int>(threadIdx.x) % kWarp < tokens) z = load_word(from);
    }
  }
};

__device__ __forceinline__ float half_of(uint32_t pair, int index) {
  return index % 2 == 0 ? bf16_low(pair) : bf16_high(pair);
}

// The channels' convolutions and the head's gates, for all tokens of the sequence.
template <int kRows>
__device__ __forceinline__ void mixer_convolve(const MixerPhase& p, const LayerConsumer& c, const MixerTail& last,
                                               const MixerWeights& weights, const MixerTask& task, int begin,
                                               int tokens, MixerStaged<kRows>& s) {
  const int item = threadIdx.x;
  if (item >= task.items()) {
    // The lanes of the next warp have a token each.
    static_assert(kMixerRows % kWarp == 0, "whole warps");
    const int t = item - task.items();
    const int row = begin + t;
    const float minus_rate = -__expf(weights.a_log);
    float gate[2] = {};
    gather_words<2, 2>(
        c.launch, t < tokens ? 2 : 0,
        [&](int i) { return (i == 0 ? p.b + row * p.b_stride : p.a + row * p.a_stride) + (task.head >> 1); },
        [&](int i, uint32_t pair) { gate[i] = half_of(pair, task.head); });
    if (t >= tokens) return;
    const float a = gate[1] + weights.dt_bias;
    const float softplus = a > 20.0f ? a : __logf(1.0f + __expf(a));
    s.beta[t] = sigmoid(gate[0]);
    s.decay[t] = __expf(minus_rate * softplus);
    return;
  }
  const int channel = task.channel(p, item);
  const uint2* const from = p.qkv + begin * p.qkv_stride + (channel >> 1);
  float* const to = item < kMixerDim       ? &s.q[0][item]
                    : item < 2 * kMixerDim ? &s.k[0][item - kMixerDim]
                                           : &s.v[0][item - 2 * kMixerDim];
  const auto address = [&](int t) { return from + min(t, tokens - 1) * p.qkv_stride; };
  float tail[kMixerTaps - 1];
#pragma unroll
  for (int j = 0; j < kMixerTaps - 1; ++j) tail[j] = bf16_low(last.v[j]);
  const auto take = [&](int t, uint32_t pair) {
    const float u = half_of(pair, channel);
    const float4& w = weights.conv;
    to[t * kMixerDim] = silu(w.x * tail[0] + w.y * tail[1] + w.z * tail[2] + w.w * u);
    tail[0] = tail[1];
    tail[1] = tail[2];
    tail[2] = u;
  };
  if (kRows == 1 || tokens == 1) {
    gather_words<1, 1>(c.launch, 1, address, take);
  } else {
    // Tokens that are not there repeat the last one, so that all loads are in flight together.
    gather_words<kRows, 1>(c.launch, kRows, address, take);
  }
}

__device__ __forceinline__ float dot4(const float4& a, const float4& b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// This lane's eight columns of a row of q or k.
struct MixerColumns {
  float4 v[2];
  __device__ explicit MixerColumns(const float* row) {
    const int part = threadIdx.x % kMixerLanes;
#pragma unroll
    for (int j = 0; j < 2; ++j) v[j] = *reinterpret_cast<const float4*>(row + j * 64 + part * 4);
  }
  __device__ float times(const float4 (&other)[2]) const {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) sum += dot4(other[j], v[j]);
    return sum;
  }
};
template <int kCount>
__device__ __forceinline__ void add_lanes(float (&sum)[kCount]) {
#pragma unroll
  for (int offset = 1; offset < kMixerLanes; offset *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
  }
}
// sum: k k, q q, k q.
__device__ __forceinline__ MixerProducts mixer_products(float kk, float qq, float kq) {
  return {rsqrtf(qq + 1e-6f) * 0.08838834764831845f, rsqrtf(kk + 1e-6f), kq};  // 1 / sqrt(128)
}

// Token t's products, by the warp of that number.
template <int kRows>
__device__ __forceinline__ void prepare_products(MixerStaged<kRows>& s, int t) {
  const MixerColumns q(s.q[t]), k(s.k[t]);
  float sum[] = {k.times(k.v), q.times(q.v), q.times(k.v)};
  add_lanes(sum);
  if (threadIdx.x % kWarp == 0) s.products[t] = mixer_products(sum[0], sum[1], sum[2]);
}

// The rule for one token on this thread's eight state values; returns o of the thread's row, which is `row` of the
// task's. kAlone: the token's products are not prepared.
template <bool kAlone, int kRows>
__device__ __forceinline__ float mixer_rule(const MixerStaged<kRows>& s, int t, int row, float4 (&state)[2]) {
  const MixerColumns q(s.q[t]), k(s.k[t]);
  float sk, sq;
  MixerProducts made;
  if constexpr (kAlone) {
    float sum[] = {k.times(state), q.times(state), k.times(k.v), q.times(q.v), q.times(k.v)};
    add_lanes(sum);
    sk = sum[0], sq = sum[1];
    made = mixer_products(sum[2], sum[3], sum[4]);
  } else {
    float sum[] = {k.times(state), q.times(state)};
    add_lanes(sum);
    sk = sum[0], sq = sum[1];
    made = s.products[t];
  }
  const float decay = s.decay[t];
  const float delta = s.beta[t] * (s.v[t][row] - decay * sk * made.scale_k);
  const float step = delta * made.scale_k;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    state[j].x = decay * state[j].x + step * k.v[j].x;
    state[j].y = decay * state[j].y + step * k.v[j].y;
    state[j].z = decay * state[j].z + step * k.v[j].z;
    state[j].w = decay * state[j].w + step * k.v[j].w;
  }
  return round_bf16(decay * sq * made.scale_q + delta * made.kq * made.scale_q * made.scale_k);
}

template <int kRows>
__device__ __forceinline__ void mix_task(const MixerPhase& p, LayerConsumer& c, const MixerTask& task,
                                         const MixerTail& tail) {
  static_assert(sizeof(MixerStaged<kRows>) <= layer_batch_tiles(kRows) * layer_tile_floats(kRows) * sizeof(float),
                "part sums' buffer");
  auto& s = *reinterpret_cast<MixerStaged<kRows>*>(c.buffer<kRows>());
  const int lane = threadIdx.x % kWarp;
  const int warp = c.warp;
  const int begin = c.shared.token_begin[task.sequence];
  // Known to the compiler to be the warp's.
  const int tokens = __shfl_sync(~0u, c.shared.token_begin[task.sequence + 1] - begin, 0);
  if (tokens == 0) return;
  const int parts = kRows == 1 ? 1 : task.parts;
  MixerState state;
  state.fetch(p, c.shared, task, 0);
  MixerWeights weights;
  weights.fetch(p, task);
  // Asked for first, as they are there in all tasks but a block's first one.
  MixerGates gates;
  gates.fetch(p, c, task, 0, begin, tokens);
  mixer_convolve<kRows>(p, c, tail, weights, task, begin, tokens, s);
  gates.wait(c.launch, tokens);
  c.mark(1);
  consumer_barrier();
  c.mark(2);
  const bool alone = kRows == 1 || (tokens == 1 && parts == 1);
  if (!alone) {
    if (warp < tokens) prepare_products(s, warp);
    consumer_barrier();
  }
  const int row = threadIdx.x / kMixerLanes;
#pragma unroll 1
  for (int i = 0; i < parts; ++i) {
    MixerState next_state;
    MixerGates next_gates = gates;
    if (kRows > 1 && i + 1 < parts) {
      next_state.fetch(p, c.shared, task, i + 1);
      next_gates.fetch(p, c, task, i + 1, begin, tokens);
    }
    float o = 0;  // of the lane's token, one of the warp's rows in each half
    if (alone) {
      o = mixer_rule<true>(s, 0, row, state.v);
    } else {
#pragma unroll 1
      for (int t = 0; t < tokens; ++t) {
        const float made = mixer_rule<false>(s, t, i * kMixerRows + row, state.v);
        if (lane % kMixerLanes == t) o = made;
      }
    }
    const float second = __shfl_sync(~0u, o, lane + kMixerLanes);
    float(&squares)[kDecodeTokens][kLayerWarps] = c.shared.mixer_squares[i % 2];
    if (lane < tokens) {
      const int pair_at = (task.head * kMixerDim + (task.part + i) * kMixerRows) / 2 + warp;
      store_word(
          p.o + static_cast<int64_t>(begin + lane) * p.value_heads * 64 + pair_at,
          pack_bf16(o * gates.norm.x * silu(bf16_low(gates.z.x)), second * gates.norm.y * silu(bf16_high(gates.z.x))),
          c.launch);
      squares[lane][warp] = o * o + second * second;
    }
    std::byte* const to = p.recurrent + c.shared.state_out[task.sequence] * p.slot_stride + task.state_offset(i);
    *reinterpret_cast<float4*>(to) = state.v[0];
    *reinterpret_cast<float4*>(to + 256) = state.v[1];
    c.mark(3);
    consumer_barrier();
    if (threadIdx.x < tokens) {
      store_word(p.squares + (static_cast<int64_t>(begin + threadIdx.x) * p.value_heads + task.head) * kMixerParts +
                     task.part + i,
                 __float_as_uint(add_parts(squares[threadIdx.x])), c.launch);
    }
    if (kRows > 1 && i + 1 < parts) {
      state = next_state;
      gates = next_gates;
      gates.wait(c.launch, tokens);
    }
  }
}

template <int kRows>
__device__ __forceinline__ void consume_mixer(const MixerPhase& p, LayerConsumer& c) {
  const int log_parts = kRows == 1 ? 0 : p.log_parts;
  const int tasks = c.program.batch.sequences * p.value_heads << (kLogMixerParts - log_parts);
  c.begin_batch<kRows>();
  if constexpr (kRows == 1) {
#pragma unroll 1
    for (int index = blockIdx.x; index < tasks; index += gridDim.x) {
      const MixerTask task(p, index, 0);
      MixerTail tail;
      tail.fetch(p, c.shared, task);
      mix_task<kRows>(p, c, task, tail);
    }
  } else {
    // With several sequences a block has several tasks: a round fetches for the next one, the first does nothing else.
    const int blocks = static_cast<int>(gridDim.x);
    MixerTail next;
#pragma unroll 1
    for (int index = static_cast<int>(blockIdx.x) - blocks; index < tasks; index += blocks) {
      const MixerTail tail = next;
      if (index + blocks < tasks) next.fetch(p, c.shared, MixerTask(p, index + blocks, log_parts));
      if (index >= 0) mix_task<kRows>(p, c, MixerTask(p, index, log_parts), tail);
    }
  }
  // Without a task nothing else keeps this block's warps from the part sums of the projection before.
  if (blockIdx.x >= tasks) consumer_barrier();
  c.mark(4);
  c.end_batch<kRows>();
}

// The last three inputs of every channel, to the conv state. All blocks must have read the tails before, which the
// caller knows when it has all of the mixer's results. Two channels per thread.
__device__ __forceinline__ void store_tails(const MixerPhase& p, const LayerConsumer& c) {
  const int channels = mixer_channels(p);
  const int pairs = channels / 2;
  const int all = c.program.batch.sequences * pairs;
  // The last warps, as the first have the sums to add.
  const int first_warp = (kLayerWarps - 1 - c.warp) * gridDim.x + blockIdx.x;
#pragma unroll 1
  for (int index = first_warp * kWarp + threadIdx.x % kWarp; index < all; index += gridDim.x * kLayerConsumers) {
    int sequence = 0;
    int pair = index;
    for (; pair >= pairs; pair -= pairs) ++sequence;
    const int begin = c.shared.token_begin[sequence];
    const int tokens = c.shared.token_begin[sequence + 1] - begin;
    if (tokens == 0) continue;
    const int slot = c.shared.state_in[sequence];
    const uint32_t* const old = reinterpret_cast<const uint32_t*>(p.conv + slot * p.slot_stride) + pair;
    uint32_t tail[kMixerTaps - 1];
#pragma unroll
    for (int j = 0; j < kMixerTaps - 1; ++j) {
      const int t = tokens - (kMixerTaps - 1) + j;
      tail[j] = t >= 0      ? load_word(p.qkv + (begin + t) * p.qkv_stride + pair).x
                : slot >= 0 ? __ldcg(old + (kMixerTaps - 1 + t) * pairs)
                            : 0;
    }
    uint32_t* const to = reinterpret_cast<uint32_t*>(p.conv + c.shared.state_out[sequence] * p.slot_stride) + pair;
#pragma unroll
    for (int j = 0; j < kMixerTaps - 1; ++j) to[j * pairs] = tail[j];
  }
}

}  // namespace tokenspeed::kernels::cuda
