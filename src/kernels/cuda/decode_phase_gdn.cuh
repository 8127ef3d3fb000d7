// The Gated DeltaNet mixer as a phase: convolution, l2norm, gates and rule. The gated norm over a head, whose rows lie
// on several blocks, is left to the phase that reads o (stage_gated), and the conv tails, which several blocks read,
// are written after that one.
//
// A task is 32 state rows of one value head of one sequence; the producer brings them. 16 lanes per row:
//      state row (value dim):  | lane 0: k 0..3, 64..67 | lane 1: k 4..7, 68..71 | ... | lane 15 |
#pragma once

#include "kernels/cuda/decode_phase.cuh"

namespace tokenspeed::kernels::cuda {

inline constexpr int kGdnDim = 128;
inline constexpr int kGdnRows = 32;  // per task
inline constexpr int kGdnLanes = kStreamThreads / kGdnRows;
inline constexpr int kGdnTaps = 4;
inline constexpr int kGdnItems = 2 * kGdnDim + kGdnRows;  // channels a task convolves

struct GdnTask {
  int sequence;
  int head;
  int key_head;
  int first_row;  // of the head

  __device__ GdnTask(const GdnPhase& p, int task) {
    constexpr int kParts = kGdnDim / kGdnRows;
    sequence = task / (p.value_heads * kParts);
    head = task / kParts % p.value_heads;
    key_head = head / (p.value_heads / p.key_heads);
    first_row = task % kParts * kGdnRows;
  }
  // Of item: 0..127 q, 128..255 k, then the task's value rows.
  __device__ int channel(const GdnPhase& p, int item) const {
    if (item < kGdnDim) return key_head * kGdnDim + item;
    if (item < 2 * kGdnDim) return p.key_heads * kGdnDim + key_head * kGdnDim + item - kGdnDim;
    return 2 * p.key_heads * kGdnDim + head * kGdnDim + first_row + item - 2 * kGdnDim;
  }
  __device__ int64_t state_offset() const { return (static_cast<int64_t>(head) * kGdnDim + first_row) * kGdnDim * 4; }
};
__device__ __forceinline__ int gdn_tasks(const PhaseProgram& program, const GdnPhase& p) {
  return program.batch.sequences * p.value_heads * (kGdnDim / kGdnRows);
}
__device__ __forceinline__ int gdn_channels(const GdnPhase& p) { return (2 * p.key_heads + p.value_heads) * kGdnDim; }

__device__ __forceinline__ void produce_gdn(const PhaseProgram& program, const GdnPhase& p, const PhaseShared& s,
                                            RingProducer& ring) {
  for (int index = blockIdx.x; index < gdn_tasks(program, p); index += gridDim.x) {
    const GdnTask task(p, index);
    constexpr int kBytes = kGdnRows * kGdnDim * 4 / kProducerWarps;
    static_assert(kBytes * kProducerWarps <= kPieceBytes, "one piece per task");
    const int slot = s.state_in[task.sequence];
    const bool has_state = slot >= 0 && s.token_begin[task.sequence] < s.token_begin[task.sequence + 1];
    ring.open(has_state ? kBytes : 0);
    if (has_state && threadIdx.x % kWarp == 0) {
      const int at = ring.warp() * kBytes;
      ring.copy(at, p.recurrent + slot * p.slot_stride + task.state_offset() + at, kBytes);
    }
    ring.close();
  }
}

struct GdnStaged {
  float q[kDecodeTokens][kGdnDim];
  float k[kDecodeTokens][kGdnDim];
  float v[kDecodeTokens][kGdnRows];
  float decay[kDecodeTokens];
  float beta[kDecodeTokens];
};

// What a thread convolves: one channel.
struct GdnChannel {
  int channel = 0;
  float tail[kGdnTaps - 1] = {};
  float4 weight = {};
  float minus_rate = 0;
  float dt_bias = 0;

  __device__ void fetch(const GdnPhase& p, const PhaseShared& s, const GdnTask& task) {
    const int item = threadIdx.x;
    minus_rate = -expf(p.a_log[task.head]);
    dt_bias = p.dt_bias[task.head];
    if (item >= kGdnItems) return;
    channel = task.channel(p, item);
    weight = *reinterpret_cast<const float4*>(p.conv_weight + channel * kGdnTaps);
    const int slot = s.state_in[task.sequence];
    const bf16* const from = reinterpret_cast<const bf16*>(p.conv + slot * p.slot_stride) + channel;
#pragma unroll
    for (int j = 0; j < kGdnTaps - 1; ++j) tail[j] = slot >= 0 ? load_coherent(from + j * gdn_channels(p)) : 0.0f;
  }
};

__device__ __forceinline__ void gdn_convolve(const GdnPhase& p, GdnChannel& c, const GdnTask& task, int token_begin,
                                             int tokens, GdnStaged& s) {
  const int item = threadIdx.x;
  if (item >= kGdnItems) {
    const int t = item - kGdnItems;
    if (t >= tokens) return;
    const int64_t row = token_begin + t;
    const float b = load_coherent(p.b + row * p.b_stride + task.head);
    const float a = load_coherent(p.a + row * p.a_stride + task.head) + c.dt_bias;
    const float softplus = a > 20.0f ? a : log1pf(expf(a));
    s.beta[t] = sigmoid(b);
    s.decay[t] = expf(c.minus_rate * softplus);
    return;
  }
  const bf16* const from = p.qkv + static_cast<int64_t>(token_begin) * p.qkv_stride + c.channel;
  float u[kDecodeTokens];
#pragma unroll
  for (int t = 0; t < kDecodeTokens; ++t) {
    u[t] = t < tokens ? load_coherent(from + static_cast<int64_t>(t) * p.qkv_stride) : 0.0f;
  }
  float* const to = item < kGdnDim       ? &s.q[0][item]
                    : item < 2 * kGdnDim ? &s.k[0][item - kGdnDim]
                                         : &s.v[0][item - 2 * kGdnDim];
  const int stride = item < 2 * kGdnDim ? kGdnDim : kGdnRows;
#pragma unroll
  for (int t = 0; t < kDecodeTokens; ++t) {
    if (t >= tokens) break;
    to[t * stride] = silu(c.weight.x * c.tail[0] + c.weight.y * c.tail[1] + c.weight.z * c.tail[2] + c.weight.w * u[t]);
    c.tail[0] = c.tail[1];
    c.tail[1] = c.tail[2];
    c.tail[2] = u[t];
  }
}

__device__ __forceinline__ float dot4(const float4& a, const float4& b) {
  return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// The rule for this thread's eight state values of one row, all tokens.
__device__ __forceinline__ void gdn_rule(const GdnPhase& p, const GdnTask& task, int token_begin, int tokens,
                                         const GdnStaged& s, float4 (&state)[2]) {
  const int row = threadIdx.x / kGdnLanes;
  const int part = threadIdx.x % kGdnLanes;
  for (int t = 0; t < tokens; ++t) {
    float4 k[2];
    float sk = 0, sq = 0, kk = 0, qq = 0, kq = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      k[j] = *reinterpret_cast<const float4*>(&s.k[t][j * 64 + part * 4]);
      const float4 q = *reinterpret_cast<const float4*>(&s.q[t][j * 64 + part * 4]);
      sk += dot4(state[j], k[j]);
      sq += dot4(state[j], q);
      kk += dot4(k[j], k[j]);
      qq += dot4(q, q);
      kq += dot4(k[j], q);
    }
#pragma unroll
    for (int offset = 1; offset < kGdnLanes; offset *= 2) {
      sk += __shfl_xor_sync(~0u, sk, offset);
      sq += __shfl_xor_sync(~0u, sq, offset);
      kk += __shfl_xor_sync(~0u, kk, offset);
      qq += __shfl_xor_sync(~0u, qq, offset);
      kq += __shfl_xor_sync(~0u, kq, offset);
    }
    const float scale_q = rsqrtf(qq + 1e-6f) * 0.08838834764831845f;  // 1 / sqrt(128)
    const float scale_k = rsqrtf(kk + 1e-6f);
    const float decay = s.decay[t];
    const float delta = s.beta[t] * (s.v[t][row] - decay * sk * scale_k);
    if (part == 0) {
      p.o[static_cast<int64_t>(token_begin + t) * p.o_stride + task.head * kGdnDim + task.first_row + row] =
          __float2bfloat16_rn(decay * sq * scale_q + delta * kq * scale_q * scale_k);
    }
    const float step = delta * scale_k;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      state[j].x = decay * state[j].x + step * k[j].x;
      state[j].y = decay * state[j].y + step * k[j].y;
      state[j].z = decay * state[j].z + step * k[j].z;
      state[j].w = decay * state[j].w + step * k[j].w;
    }
  }
}

__device__ __forceinline__ void consume_gdn(const GdnPhase& p, Consumer& c) {
  GdnStaged& s = *reinterpret_cast<GdnStaged*>(c.staged);
  const int tasks = gdn_tasks(c.program, p);
  int index = blockIdx.x;
  GdnChannel channel;
  if (index < tasks) channel.fetch(p, c.shared, GdnTask(p, index));
  c.grid.wait();
  while (index < tasks) {
    const GdnTask task(p, index);
    const int token_begin = c.shared.token_begin[task.sequence];
    const int tokens = c.shared.token_begin[task.sequence + 1] - token_begin;
    gdn_convolve(p, channel, task, token_begin, tokens, s);
    const bool owner = c.ring.turn() == 0;
    const uint8_t* const piece = c.ring.next();
    if (owner) c.ring.wait();
    consumer_barrier();  // the state is there, and q, k and v
    const int at = threadIdx.x / kGdnLanes * kGdnDim * 4 + threadIdx.x % kGdnLanes * 16;
    float4 state[2] = {};
    if (c.shared.state_in[task.sequence] >= 0) {
      state[0] = *reinterpret_cast<const float4*>(piece + at);
      state[1] = *reinterpret_cast<const float4*>(piece + at + 256);
    }
    consumer_barrier();
    if (owner) c.ring.release();
    c.ring.passed(1);
    if (tokens > 0) {
      gdn_rule(p, task, token_begin, tokens, s, state);
      std::byte* const to = p.recurrent + c.shared.state_out[task.sequence] * p.slot_stride + task.state_offset() + at;
      *reinterpret_cast<float4*>(to) = state[0];
      *reinterpret_cast<float4*>(to + 256) = state[1];
    }
    index += gridDim.x;
    if (index >= tasks) break;
    channel.fetch(p, c.shared, GdnTask(p, index));
    consumer_barrier();  // q, k and v are overwritten next
  }
}

// The last three inputs of every channel go to the conv state when all blocks have read the ones before, which is in
// the phase after the mixer's: what is to be written is fetched ahead of its barrier. A block has runs of 64 channels.
class GdnTails {
 public:
  __device__ void fetch(const GdnPhase& p, const Consumer& c, int round) {
    to_ = nullptr;
    channels_ = gdn_channels(p);
    const int index = (round * static_cast<int>(gridDim.x) + blockIdx.x) * kRun + threadIdx.x;
    if (threadIdx.x >= kRun || index >= c.program.batch.sequences * channels_) return;
    const int sequence = index / channels_;
    const int channel = index % channels_;
    const int begin = c.shared.token_begin[sequence];
    const int tokens = c.shared.token_begin[sequence + 1] - begin;
    const int slot = c.shared.state_in[sequence];
    if (tokens == 0) return;
    const bf16* const old = reinterpret_cast<const bf16*>(p.conv + slot * p.slot_stride) + channel;
    to_ = reinterpret_cast<bf16*>(p.conv + c.shared.state_out[sequence] * p.slot_stride) + channel;
#pragma unroll
    for (int j = 0; j < kGdnTaps - 1; ++j) {
      const int t = tokens - (kGdnTaps - 1) + j;
      tail_[j] = 0;
      if (t >= 0) {
        tail_[j] = load_coherent(p.qkv + static_cast<int64_t>(begin + t) * p.qkv_stride + channel);
      } else if (slot >= 0) {
        tail_[j] = load_coherent(old + (kGdnTaps - 1 + t) * channels_);
      }
    }
  }
  __device__ void store() const {
    if (to_ == nullptr) return;
#pragma unroll
    for (int j = 0; j < kGdnTaps - 1; ++j) to_[j * channels_] = __float2bfloat16_rn(tail_[j]);
  }
  // Steps of several sequences have more runs than blocks.
  __device__ void rest(const GdnPhase& p, const Consumer& c) {
    const int runs = (c.program.batch.sequences * gdn_channels(p) + kRun - 1) / kRun;
    for (int round = 1; round * static_cast<int>(gridDim.x) < runs; ++round) {
      fetch(p, c, round);
      store();
    }
  }

 private:
  static constexpr int kRun = 64;
  bf16* to_;
  int channels_;
  float tail_[kGdnTaps - 1];
};

}  // namespace tokenspeed::kernels::cuda
