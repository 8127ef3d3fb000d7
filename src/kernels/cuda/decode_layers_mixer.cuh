// The Gated DeltaNet mixer as a phase: convolution, l2norm, gates and rule. A task is one value head of one sequence,
// or where these are too few for all blocks a half or a quarter of one. A quarter is a part: 32 state rows, which the
// block's warps take at once, 16 lanes per row:
//
//      state row (value dim):  | lane 0: k 0..3, 64..67 | lane 1: k 4..7, 68..71 | ... | lane 15 |
//
// States come through the ring. What a task needs of the projections is staged once: q, k and v by their convolutions,
// and weight * silu(z). From there to its end the task's warps meet only for the products of several tokens.
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
inline constexpr int kMixerPartBytes = kMixerRows * kMixerDim * 4;
inline constexpr int kMixerSlotParts = kLayerSlotBytes / kMixerPartBytes;
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
  // Of the task's first part in its sequence's state, where the others follow.
  __device__ int64_t state_offset() const { return static_cast<int64_t>(head * kMixerParts + part) * kMixerPartBytes; }
};
__device__ __forceinline__ int mixer_channels(const MixerPhase& p) {
  return (2 * p.key_heads + p.value_heads) * kMixerDim;
}

__device__ __forceinline__ int mixer_tasks(const MixerPhase& p, int sequences, int log_parts) {
  return sequences * p.value_heads << (kLogMixerParts - log_parts);
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
  float gate[kRows][kMixerDim];  // norm weight * silu(z)
  alignas(16) float squares[kMixerParts][kRows][kLayerWarps];
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
// A thread's state values of a part. They come through the ring with the weights, two parts in a slot, as they do not
// depend on the projections: rows of 512 bytes one after the other.
struct MixerState {
  float4 v[2] = {};

  // This thread's first four values; the others follow kMixerDim * 2 bytes on.
  static __device__ int offset() {
    return static_cast<int>(threadIdx.x) / kMixerLanes * (kMixerDim * 4) +
           static_cast<int>(threadIdx.x) % kMixerLanes * 16;
  }
  // from: the part's shared address.
  __device__ void load(uint32_t from) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint4 word = load16_shared(from + offset() + j * (kMixerDim * 2));
      v[j] = {__uint_as_float(word.x), __uint_as_float(word.y), __uint_as_float(word.z), __uint_as_float(word.w)};
    }
  }
  __device__ void store(std::byte* to) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) *reinterpret_cast<float4*>(to + offset() + j * (kMixerDim * 2)) = v[j];
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
__device__ __forceinline__ float half_of(uint32_t pair, int index) {
  return index % 2 == 0 ? bf16_low(pair) : bf16_high(pair);
}

// Hands on a word of every token of the sequence, and may repeat the last one's. The whole warp calls.
template <int kRows, typename Address, typename Take>
__device__ __forceinline__ void gather_tokens(unsigned launch, int tokens, bool active, Address&& address,
                                              Take&& take) {
  if (kRows == 1 || tokens == 1) {
    gather_words<1, 1>(launch, active ? 1 : 0, address, take);
  } else {
    // Tokens that are not there repeat the last one, so that all loads are in flight together.
    gather_words<kRows, 1>(
        launch, active ? kRows : 0, [&](int t) { return address(min(t, tokens - 1)); }, take);
  }
}

// What the task's results are multiplied by, of rows 2 pair and 2 pair + 1, if it has them. The whole warp calls.
template <int kRows>
__device__ __forceinline__ void mixer_gate(const MixerPhase& p, const LayerConsumer& c, const MixerTask& task, int pair,
                                           int begin, int tokens, MixerStaged<kRows>& s) {
  const bool active = pair < task.parts * kMixerRows / 2;
  const int row = task.part * kMixerRows + pair * 2;
  float2 norm = {};
  if (active) norm = *reinterpret_cast<const float2*>(p.norm_weight + row);
  const uint2* const from = p.z + begin * p.z_stride + (task.head * kMixerDim + row) / 2;
  gather_tokens<kRows>(
      c.launch, tokens, active, [&](int t) { return from + t * p.z_stride; },
      [&](int t, uint32_t z) {
        *reinterpret_cast<float2*>(&s.gate[t][pair * 2]) = {norm.x * silu(bf16_low(z)), norm.y * silu(bf16_high(z))};
      });
}

// The channels' convolutions and the head's gates, for all tokens of the sequence.
template <int kRows>
__device__ __forceinline__ void mixer_convolve(const MixerPhase& p, const LayerConsumer& c, const MixerTail& last,
                                               const MixerWeights& weights, const MixerTask& task, int begin,
                                               int tokens, MixerStaged<kRows>& s) {
  const int item = threadIdx.x;
  if (item >= task.items()) {
    // The lanes of the next warp have a token each, those behind it two rows.
    static_assert(kMixerRows % kWarp == 0, "whole warps");
    const int t = item - task.items();
    if (t >= kWarp) {
      if (t < kWarp + kMixerDim / 2) mixer_gate<kRows>(p, c, task, t - kWarp, begin, tokens, s);
      return;
    }
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
  gather_tokens<kRows>(
      c.launch, tokens, true, [&](int t) { return from + t * p.qkv_stride; }, take);
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

// What a lane has of a token's q and k, and the token's products.
struct MixerToken {
  MixerColumns q, k;
  MixerProducts made;
  float decay, beta;

  template <int kRows>
  __device__ MixerToken(const MixerStaged<kRows>& s, int t, const MixerProducts& products)
      : q(s.q[t]), k(s.k[t]), made(products), decay(s.decay[t]), beta(s.beta[t]) {}
  // The products are made by the lanes of every row.
  template <int kRows>
  __device__ MixerToken(const MixerStaged<kRows>& s, int t) : MixerToken(s, t, {}) {
    float sum[] = {k.times(k.v), q.times(q.v), q.times(k.v)};
    add_lanes(sum);
    made = mixer_products(sum[0], sum[1], sum[2]);
  }
};

// The rule for one token on this thread's eight state values; returns o of the thread's row, whose v it is given.
// kMakes: the products are still to be made, whose sums are added with the state's.
template <bool kMakes>
__device__ __forceinline__ float mixer_rule(const MixerToken& token, float v, float4 (&state)[2]) {
  MixerProducts made = token.made;
  float sum[kMakes ? 5 : 2] = {token.k.times(state), token.q.times(state)};
  if constexpr (kMakes) {
    sum[2] = token.k.times(token.k.v);
    sum[3] = token.q.times(token.q.v);
    sum[4] = token.q.times(token.k.v);
  }
  add_lanes(sum);
  if constexpr (kMakes) made = mixer_products(sum[2], sum[3], sum[4]);
  const float delta = token.beta * (v - token.decay * sum[0] * made.scale_k);
  const float step = delta * made.scale_k;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    state[j].x = token.decay * state[j].x + step * token.k.v[j].x;
    state[j].y = token.decay * state[j].y + step * token.k.v[j].y;
    state[j].z = token.decay * state[j].z + step * token.k.v[j].z;
    state[j].w = token.decay * state[j].w + step * token.k.v[j].w;
  }
  return round_bf16(token.decay * sum[1] * made.scale_q + delta * made.kq * made.scale_q * made.scale_k);
}

// Stores what this warp's two rows of part i make of token t.
template <int kRows>
__device__ __forceinline__ void store_mixed(const MixerPhase& p, const LayerConsumer& c, const MixerTask& task,
                                            MixerStaged<kRows>& s, int i, int begin, int t, float o) {
  const float second = __shfl_down_sync(~0u, o, kMixerLanes);
  if (threadIdx.x % kWarp != 0) return;
  const int pair = (task.part + i) * (kMixerRows / 2) + c.warp;
  const float2 gate = *reinterpret_cast<const float2*>(&s.gate[t][i * kMixerRows + c.warp * 2]);
  store_word(p.o + ((begin + t) * p.value_heads + task.head) * (kMixerDim / 2) + pair,
             pack_bf16(o * gate.x, second * gate.y), c.launch);
  s.squares[i][t][c.warp] = o * o + second * second;
}

template <int kRows>
__device__ __forceinline__ void mix_task(const MixerPhase& p, LayerConsumer& c, const MixerTask& task,
                                         const MixerTail& tail) {
  static_assert(sizeof(MixerStaged<kRows>) <= layer_mixer_bytes(kRows), "the writer leaves so much for it");
  auto& s = *reinterpret_cast<MixerStaged<kRows>*>(c.buffer<kRows>());
  const int lane = threadIdx.x % kWarp;
  const int warp = c.warp;
  const int begin = c.shared.token_begin[task.sequence];
  // Known to the compiler to be the warp's.
  const int tokens = __shfl_sync(~0u, c.shared.token_begin[task.sequence + 1] - begin, 0);
  if (tokens == 0) return;
  const int parts = kRows == 1 ? 1 : task.parts;
  MixerWeights weights;
  weights.fetch(p, task);
  mixer_convolve<kRows>(p, c, tail, weights, task, begin, tokens, s);
  c.mark(1);
  consumer_barrier();
  c.mark(2);
  // Of several tokens the products are made once, by a warp each.
  const bool alone = kRows == 1 || tokens == 1;
  if (!alone) {
    if (warp < tokens) {
      const MixerProducts made = MixerToken(s, warp).made;
      if (lane == 0) s.products[warp] = made;
    }
    consumer_barrier();
  }
  const int row = threadIdx.x / kMixerLanes;
  const bool has_state = c.shared.state_in[task.sequence] >= 0;
  std::byte* const to = p.recurrent + c.shared.state_out[task.sequence] * p.slot_stride + task.state_offset();
  int slot = 0;
  uint32_t states = 0;  // shared address of the slot's first part
  const auto take_part = [&](int i) {
    if (i % kMixerSlotParts == 0) states = c.wait(&slot) - warp * kLayerTileChunk;
    MixerState state;
    if (has_state) state.load(states + i % kMixerSlotParts * kMixerPartBytes);
    if (i % kMixerSlotParts == kMixerSlotParts - 1 || i + 1 == parts) c.release(slot);
    return state;
  };
  if (alone) {
    const MixerToken token = kRows == 1 ? MixerToken(s, 0, {}) : MixerToken(s, 0);
#pragma unroll 1
    for (int i = 0; i < parts; ++i) {
      MixerState state = take_part(i);
      const float o = mixer_rule<kRows == 1>(token, s.v[0][i * kMixerRows + row], state.v);
      store_mixed(p, c, task, s, i, begin, 0, o);
      state.store(to + i * kMixerPartBytes);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < parts; ++i) {
      MixerState state = take_part(i);
#pragma unroll 1
      for (int t = 0; t < tokens; ++t) {
        const float o = mixer_rule<false>(MixerToken(s, t, s.products[t]), s.v[t][i * kMixerRows + row], state.v);
        store_mixed(p, c, task, s, i, begin, t, o);
      }
      state.store(to + i * kMixerPartBytes);
    }
  }
  c.mark(3);
  consumer_barrier();
  const int t = static_cast<int>(threadIdx.x) % kRows;
  const int part = static_cast<int>(threadIdx.x) / kRows;
  if (part < parts && t < tokens) {
    store_word(p.squares + ((begin + t) * p.value_heads + task.head) * kMixerParts + task.part + part,
               __float_as_uint(add_parts(s.squares[part][t])), c.launch);
  }
}

template <int kRows>
__device__ __forceinline__ void consume_mixer(const MixerPhase& p, LayerConsumer& c) {
  const int log_parts = kRows == 1 ? 0 : p.log_parts;
  const int tasks = mixer_tasks(p, c.program.batch.sequences, log_parts);
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
