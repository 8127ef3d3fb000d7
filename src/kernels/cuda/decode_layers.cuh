// Common parts of the persistent kernel (decode_layers_program.h says what it executes): shared memory, the ring of
// weights, words between blocks, and the product of a chunk.
//
//     shared memory: | ring: slots of 32 KiB | staged | part sums, once or twice | LayerShared |
//     staged:        | activations of turn 0: warp 0, 1, ... 15 | turn 1 | ... |
#pragma once

#include <cstddef>

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode_layers_program.h"
#include "kernels/cuda/decode_layers_words.cuh"

namespace tokenspeed::kernels::cuda {

inline constexpr float kLayerStagedScale = 0x1p-3f;
inline constexpr int kRoutingPairsMax = kDecodeTokens * kDecodeTopK;

// The rows of the step that chose an entry, one after the other from bit 0 on, four bits each, and the entry's place
// in each row.
struct EntryRows {
  uint32_t rows = ~0u;  // 15: none
  uint32_t places = 0;
};

// Of one row's choice.
struct RowChoice {
  alignas(16) uint32_t greatest[kWarp / 2];  // of the logits of two lanes each, as keys
  alignas(16) uint32_t keys[kWarp];          // of the candidates, in the order of their ids; zeros follow
  int ids[kWarp];
  uint32_t chosen[kDecodeTopK];  // keys, in order
};

// The router's choice. A row's places are the shared expert's, if there is one, and those of its choices. Entries are
// the experts that the step must read: the shared one first, then the distinct ones.
struct LayerRouting {
  int entries;
  int ids[kRoutingPairsMax];                                     // [t][i] at t * top_k + i
  float weights[kDecodeTokens * (kDecodeTopK + 1)];              // [t][place]
  int expert[kRoutingPairsMax + 1];                              // of an entry
  alignas(8) int8_t place[kRoutingPairsMax + 1][kDecodeTokens];  // of steps of several rows: of an entry, or -1
  EntryRows rows[kRoutingPairsMax + 1];                          // the same
  unsigned firsts[kDecodeTokens];  // of a row: bits of the choices that no row before has made
  RowChoice choice[kDecodeTokens];
};

struct LayerShared {
  alignas(8) uint64_t full[kLayerMaxSlots];
  uint64_t empty[kLayerMaxSlots];
  uint64_t router_begun;  // by the block, in steps of one row: what the choice before left is used up
  uint64_t routed;        // the experts are chosen
  uint64_t weighted;      // and their weights are known
  uint64_t added;         // the part sums in the only buffer
  int token_begin[kDecodeTokens + 1];
  int state_in[kDecodeTokens];
  int state_out[kDecodeTokens];
  alignas(16) float squares[kDecodeTokens][kLayerWarps];  // of the row before its norm, by warp
  LayerRouting routing;
#ifdef TOKENSPEED_LAYER_CLOCKS
  long long clocks[8];
#endif
  LayerPhase phases[kLayerMaxPhases];
};

struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;  // bit 0; the others are the owner's
  __device__ void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ void consumer_barrier() { named_barrier(1, kLayerConsumers); }

#ifdef TOKENSPEED_LAYER_CLOCKS
static __device__ long long layer_clocks[24 * 8 * 132];  // [phase][mark][block]
#endif
// What a consumer thread carries from phase to phase.
struct LayerConsumer {
  // Parities beside the ring's, in one register with it: of the batches of part sums so far, and of the choices.
  static constexpr uint32_t kBatch = 2;
  static constexpr uint32_t kRouted = 4;

  const LayerProgram& program;
  LayerShared& shared;
  int warp;  // known to the compiler to be the warp's
  int rows;
  int slots;
  uint32_t full;    // shared address of the ring's barriers, the empty ones behind them
  uint32_t ring;    // shared address of this warp's chunk of the first slot
  uint8_t* staged;  // this warp's of turn 0
  float* partial;   // layer_buffers(kRows)
  RingPosition at;
  unsigned launch = 0;
  float residual = 0;  // x of this thread's (tile, row of the step, row of the tile)

#ifdef TOKENSPEED_LAYER_CLOCKS
  __device__ void mark(int what) const {
    if (threadIdx.x == 0) shared.clocks[what] = clock64();
  }
#else
  __device__ void mark(int) const {}
#endif
  __device__ uint32_t parity(uint32_t what) const { return (at.parity & what) != 0; }
  template <int kRows>
  __device__ float* buffer() const {
    return layer_buffers(kRows) == 1 ? partial : partial + parity(kBatch) * (program.partial_bytes / 4);
  }
  __device__ uint32_t added() const { return full + offsetof(LayerShared, added); }
  // Before a warp stores anything in the buffer. Of two buffers all warps have left the next one when they meet.
  template <int kRows>
  __device__ void begin_batch() const {
    if constexpr (layer_buffers(kRows) == 1) barrier_wait(added(), parity(kBatch) ^ 1);
  }
  // When the warp needs nothing of it any more.
  template <int kRows>
  __device__ void end_batch() {
    if constexpr (layer_buffers(kRows) == 1) warp_arrive(added());
    at.parity ^= kBatch;
  }
  // Shared address of this warp's chunk of the next slot, when it is there. The slot is released by its number, which
  // may be after the next one has been waited for.
  __device__ uint32_t wait(int* slot) {
    *slot = at.slot;
    barrier_wait(full + at.slot * 8, at.parity & 1);
    const uint32_t chunk = ring + at.slot * kLayerSlotBytes;
    at.advance(slots);
    return chunk;
  }
  __device__ void release(int slot) const { warp_release(full + (kLayerMaxSlots + slot) * 8); }
};

// ---- words ----

// Loads `count` <= kCount pairs of words that other blocks write and hands their values on in order when all are there,
// the first kFirst before the others are asked for. The whole warp calls, so that it leaves the loop as one; lanes that
// want nothing say so.
template <int kCount, int kFirst, typename Address, typename Take>
__device__ __forceinline__ void gather_pairs(unsigned launch, int count, Address&& address, Take&& take) {
  uint4 value[kCount] = {};
  const auto fetch = [&](int begin, int end) {
    bool complete;
#pragma unroll 1
    do {
      complete = true;
#pragma unroll
      for (int i = begin; i < end; ++i) {
        if (i < count) value[i] = load_words2(address(i));
      }
#pragma unroll
      for (int i = begin; i < end; ++i) {
        if (i < count) complete &= value[i].y == launch && value[i].w == launch;
      }
    } while (!__all_sync(~0u, complete));
  };
  fetch(0, kFirst);
  if constexpr (kFirst < kCount) fetch(kFirst, kCount);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) take(i, value[i].x, value[i].z);
  }
}
// The same of single words.
template <int kCount, int kFirst, typename Address, typename Take>
__device__ __forceinline__ void gather_words(unsigned launch, int count, Address&& address, Take&& take) {
  uint2 value[kCount] = {};
  const auto fetch = [&](int begin, int end) {
    bool complete;
#pragma unroll 1
    do {
      complete = true;
#pragma unroll
      for (int i = begin; i < end; ++i) {
        if (i < count) value[i] = load_word(address(i));
      }
#pragma unroll
      for (int i = begin; i < end; ++i) {
        if (i < count) complete &= value[i].y == launch;
      }
    } while (!__all_sync(~0u, complete));
  };
  fetch(0, kFirst);
  if constexpr (kFirst < kCount) fetch(kFirst, kCount);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) take(i, value[i].x);
  }
}

// ---- staged activations ----
//
// A chunk of a row meets the tensor core as operands of lanes: lane 4t + c holds row t's values c * n .. c * n + n - 1
// of the chunk (n = 32 beside FP8 weights, 16 beside bfloat16), in pieces of 16 bytes,
//
//     piece 0: | lane 0 | lane 1 | ... | lane 4 * kRows - 1 |  piece 1: ...
//
// Beside FP8 weights they are float16 times kLayerStagedScale,
// so that values up to 500,000 are kept.

template <bool kFp8>
inline constexpr int kLaneValues = layer_chunk_values(kFp8) / kWarp;  // of a row's chunk, as it is loaded
template <bool kFp8, int kRows>
inline constexpr int kStagedTurn = kLayerWarps * layer_staged_chunk(kFp8, kRows);  // from a warp's turn to its next

// v: this lane's neighbouring values of row t's chunk.
template <bool kFp8, int kRows>
__device__ __forceinline__ void stage_values(uint8_t* chunk, int t, const float (&v)[kLaneValues<kFp8>]) {
  const int lane = threadIdx.x % kWarp;
  const int operand = t * 4 + lane / 8;
  if constexpr (kFp8) {
    uint8_t* const to = chunk + (lane % 8 / 2 * 4 * kRows + operand) * 16 + lane % 2 * 8;
    *reinterpret_cast<uint2*>(to) = {pack_f16(v[0] * kLayerStagedScale, v[1] * kLayerStagedScale),
                                     pack_f16(v[2] * kLayerStagedScale, v[3] * kLayerStagedScale)};
  } else {
    uint8_t* const to = chunk + (lane % 8 / 4 * 4 * kRows + operand) * 16 + lane % 4 * 4;
    *reinterpret_cast<uint32_t*>(to) = pack_bf16(v[0], v[1]);
  }
}

// What a lane multiplies weights with; zeros in columns without a row.
template <int kPieces>
struct Operand {
  uint32_t pair[kPieces * 4] = {};

  // This lane's pieces of a staged chunk from `piece` on as lane `from` would read them.
  template <int kRows>
  __device__ __forceinline__ const Operand& load(const uint8_t* chunk, int piece, int from, int rows) {
    if (static_cast<int>(threadIdx.x % kWarp) / 4 < rows) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const uint4 v = load16_shared(shared_address(chunk) + ((piece + i) * 4 * kRows + from) * 16);
        pair[4 * i] = v.x;
        pair[4 * i + 1] = v.y;
        pair[4 * i + 2] = v.z;
        pair[4 * i + 3] = v.w;
      }
    }
    return *this;
  }
};

// ---- products ----

// This lane's 32 bytes of rows lane / 4 and lane / 4 + 8 of a chunk.
struct ChunkWeights {
  uint32_t low[8];
  uint32_t high[8];
};
__device__ __forceinline__ ChunkWeights load_chunk(uint32_t chunk) {
  const int row = threadIdx.x % kWarp / 4;
  const int unit = threadIdx.x % 4 * 2;
  ChunkWeights w;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t at = chunk + row * kLayerChunkBytes + (((unit + i) ^ row) << 4);
    const uint4 low = load16_shared(at);
    const uint4 high = load16_shared(at + 8 * kLayerChunkBytes);
    w.low[4 * i] = low.x, w.low[4 * i + 1] = low.y, w.low[4 * i + 2] = low.z, w.low[4 * i + 3] = low.w;
    w.high[4 * i] = high.x, w.high[4 * i + 1] = high.y, w.high[4 * i + 2] = high.z, w.high[4 * i + 3] = high.w;
  }
  return w;
}

// acc += scale * (a chunk's FP8 weights times float16 operands).
__device__ __forceinline__ void multiply_fp8(float (&acc)[4], const ChunkWeights& w, const Operand<4>& b,
                                             float2 scale) {
  float sum[2][4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t a[4];
    fp8_to_f16(w.low[i], a[0], a[2]);
    fp8_to_f16(w.high[i], a[1], a[3]);
    multiply_add_half(sum[i % 2], a, b.pair[2 * i], b.pair[2 * i + 1]);
  }
  acc[0] += scale.x * (sum[0][0] + sum[1][0]);
  acc[1] += scale.x * (sum[0][1] + sum[1][1]);
  acc[2] += scale.y * (sum[0][2] + sum[1][2]);
  acc[3] += scale.y * (sum[0][3] + sum[1][3]);
}
// acc += a chunk's bfloat16 weights times operands of bfloat16, or of float16.
template <bool kHalf>
__device__ __forceinline__ void multiply_bf16(float (&acc)[4], const ChunkWeights& w, const Operand<2>& b) {
  float sum[2][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t a[4] = {w.low[2 * i], w.high[2 * i], w.low[2 * i + 1], w.high[2 * i + 1]};
    if constexpr (kHalf) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = pack_f16(bf16_low(a[j]), bf16_high(a[j]));
      multiply_add_half(sum[i % 2], a, b.pair[2 * i], b.pair[2 * i + 1]);
    } else {
      multiply_add(sum[i % 2], a, b.pair[2 * i], b.pair[2 * i + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] += sum[0][i] + sum[1][i];
}

// ---- part sums ----
//
// A tile's are [element: row of the step, row of the tile][place], layer_partial_stride() floats apart.

// The place of a warp's part. Of several rows, vectors of four change places with the row of the tile, and the parts of
// a vector with the row of the step, so that stores and loads of a warp lie in different banks. A vector's sum is one
// of two sums of two, and stays the same.
template <int kRows>
__device__ __forceinline__ int part_place(int element, int warp) {
  if constexpr (kRows == 1) return warp;
  return warp ^ (element / 2 % 4 * 4 + element / (2 * kLayerTileRows) % 4);
}
template <int kRows>
__device__ __forceinline__ void store_parts(float* tile, int warp, const float (&acc)[4]) {
  const int lane = kRows == 1 ? threadIdx.x % kWarp : read_lane();
  constexpr int kStride = layer_partial_stride(kRows);
  const int element = lane % 4 * 2 * kLayerTileRows + lane / 4;
  float* const to = tile + element * kStride + part_place<kRows>(element, warp);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (lane % 4 * 2 + i >= kRows) break;
    to[i * kLayerTileRows * kStride] = acc[i];
    to[(i * kLayerTileRows + 8) * kStride] = acc[2 + i];
  }
}
// The sum over the warps, always in the same order; those without a part have stored zeros.
// swap: of the vectors' places.
__device__ __forceinline__ float add_parts(const float* row, int swap = 0) {
  float4 v[kLayerWarps / 4];
#pragma unroll
  for (int i = 0; i < kLayerWarps / 4; ++i) v[i] = reinterpret_cast<const float4*>(row)[i ^ swap];
  float sum[kLayerWarps / 4];
#pragma unroll
  for (int i = 0; i < kLayerWarps / 4; ++i) sum[i] = (v[i].x + v[i].y) + (v[i].z + v[i].w);
  static_assert(kLayerWarps == 16, "four vectors");
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The sum of an element of a tile, or of the tiles of a batch; neighbouring threads take neighbouring elements, eight
// at least.
template <int kRows>
__device__ __forceinline__ float add_element(const float* parts, int element) {
  return add_parts(parts + element * layer_partial_stride(kRows), kRows == 1 ? 0 : read_lane() / 2 % 4);
}

// One exchange of kLeft values between lanes kOffset apart, and those that follow. Recursive, as a loop of loops whose
// lengths change is not unrolled, and the values would lie in local memory.
template <int kLeft, int kOffset, int kCount>
__device__ __forceinline__ void exchange_sums(float (&v)[kCount]) {
  if constexpr (kLeft == 1) {
    v[0] += __shfl_xor_sync(~0u, v[0], kOffset);
  } else {
    constexpr int kKept = kLeft / 2;
    const bool upper = (threadIdx.x & kOffset) != 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float given = upper ? v[i] : v[i + kKept];
      const float kept = upper ? v[i + kKept] : v[i];
      v[i] = kept + __shfl_xor_sync(~0u, given, kOffset);
    }
  }
  if constexpr (kOffset > 1) exchange_sums<(kLeft > 1 ? kLeft / 2 : 1), kOffset / 2>(v);
}
// Sums of kCount values over the lanes of a warp, each added as warp_sum() does, so with the same bits. Lanes exchange
// values that they give up for values that they keep, so that together they need few more shuffles than one value.
template <int kCount>
__device__ __forceinline__ float warp_sums(float (&v)[kCount]) {
  static_assert(kCount <= kWarp && (kCount & (kCount - 1)) == 0);
  exchange_sums<kCount, kWarp / 2>(v);
  return v[0];
}
// Which of the sums a lane has, and whether it is the first that does.
template <int kCount>
__device__ __forceinline__ int sum_of_lane() {
  return threadIdx.x % kWarp / (kWarp / kCount);
}
template <int kCount>
__device__ __forceinline__ bool is_lane_of_sum() {
  return threadIdx.x % (kWarp / kCount) == 0;
}

// What the RMS norm divides row t by, inverted.
__device__ __forceinline__ float inverse_norm(const LayerShared& shared, int t, int k, float epsilon) {
  return rsqrtf(add_parts(shared.squares[t]) * __fdividef(1.0f, static_cast<float>(k)) + epsilon);
}

// Neighbouring lanes hold neighbouring rows; true for the lane that stores both.
__device__ __forceinline__ bool pair_up(float value, float* odd) {
  *odd = __shfl_xor_sync(~0u, value, 1);
  return threadIdx.x % 2 == 0;
}

// Adds a projection's result to the residual stream and tells the other blocks. e: this thread's element
// (tile of the block, row of the step, row of the tile); all threads of the warp call.
template <int kRows>
__device__ __forceinline__ void add_to_residual(LayerConsumer& c, float sum, bool valid, int tile, int t, int row,
                                                uint2* words) {
  if (valid) c.residual = round_bf16(c.residual + sum);
  float odd;
  if (!pair_up(c.residual, &odd) || !valid) return;
  store_word(words + (static_cast<int64_t>(t) * c.program.hidden + tile * kLayerTileRows + row) / 2,
             pack_bf16(c.residual, odd), c.launch);
}

}  // namespace tokenspeed::kernels::cuda
