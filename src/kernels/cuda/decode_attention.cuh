// What decode_attention's parts share: sizes, parameters, the memory of a block, and the products of one run of keys on
// the tensor cores.
//
// Keys and values lie in shared memory as in their pages: bfloat16, or FP8 which is converted to float16 (exactly) when
// the operands are formed. Keys and dims are the rows of the products and the rows of queries (token, head of the
// group) their columns, eight at a time, so that the eight heads of a group leave nothing idle.
#pragma once

#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/fp8_pages.cuh"

namespace tokenspeed::kernels::cuda::decode_attention_parts {

constexpr int kHeadDim = 256;
constexpr int kShortestSegment = decode_key_segment(0);
constexpr int kLongestSegment = decode_key_segment(INT32_MAX);
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxGroup = 16;
constexpr int kRotaryPairs = 32;
constexpr int kQueryBytes = kHeadDim * 2;

struct AttentionParameters {
  SequenceBatch batch;
  KvPages pages;
  const bf16* q_gate;
  int64_t q_gate_stride;
  const bf16* key;
  int64_t key_stride;
  const bf16* value;
  int64_t value_stride;
  const float* query_norm;
  const float* key_norm;
  float epsilon;
  float scale;        // of scores to powers of two
  int group;          // query heads of a KV head
  int group_inverse;  // 2^16 / group, rounded up
  int query_heads;
  bf16* out;
  int64_t out_stride;
  int32_t* counters;      // [sequence][KV head][kind of rows][2], zero between launches
  float* partial;         // [segment][T][query head][kHeadDim]
  float2* greatest_sum;   // [segment][T][query head] m and l
  int mergers;            // at most so many blocks add the segments of a sequence and KV head
  uint64_t page_inverse;  // 2^32 / page_size, rounded up
  float frequencies[kRotaryPairs];

  // Of a block's row, which is below kDecodeTokens * kMaxGroup: exact.
  __device__ int token_of(int row) const { return (row * group_inverse) >> 16; }
  // Of a position below max_context: exact, or the launch is refused.
  __device__ int page_of(int position) const {
    return static_cast<int>(static_cast<uint32_t>(position) * page_inverse >> 32);
  }
};

// Where a block of a cluster receives every segment's results of its share of eight rows.
inline constexpr int kClusterBlocks = 8;
inline constexpr int kReceivers = 2;
inline constexpr int kReceivedRows = 8 / kReceivers;
struct ReceivedRows {
  alignas(16) float o[kClusterBlocks][kReceivedRows][kHeadDim];
  alignas(16) float2 greatest_sum[kClusterBlocks][kReceivedRows];
  alignas(8) uint64_t full;
};
struct NothingReceived {};

// kTiles * 8 rows (token, head of the group). Where a launch has few blocks, each takes a whole multiprocessor's memory
// for more copies in flight. kTogether: the blocks of a sequence and KV head are a cluster.
template <bool kFp8, int kTiles, bool kDeep, bool kTogether>
struct AttentionShared {
  static constexpr bool kIsFp8 = kFp8;
  static constexpr int kRowTiles = kTiles;
  static constexpr int kKeys = kFp8 ? 128 : 64;  // of a slot
  static constexpr int kRowBytes = kHeadDim * (kFp8 ? 1 : 2);
  static constexpr bool kManyRows = kTiles > 8;  // for which memory is short
  static constexpr int kSlots = kManyRows ? 2 : kTogether ? 5 : kDeep ? 6 : 3;
  static constexpr bool kHoldsSegment = kTogether;  // and asks for nothing while it multiplies
  static_assert(!kHoldsSegment || kShortestSegment / kKeys * 2 < kSlots);
  // A warp multiplies 16 keys; where there are fewer such runs than warps, each takes a part of the dims.
  static constexpr int kRuns = kKeys / 16;
  static constexpr int kParts = kWarps / kRuns;
  // Rows are so far apart that the operands' loads and stores meet no bank twice.
  static constexpr int kScorePitch = kKeys + 4;
  static constexpr int kProbabilityPitch = kManyRows ? kScorePitch * 4 : kKeys * 2 + (kFp8 ? 32 : 16);
  static_assert(kShortestSegment % kKeys == 0);

  alignas(128) uint8_t ring[kSlots][kKeys * kRowBytes];
  alignas(128) uint8_t query[kTiles * 8 * kQueryBytes];
  alignas(16) uint8_t own_probabilities[kManyRows ? 16 : kTiles * 8 * kProbabilityPitch];
  union {
    alignas(16) float scores[kParts][kTiles * 8][kScorePitch];
    alignas(16) float2 turns[kDecodeTokens][kRotaryPairs];  // cosine, sine; before the first scores
  };
  float shrink[kTiles * 8];
  float2 greatest_sum[kTiles * 8];
  [[no_unique_address]] std::conditional_t<kTogether, ReceivedRows, NothingReceived> received;
  alignas(16) uint32_t offset[kLongestSegment];  // of each older token's key or value in its pages, in 16 bytes
  int ticket;

  // A row's take its scores' place where memory is short.
  __device__ uint8_t* probabilities() { return kManyRows ? reinterpret_cast<uint8_t*>(scores) : own_probabilities; }
};

// Where 16-byte chunk `chunk` of key `row` lies in its slot, so that the operands' loads meet no bank twice.
template <bool kFp8, bool kIsKey>
__device__ __forceinline__ uint32_t slot_offset(int row, int chunk) {
  if constexpr (!kFp8) return swizzled<kHeadDim * 2>(row, chunk);
  return row * kHeadDim + ((kIsKey ? chunk ^ (row & 1) * 4 : chunk ^ (row / 4 & 3) * 2) << 4);
}

// This lane's operands of 8 rows of queries: all k of its warp's part of the dims.
template <typename Shared>
struct QueryOperand {
  static constexpr bool kFp8 = Shared::kIsFp8;
  static constexpr int kSteps = kHeadDim / 16 / Shared::kParts;
  uint32_t b[kSteps][2];

  __device__ __forceinline__ void load(const Shared& s, int tile) {
    const int lane = threadIdx.x % kWarp;
    const int part = static_cast<int>(threadIdx.x) / kWarp / Shared::kRuns;
    if constexpr (kFp8) {
      static_assert(Shared::kParts == 1);
#pragma unroll
      for (int i = 0; i < kSteps / 2; ++i) {
        const int chunk = i / 2 * 8 + lane % 4 * 2 + i % 2;
        const uint4 q = *reinterpret_cast<const uint4*>(s.query + swizzled<kQueryBytes>(tile * 8 + lane / 4, chunk));
        b[2 * i][0] = q.x;
        b[2 * i][1] = q.y;
        b[2 * i + 1][0] = q.z;
        b[2 * i + 1][1] = q.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSteps / 2; ++i) {
        uint32_t q[4];
        load_matrices(q, shared_address(s.query) +
                             swizzled<kQueryBytes>(tile * 8 + lane % 8, (part * kSteps + 2 * i) * 2 + lane / 8));
        b[2 * i][0] = q[0];
        b[2 * i][1] = q[1];
        b[2 * i + 1][0] = q[2];
        b[2 * i + 1][1] = q[3];
      }
    }
  }
};

// Sums over dims in kChains orders side by side.
constexpr int kChains = 4;

// score += k . q of this warp's 16 keys and 8 rows of queries. FP8: lane (key, c) takes 16 dims of a key at once, 64 i
// + 16 c and on; a step multiplies four neighbouring dims of each such run.
template <typename Shared, int kAtOnce>
__device__ __forceinline__ void multiply_keys(float (&score)[kAtOnce][kChains][4], const uint8_t* keys,
                                              const QueryOperand<Shared> (&query)[kAtOnce]) {
  constexpr bool kFp8 = Shared::kIsFp8;
  constexpr int kSteps = QueryOperand<Shared>::kSteps;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int row = warp % Shared::kRuns * 16;
  if constexpr (kFp8) {
    uint4 raw[kSteps / 4][2];
#pragma unroll
    for (int i = 0; i < kSteps / 4; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        raw[i][half] = *reinterpret_cast<const uint4*>(
            keys + slot_offset<true, true>(row + half * 8 + lane / 4, i * 4 + lane % 4));
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps / 4; ++i) {
      const uint32_t low[4] = {raw[i][0].x, raw[i][0].y, raw[i][0].z, raw[i][0].w};
      const uint32_t high[4] = {raw[i][1].x, raw[i][1].y, raw[i][1].z, raw[i][1].w};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t a[4] = {half_pair(low[step], false), half_pair(high[step], false), half_pair(low[step], true),
                               half_pair(high[step], true)};
#pragma unroll
        for (int tile = 0; tile < kAtOnce; ++tile) {
          const uint32_t(&b)[2] = query[tile].b[i * 4 + step];
          multiply_add_half(score[tile][step % kChains], a, b[0], b[1]);
        }
      }
    }
  } else {
    const int first_chunk = warp / Shared::kRuns * kSteps * 2;
    uint32_t a[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load_matrices(a[step], shared_address(keys) +
                                 slot_offset<false, true>(row + lane % 16, first_chunk + step * 2 + lane / 16));
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int tile = 0; tile < kAtOnce; ++tile) {
        const uint32_t(&b)[2] = query[tile].b[step];
        multiply_add(score[tile][step % kChains], a[step], b[0], b[1]);
      }
    }
  }
}

// o += V^T P^T of this warp's 32 dims and all rows. FP8: lane (n, c) takes dims 4 n .. 4 n + 3 of keys 4 c .. 4 c + 3
// of every 16; the products' rows n and n + 8 are dims 4 n + 2 u and 4 n + 2 u + 1.
template <typename Shared>
__device__ __forceinline__ void multiply_values(float (&o)[Shared::kRowTiles][2][4], Shared& s, const uint8_t* values) {
  constexpr bool kFp8 = Shared::kIsFp8;
  constexpr int kTiles = Shared::kRowTiles;
  constexpr int kPitch = Shared::kProbabilityPitch;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int n = lane / 4;
  const int c = lane % 4;
#pragma unroll
  for (int i = 0; i < Shared::kKeys / 32; ++i) {  // two steps of 16 keys
    uint32_t a[2][2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int row = i * 32 + step * 16;
      if constexpr (kFp8) {
        uint32_t word[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          word[k] = *reinterpret_cast<const uint32_t*>(
              values + slot_offset<true, false>(row + c * 4 + k, warp * 2 + n / 4) + n % 4 * 4);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t low = __byte_perm(word[2 * half], word[2 * half + 1], 0x5140);
          const uint32_t high = __byte_perm(word[2 * half], word[2 * half + 1], 0x7362);
          a[step][0][2 * half] = half_pair(low, false);
          a[step][0][2 * half + 1] = half_pair(low, true);
          a[step][1][2 * half] = half_pair(high, false);
          a[step][1][2 * half + 1] = half_pair(high, true);
        }
      } else {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          load_matrices_transposed(a[step][u],
                                   shared_address(values) + slot_offset<false, false>(row + lane / 16 * 8 + lane % 8,
                                                                                      warp * 4 + u * 2 + lane / 8 % 2));
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t b[2][2];
      if constexpr (kFp8) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint2 p = *reinterpret_cast<const uint2*>(s.probabilities() + (tile * 8 + n) * kPitch +
                                                          (i * 32 + step * 16 + c * 4) * 2);
          b[step][0] = p.x;
          b[step][1] = p.y;
        }
      } else {
        uint32_t p[4];
        load_matrices(p, shared_address(s.probabilities()) + (tile * 8 + lane % 8) * kPitch + (i * 4 + lane / 8) * 16);
        b[0][0] = p[0];
        b[0][1] = p[1];
        b[1][0] = p[2];
        b[1][1] = p[3];
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          if constexpr (kFp8) {
            multiply_add_half(o[tile][u], a[step][u], b[step][0], b[step][1]);
          } else {
            multiply_add(o[tile][u], a[step][u], b[step][0], b[step][1]);
          }
        }
      }
    }
  }
}

// The dim of sums o[.][u][column of two + 2 * half] of this lane, from its warp's first.
template <bool kFp8>
__device__ __forceinline__ int dim_of(int u, int half) {
  const int n = threadIdx.x % kWarp / 4;
  return kFp8 ? n * 4 + u * 2 + half : u * 16 + half * 8 + n;
}

// Heads of eight dims per lane, side by side: zero-centred norm over 256, then the rotation of the first 64 dims (dim i
// and i + 32 are four lanes apart) by turn[head][dim], rounded once. Sums are spelled as fmaf, so that no number of
// heads makes the compiler choose others.
template <int kHeads>
__device__ __forceinline__ void norm_and_turn(uint4 (&heads)[kHeads], const float (&weight)[8], float epsilon,
                                              const float2* const (&turn)[kHeads]) {
  const int lane = threadIdx.x % kWarp;
  float v[kHeads][8];
  float squares[kHeads] = {};
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const uint32_t words[4] = {heads[h].x, heads[h].y, heads[h].z, heads[h].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[h][2 * i] = bf16_low(words[i]);
      v[h][2 * i + 1] = bf16_high(words[i]);
      squares[h] = fmaf(v[h][2 * i], v[h][2 * i], squares[h]);
      squares[h] = fmaf(v[h][2 * i + 1], v[h][2 * i + 1], squares[h]);
    }
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) squares[h] += __shfl_xor_sync(~0u, squares[h], offset);
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float inverse = rsqrtf(squares[h] / kHeadDim + epsilon);
    const auto* const angles = reinterpret_cast<const float4*>(turn[h] + lane % 4 * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[h][i] *= inverse * (1.0f + weight[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 angle = angles[i];  // of two dims
      const float other[2] = {__shfl_xor_sync(~0u, v[h][2 * i], 4), __shfl_xor_sync(~0u, v[h][2 * i + 1], 4)};
      const float turned[2] = {fmaf(lane < 4 ? -other[0] : other[0], angle.y, v[h][2 * i] * angle.x),
                               fmaf(lane < 4 ? -other[1] : other[1], angle.w, v[h][2 * i + 1] * angle.z)};
      v[h][2 * i] = lane < 8 ? turned[0] : v[h][2 * i];
      v[h][2 * i + 1] = lane < 8 ? turned[1] : v[h][2 * i + 1];
    }
    heads[h] = {pack_bf16(v[h][0], v[h][1]), pack_bf16(v[h][2], v[h][3]), pack_bf16(v[h][4], v[h][5]),
                pack_bf16(v[h][6], v[h][7])};
  }
}

}  // namespace tokenspeed::kernels::cuda::decode_attention_parts
