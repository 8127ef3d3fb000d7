// The engine of the weight-streaming kernels: tiles of 16 weight rows times at most 8 activation rows on the tensor
// cores.
//
// A block is 16 warps. A tile [16, k] is cut along k into chunks of 64 bytes per row; each warp owns a fixed run of
// chunks and streams them through a ring of its own in shared memory, a lane reading only what it copied itself, so the
// main loop has no block barrier:
//
//        row g   : | lane 4g: 16 B | 4g+1 | 4g+2 | 4g+3 |     one chunk, rows 0..7
//        row g+8 : | lane 4g: 16 B | 4g+1 | 4g+2 | 4g+3 |     rows 8..15
//
// Lane 4g+c holds k elements that the tensor core believes to be (2c, 2c+1, 2c+8, 2c+9) of 16; the activations are read
// from shared memory in the same order, so the sum is the same. Columns of the product are the step's rows; each
// column's arithmetic does not depend on the others, which is why a row's bits do not depend on T.
//
// FP8 weights become float16 (exact, one instruction for two); the activations they meet are staged as float16 times
// 2^-3, so values up to 500,000 are kept and nothing above 2.4e-7 is lost, far below bfloat16's own rounding.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode.h"

namespace tokenspeed::kernels::cuda {

inline constexpr int kStreamWarps = 16;
inline constexpr int kStreamThreads = kStreamWarps * kWarp;
inline constexpr int kTileRows = 16;
inline constexpr int kChunkBytes = 64;
inline constexpr int kStageBytes = kTileRows * kChunkBytes;
inline constexpr float kStagedScale = 0x1p-3f;

// This warp's chunks on their way. push() or pad() must have been called kStages times more than pop() before a pop().
template <int kStages>
class WeightRing {
 public:
  static constexpr int kBytes = kStreamWarps * kStages * (kStageBytes + 8);

  __device__ explicit WeightRing(void* shared) {
    const int warp = threadIdx.x / kWarp;
    const uint32_t base = shared_address(shared);
    data_ = base + warp * kStages * kStageBytes + (threadIdx.x % kWarp) * 16;
    scales_ = base + kStreamWarps * kStages * kStageBytes + warp * kStages * 8;
  }
  // lo and hi: this lane's 16 bytes of its two rows; scales of the rows' blocks, null for bfloat16.
  __device__ void push(const void* lo, const void* hi, const float* scale_lo, const float* scale_hi) {
    copy16_streaming(data_ + in_ * kStageBytes, lo);
    copy16_streaming(data_ + in_ * kStageBytes + kStageBytes / 2, hi);
    const int lane = threadIdx.x % kWarp;
    if (scale_lo != nullptr && lane < 2) copy4_async(scales_ + in_ * 8 + lane * 4, lane == 0 ? scale_lo : scale_hi);
    pad();
    if (++in_ == kStages) in_ = 0;
  }
  __device__ void pad() { commit_copies(); }
  __device__ void pop(uint4& lo, uint4& hi, float2& scale) {
    wait_copies<kStages - 1>();
    __syncwarp();  // the scales were copied by two lanes for all
    lo = load16_shared(data_ + out_ * kStageBytes);
    hi = load16_shared(data_ + out_ * kStageBytes + kStageBytes / 2);
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(scale.x), "=f"(scale.y)
                 : "r"(scales_ + out_ * 8)
                 : "memory");
    __syncwarp();  // the next push may write where the others still read scales
    if (++out_ == kStages) out_ = 0;
  }

 private:
  uint32_t data_;
  uint32_t scales_;
  int in_ = 0;
  int out_ = 0;
};

// acc += one chunk. x: shared address of this lane's activations for the chunk (32 bytes for FP8, 16 for bfloat16);
// `active` is whether the lane's column is a row of the step. staged: activations are float16.
__device__ __forceinline__ void multiply_fp8_chunk(float (&acc)[4], const uint4& lo, const uint4& hi, float2 scale,
                                                   uint32_t x, bool active) {
  uint4 b[2] = {};
  if (active) {
    b[0] = load16_shared(x);
    b[1] = load16_shared(x + 16);
  }
  const uint32_t low[4] = {lo.x, lo.y, lo.z, lo.w};
  const uint32_t high[4] = {hi.x, hi.y, hi.z, hi.w};
  const uint32_t pairs[8] = {b[0].x, b[0].y, b[0].z, b[0].w, b[1].x, b[1].y, b[1].z, b[1].w};
  float sum[2][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t a[4];
    fp8_to_f16(low[i], a[0], a[2]);
    fp8_to_f16(high[i], a[1], a[3]);
    multiply_add_half(sum[i % 2], a, pairs[2 * i], pairs[2 * i + 1]);
  }
  acc[0] += scale.x * (sum[0][0] + sum[1][0]);
  acc[1] += scale.x * (sum[0][1] + sum[1][1]);
  acc[2] += scale.y * (sum[0][2] + sum[1][2]);
  acc[3] += scale.y * (sum[0][3] + sum[1][3]);
}
__device__ __forceinline__ void multiply_bf16_chunk(float (&acc)[4], const uint4& lo, const uint4& hi, uint32_t x,
                                                    bool active, bool staged) {
  uint4 b = {};
  if (active) b = load16_shared(x);
  const uint32_t low[4] = {lo.x, lo.y, lo.z, lo.w};
  const uint32_t high[4] = {hi.x, hi.y, hi.z, hi.w};
  const uint32_t pairs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t a[4] = {low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]};
    if (staged) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = pack_f16(bf16_low(a[j]), bf16_high(a[j]));
      multiply_add_half(acc, a, pairs[2 * i], pairs[2 * i + 1]);
    } else {
      multiply_add(acc, a, pairs[2 * i], pairs[2 * i + 1]);
    }
  }
}

// Staged rows in shared memory: row t at t * staged_row_bytes(k); the 16 bytes between keep columns in different banks.
__host__ __device__ constexpr int staged_row_bytes(int k) { return k * 2 + 16; }

__device__ __forceinline__ void unpack8(const uint4& raw, float (&v)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = bf16_low(words[i]);
    v[2 * i + 1] = bf16_high(words[i]);
  }
}
// Eight bfloat16 activations as FP8 weights need them.
__device__ __forceinline__ uint4 stage_for_fp8(const uint4& raw) {
  float v[8];
  unpack8(raw, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= kStagedScale;
  return {pack_f16(v[0], v[1]), pack_f16(v[2], v[3]), pack_f16(v[4], v[5]), pack_f16(v[6], v[7])};
}

// The norm weights of the (at most two) vectors of eight that a thread stages, fetched before the wait.
inline constexpr int kNormVectors = 2;
inline constexpr int kNormLimit = kNormVectors * kStreamThreads * 8;
struct NormWeights {
  float v[kNormVectors][8];
  __device__ void fetch(const float* weight, int k) {
#pragma unroll
    for (int i = 0; i < kNormVectors; ++i) {
      const int vector = threadIdx.x + i * kStreamThreads;
      if (weight == nullptr || vector * 8 >= k) continue;
      *reinterpret_cast<float4*>(&v[i][0]) = *reinterpret_cast<const float4*>(weight + vector * 8);
      *reinterpret_cast<float4*>(&v[i][4]) = *reinterpret_cast<const float4*>(weight + vector * 8 + 4);
    }
  }
};

struct StagedInput {
  const bf16* x;
  int64_t stride;
  const float* norm_weight;
  float epsilon;
  bf16* normed;  // written by block 0 when not null
  int64_t normed_stride;
  int rows;
  int k;
  bool fp8;
};
inline constexpr int kStageSums = kDecodeTokens * kStreamWarps;  // floats of scratch

// All threads of the block; returns with the rows visible to all. Sums are per row in one order whatever the rows.
__device__ inline void stage_rows(const StagedInput& in, const NormWeights& norm, uint8_t* staged, float* sums) {
  const int vectors = in.k / 8;
  const int row_bytes = staged_row_bytes(in.k);
  const bool has_norm = in.norm_weight != nullptr;
  float squares[kDecodeTokens] = {};
  for (int vector = threadIdx.x; vector < vectors; vector += kStreamThreads) {
    // Four rows' loads in flight at a time: more would spill.
#pragma unroll
    for (int begin = 0; begin < kDecodeTokens; begin += 4) {
      if (begin >= in.rows) break;
      uint4 raw[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (begin + i < in.rows) raw[i] = *reinterpret_cast<const uint4*>(in.x + (begin + i) * in.stride + vector * 8);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (begin + i >= in.rows) break;
        if (has_norm) {
          float v[8];
          unpack8(raw[i], v);
#pragma unroll
          for (int j = 0; j < 8; ++j) squares[begin + i] += v[j] * v[j];
        } else if (in.fp8) {
          raw[i] = stage_for_fp8(raw[i]);
        }
        *reinterpret_cast<uint4*>(staged + (begin + i) * row_bytes + vector * 16) = raw[i];
      }
    }
  }
  if (has_norm) {
#pragma unroll
    for (int t = 0; t < kDecodeTokens; ++t) {
      if (t >= in.rows) break;
      const float sum = warp_sum(squares[t]);
      if (threadIdx.x % kWarp == 0) sums[t * kStreamWarps + threadIdx.x / kWarp] = sum;
    }
    __syncthreads();
    for (int t = 0; t < in.rows; ++t) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kStreamWarps; ++i) sum += sums[t * kStreamWarps + i];
      const float inverse = rsqrtf(sum / static_cast<float>(in.k) + in.epsilon);
#pragma unroll
      for (int i = 0; i < kNormVectors; ++i) {
        const int vector = threadIdx.x + i * kStreamThreads;
        if (vector >= vectors) continue;
        uint4* const at = reinterpret_cast<uint4*>(staged + t * row_bytes + vector * 16);
        float v[8];
        unpack8(*at, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = v[j] * inverse * (1.0f + norm.v[i][j]);
        const uint4 rounded = {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                               pack_bf16(v[6], v[7])};
        if (in.normed != nullptr && blockIdx.x == 0) {
          *reinterpret_cast<uint4*>(in.normed + t * in.normed_stride + vector * 8) = rounded;
        }
        *at = in.fp8 ? stage_for_fp8(rounded) : rounded;
      }
    }
  }
  __syncthreads();
}

// What the sum of chunk products is multiplied by at the end.
__device__ __forceinline__ float unstage_scale(bool staged) { return staged ? 1.0f / kStagedScale : 1.0f; }

// Stores a warp's tile product as [16 rows][T].
__device__ __forceinline__ void store_partial(float* partial, const float (&acc)[4], int rows) {
  const int lane = threadIdx.x % kWarp;
  const int row = lane / 4;
  const int column = lane % 4 * 2;
  if (column < rows) {
    partial[row * rows + column] = acc[0];
    partial[(row + 8) * rows + column] = acc[2];
  }
  if (column + 1 < rows) {
    partial[row * rows + column + 1] = acc[1];
    partial[(row + 8) * rows + column + 1] = acc[3];
  }
}

// The largest of these shared memories that a block may take, and the target that lets two kernels share a
// multiprocessor.
inline constexpr size_t kSharedLimit = 227 * 1024;

}  // namespace tokenspeed::kernels::cuda
