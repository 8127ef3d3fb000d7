// Adds the segments of decode_attention's rows: out = sum_b 2^(m_b - m) O_b / sum_b 2^(m_b - m) l_b, times the gate.
//
// The order is that of 32 sums side by side, segment b in sum b % 32, which are then added in order: it depends on the
// row's number of segments only, not on how many blocks and threads share the work.
#pragma once

#include "kernels/cuda/decode_attention.cuh"

namespace tokenspeed::kernels::cuda::decode_attention_parts {

constexpr int kSums = 32;
constexpr int kRowColumns = kHeadDim / 4;  // of four dims

struct MergeShared {
  float o[kThreads / 4 * kSums * 4];  // [sum][column][4] of up to 64 columns
  float2 greatest_sum[kSums];
};

// The rows of one sequence and KV head, row r is token r / group, head r % group.
struct MergeRows {
  int token_begin;
  int context;
  int kv_head;
  int count;

  __device__ int token(const AttentionParameters& p, int row) const { return token_begin + row / p.group; }
  __device__ int head(const AttentionParameters& p, int row) const { return kv_head * p.group + row % p.group; }
  __device__ int segments(const AttentionParameters& p, int row) const {
    return (context + row / p.group) / kSegment + 1;
  }
  // Of the row's results in segment 0; segments are stride(p) apart.
  __device__ int64_t at(const AttentionParameters& p, int row) const {
    return static_cast<int64_t>(token(p, row)) * p.query_heads + head(p, row);
  }
};

__device__ inline int64_t segment_stride(const AttentionParameters& p) {
  return static_cast<int64_t>(p.batch.tokens) * p.query_heads;
}

// Past L1, which may hold what an earlier launch wrote.
__device__ inline float2 load_greatest_sum(const AttentionParameters& p, int64_t at) {
  return __ldcg(p.greatest_sum + at);
}
__device__ inline float4 load_partial(const AttentionParameters& p, int64_t at, int column) {
  return __ldcg(reinterpret_cast<const float4*>(p.partial + at * kHeadDim) + column);
}

__device__ inline void scale_add(float4& sum, float weight, const float4& v) {
  sum.x = fmaf(weight, v.x, sum.x);
  sum.y = fmaf(weight, v.y, sum.y);
  sum.z = fmaf(weight, v.z, sum.z);
  sum.w = fmaf(weight, v.w, sum.w);
}

__device__ inline float gated(float sum, float total, float gate) { return sum / total * sigmoid(gate); }
__device__ inline const bf16* gates_of(const AttentionParameters& p, int token, int head) {
  return p.q_gate + token * p.q_gate_stride + head * 2 * kHeadDim + kHeadDim;
}

// Few segments: a thread has a column and adds all.
__device__ inline void merge_few(const AttentionParameters& p, const MergeRows& rows, int merger, int mergers) {
  for (int i = merger * kThreads + static_cast<int>(threadIdx.x); i < rows.count * kRowColumns;
       i += mergers * kThreads) {
    const int row = i / kRowColumns;
    const int column = i % kRowColumns;
    const int segments = rows.segments(p, row);
    const int64_t at = rows.at(p, row);
    float greatest = -INFINITY;
#pragma unroll 8
    for (int b = 0; b < segments; ++b) greatest = fmaxf(greatest, load_greatest_sum(p, at + b * segment_stride(p)).x);
    float4 o = {};
    float total = 0;
#pragma unroll 8
    for (int b = 0; b < segments; ++b) {
      const float2 ml = load_greatest_sum(p, at + b * segment_stride(p));
      const float weight = power_of_two(ml.x - greatest);
      total = fmaf(weight, ml.y, total);
      scale_add(o, weight, load_partial(p, at + b * segment_stride(p), column));
    }
    const int token = rows.token(p, row);
    const int head = rows.head(p, row);
    const int dim = column * 4;
    const uint2 gates = *reinterpret_cast<const uint2*>(gates_of(p, token, head) + dim);
    *reinterpret_cast<uint2*>(p.out + token * p.out_stride + head * kHeadDim + dim) = {
        pack_bf16(gated(o.x, total, bf16_low(gates.x)), gated(o.y, total, bf16_high(gates.x))),
        pack_bf16(gated(o.z, total, bf16_low(gates.y)), gated(o.w, total, bf16_high(gates.y)))};
  }
}

// kSplit threads share a column; a pass is kThreads / kSplit columns of one row.
template <int kSplit>
__device__ inline void merge_many(const AttentionParameters& p, const MergeRows& rows, MergeShared& s, int merger,
                                  int mergers) {
  constexpr int kColumns = kThreads / kSplit;
  static_assert(kColumns <= kRowColumns && kSplit <= kSums);
  const int thread = threadIdx.x;
  const int column = thread % kColumns;
  const int64_t stride = segment_stride(p);
  for (int pass = merger; pass < rows.count * (kRowColumns / kColumns); pass += mergers) {
    const int row = pass / (kRowColumns / kColumns);
    const int first_column = pass % (kRowColumns / kColumns) * kColumns;
    const int segments = rows.segments(p, row);
    const int sums = min(segments, kSums);
    const int64_t at = rows.at(p, row);
    for (int sum = thread / kColumns; sum < sums; sum += kSplit) {
      float2 ml = load_greatest_sum(p, at + sum * stride);
      float4 o = load_partial(p, at + sum * stride, first_column + column);
#pragma unroll 4
      for (int b = sum + kSums; b < segments; b += kSums) {
        const float2 other = load_greatest_sum(p, at + b * stride);
        const float4 v = load_partial(p, at + b * stride, first_column + column);
        const float greatest = fmaxf(ml.x, other.x);
        const float old_weight = power_of_two(ml.x - greatest);
        const float weight = power_of_two(other.x - greatest);
        ml = {greatest, fmaf(weight, other.y, old_weight * ml.y)};
        o = {old_weight * o.x, old_weight * o.y, old_weight * o.z, old_weight * o.w};
        scale_add(o, weight, v);
      }
      *reinterpret_cast<float4*>(&s.o[(sum * kColumns + column) * 4]) = o;
      if (column == 0) s.greatest_sum[sum] = ml;
    }
    __syncthreads();
    if (thread < kColumns * 4) {
      float greatest = -INFINITY;
      for (int sum = 0; sum < sums; ++sum) greatest = fmaxf(greatest, s.greatest_sum[sum].x);
      float total = 0;
      float o = 0;
#pragma unroll 8
      for (int sum = 0; sum < sums; ++sum) {
        const float2 ml = s.greatest_sum[sum];
        const float weight = power_of_two(ml.x - greatest);
        total = fmaf(weight, ml.y, total);
        o = fmaf(weight, s.o[sum * kColumns * 4 + thread], o);
      }
      const int token = rows.token(p, row);
      const int head = rows.head(p, row);
      const int dim = first_column * 4 + thread;
      p.out[token * p.out_stride + head * kHeadDim + dim] =
          __float2bfloat16_rn(gated(o, total, __bfloat162float(gates_of(p, token, head)[dim])));
    }
    __syncthreads();
  }
}

__device__ inline void merge_segments(const AttentionParameters& p, const MergeRows& rows, MergeShared& s, int merger,
                                      int mergers, int segments) {
  if (segments <= 8) {
    merge_few(p, rows, merger, mergers);
  } else if (segments <= kSums) {
    merge_many<4>(p, rows, s, merger, mergers);
  } else {
    merge_many<kSums>(p, rows, s, merger, mergers);
  }
}

}  // namespace tokenspeed::kernels::cuda::decode_attention_parts
