// Adds the segments of decode_attention's rows: out = sum_b 2^(m_b - m) O_b / sum_b 2^(m_b - m) l_b, times the gate.
//
// The order is that of 32 sums side by side, segment b in sum b % 32, which are then added in order: it depends on the
// row's number of segments only, not on how many blocks and threads share the work. All loads of a row are on their way
// before the first is needed (of more than 128 segments: 128 at a time); for segments that are not there the loads give
// what adds nothing.
#pragma once

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/decode_attention.cuh"

namespace tokenspeed::kernels::cuda::decode_attention_parts {

constexpr int kFewSegments = 8;
constexpr int kSums = 32;
constexpr int kRowColumns = kHeadDim / 4;       // of four dims
constexpr int kPassColumns = kThreads / kSums;  // of a row, when there are more segments than sums

struct MergeShared {
  float o[kSums][kPassColumns * 4];
  float2 greatest_sum[kSums];
};

// The rows of one sequence and KV head, row r is token r / group, head r % group.
struct MergeRows {
  int token_begin;
  int context;
  int kv_head;
  int count;
  int segment;  // keys

  __device__ int token(const AttentionParameters& p, int row) const { return token_begin + p.token_of(row); }
  __device__ int head(const AttentionParameters& p, int row) const {
    return kv_head * p.group + row - p.token_of(row) * p.group;
  }
  __device__ int segments(const AttentionParameters& p, int row) const {
    return (context + p.token_of(row)) / segment + 1;
  }
  // Of the row's results in segment 0; segments are stride(p) apart.
  __device__ int64_t at(const AttentionParameters& p, int row) const {
    return static_cast<int64_t>(token(p, row)) * p.query_heads + head(p, row);
  }
};

__device__ inline int64_t segment_stride(const AttentionParameters& p) {
  return static_cast<int64_t>(p.batch.tokens) * p.query_heads;
}

// m and l, and dims 4 column .. 4 column + 3 of O. Past L1, which may hold what an earlier launch wrote.
__device__ inline float2 load_greatest_sum(const AttentionParameters& p, int64_t at, bool there) {
  return there ? __ldcg(p.greatest_sum + at) : float2{-INFINITY, 0};
}
__device__ inline float4 load_partial(const AttentionParameters& p, int64_t at, int column, bool there) {
  return there ? __ldcg(reinterpret_cast<const float4*>(p.partial + at * kHeadDim) + column) : float4{};
}

__device__ inline void scale_add(float4& sum, float weight, const float4& v) {
  sum.x = fmaf(weight, v.x, sum.x);
  sum.y = fmaf(weight, v.y, sum.y);
  sum.z = fmaf(weight, v.z, sum.z);
  sum.w = fmaf(weight, v.w, sum.w);
}

__device__ inline float gated(float sum, float inverse_total, float gate) {
  constexpr float kLog2E = 1.4426950408889634f;
  return sum * inverse_total * reciprocal(1.0f + power_of_two(-kLog2E * gate));
}
// Four dims of a row, divided by its l.
__device__ inline uint2 gated_columns(const float4& sum, float inverse_total, const uint2& gates) {
  return {pack_bf16(gated(sum.x, inverse_total, bf16_low(gates.x)), gated(sum.y, inverse_total, bf16_high(gates.x))),
          pack_bf16(gated(sum.z, inverse_total, bf16_low(gates.y)), gated(sum.w, inverse_total, bf16_high(gates.y)))};
}
__device__ inline const bf16* queries_of(const AttentionParameters& p, int token, int head) {
  return p.q_gate + token * p.q_gate_stride + head * 2 * kHeadDim;
}
__device__ inline const bf16* gates_of(const AttentionParameters& p, int token, int head) {
  return queries_of(p, token, head) + kHeadDim;
}
__device__ inline bf16* out_of(const AttentionParameters& p, int token, int head) {
  return p.out + token * p.out_stride + head * kHeadDim;
}

// At most kFewSegments: a thread has a column.
__device__ inline void merge_few(const AttentionParameters& p, const MergeRows& rows, int merger, int mergers) {
  const int64_t stride = segment_stride(p);
#pragma unroll 1
  for (int i = merger * kThreads + static_cast<int>(threadIdx.x); i < rows.count * kRowColumns;
       i += mergers * kThreads) {
    const int row = i / kRowColumns;
    const int column = i % kRowColumns;
    const int segments = rows.segments(p, row);
    const int64_t at = rows.at(p, row);
    const int token = rows.token(p, row);
    const int head = rows.head(p, row);
    const uint2 gates = *reinterpret_cast<const uint2*>(gates_of(p, token, head) + column * 4);
    float2 ml[kFewSegments];
    float4 v[kFewSegments];
#pragma unroll
    for (int b = 0; b < kFewSegments; ++b) {
      ml[b] = load_greatest_sum(p, at + b * stride, b < segments);
      v[b] = load_partial(p, at + b * stride, column, b < segments);
    }
    float greatest = ml[0].x;
#pragma unroll
    for (int b = 1; b < kFewSegments; ++b) greatest = fmaxf(greatest, ml[b].x);
    float4 o = {};
    float total = 0;
#pragma unroll
    for (int b = 0; b < kFewSegments; ++b) {
      const float weight = power_of_two(ml[b].x - greatest);
      total = fmaf(weight, ml[b].y, total);
      scale_add(o, weight, v[b]);
    }
    *reinterpret_cast<uint2*>(out_of(p, token, head) + column * 4) = gated_columns(o, reciprocal(total), gates);
  }
}

// The block's barrier counts what every segment's block will send of its rows.
__device__ inline void prepare_to_receive(ReceivedRows& received, int segments, int rows) {
  if (threadIdx.x != 0) return;
  const int own = min(max(rows - static_cast<int>(blockIdx.x) * kReceivedRows, 0), kReceivedRows);
  const uint32_t full = shared_address(&received.full);
  barrier_init(full, 1);
  publish_barriers();
  barrier_arrive_expecting(full, segments * own * (kHeadDim * sizeof(float) + sizeof(float2)));
}
// Four dims of a row that this thread adds, of the segments that the block receives; the sums are those of merge_few().
struct MergedColumns {
  static_assert(kClusterBlocks <= kFewSegments);
  int segments = 0;  // none: the block does not receive the row
  int dim;
  uint2 gates;
  bf16* out;

  static __device__ int place() { return static_cast<int>(threadIdx.x) / kRowColumns; }
  // Asks for the gates.
  __device__ void find(const AttentionParameters& p, const MergeRows& rows) {
    static_assert(kReceivedRows * kRowColumns == kThreads);
    const int row = static_cast<int>(blockIdx.x) * kReceivedRows + place();
    if (blockIdx.x >= kReceivers || row >= rows.count) return;
    const int token = rows.token(p, row);
    const int head = rows.head(p, row);
    segments = rows.segments(p, row);
    dim = static_cast<int>(threadIdx.x) % kRowColumns * 4;
    gates = *reinterpret_cast<const uint2*>(gates_of(p, token, head) + dim);
    out = out_of(p, token, head) + dim;
  }
  // The lanes of a warp have the same row.
  __device__ void add(const ReceivedRows& received) const {
    const int lane = threadIdx.x % kWarp;
    float2 ml = {-INFINITY, 0};
    if (lane < segments) ml = received.greatest_sum[lane][place()];
    const float weight = power_of_two(ml.x - warp_max(ml.x));
    float total = 0;
    float4 sum = {};
#pragma unroll 1
    for (int b = 0; b < segments; ++b) {
      const float other = __shfl_sync(~0u, weight, b);
      total = fmaf(other, __shfl_sync(~0u, ml.y, b), total);
      scale_add(sum, other, *reinterpret_cast<const float4*>(&received.o[b][place()][dim]));
    }
    *reinterpret_cast<uint2*>(out) = gated_columns(sum, reciprocal(total), gates);
  }
};

// At most kSums: a block has a row, a thread a dim; a lane has a segment's m and l.
__device__ inline void merge_some(const AttentionParameters& p, const MergeRows& rows, int merger, int mergers) {
  static_assert(kThreads == kHeadDim && kSums == kWarp);
  const int dim = threadIdx.x;
  const int lane = dim % kWarp;
  const int64_t stride = segment_stride(p);
#pragma unroll 1
  for (int row = merger; row < rows.count; row += mergers) {
    const int segments = rows.segments(p, row);
    const int64_t at = rows.at(p, row);
    const int token = rows.token(p, row);
    const int head = rows.head(p, row);
    const float gate = __bfloat162float(gates_of(p, token, head)[dim]);
    const float2 ml = load_greatest_sum(p, at + lane * stride, lane < segments);
    const float* from = p.partial + at * kHeadDim + dim;
    float v[kSums];
#pragma unroll
    for (int b = 0; b < kSums; ++b) {
      v[b] = b < segments ? __ldcg(from) : 0.0f;
      from += stride * kHeadDim;
    }
    const float weight = power_of_two(ml.x - warp_max(ml.x));
    float total = 0;
    float o = 0;
#pragma unroll
    for (int b = 0; b < kSums; ++b) {
      const float other = __shfl_sync(~0u, weight, b);
      total = fmaf(other, __shfl_sync(~0u, ml.y, b), total);
      o = fmaf(other, v[b], o);
    }
    out_of(p, token, head)[dim] = __float2bfloat16_rn(gated(o, reciprocal(total), gate));
  }
}

// Any number: a pass is kPassColumns columns of a row, a thread has one of the sums of one.
__device__ inline void merge_many(const AttentionParameters& p, const MergeRows& rows, MergeShared& s, int merger,
                                  int mergers) {
  constexpr int kAtOnce = 4;
  constexpr int kPasses = kRowColumns / kPassColumns;
  const int thread = threadIdx.x;
  const int sum = thread / kPassColumns;
  const int column = thread % kPassColumns;
  const int64_t stride = segment_stride(p);
#pragma unroll 1
  for (int pass = merger; pass < rows.count * kPasses; pass += mergers) {
    const int row = pass / kPasses;
    const int first_column = pass % kPasses * kPassColumns;
    const int segments = rows.segments(p, row);
    const int64_t at = rows.at(p, row);
    const int token = rows.token(p, row);
    const int head = rows.head(p, row);
    const int dim = first_column * 4 + thread % (kPassColumns * 4);
    const float gate = __bfloat162float(gates_of(p, token, head)[dim]);
    float2 ml = {-INFINITY, 0};
    float4 o = {};
#pragma unroll 1
    for (int first = sum; first < segments; first += kAtOnce * kSums) {
      float2 other[kAtOnce];
      float4 v[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int b = first + k * kSums;
        other[k] = load_greatest_sum(p, at + b * stride, b < segments);
        v[k] = load_partial(p, at + b * stride, first_column + column, b < segments);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const float greatest = fmaxf(ml.x, other[k].x);
        const float old_weight = power_of_two(ml.x - greatest);
        const float weight = power_of_two(other[k].x - greatest);
        ml = {greatest, fmaf(weight, other[k].y, old_weight * ml.y)};
        o = {old_weight * o.x, old_weight * o.y, old_weight * o.z, old_weight * o.w};
        scale_add(o, weight, v[k]);
      }
    }
    *reinterpret_cast<float4*>(&s.o[sum][column * 4]) = o;
    if (column == 0) s.greatest_sum[sum] = ml;
    __syncthreads();
    if (thread < kPassColumns * 4) {
      const int sums = min(segments, kSums);
      float greatest = -INFINITY;
      for (int i = 0; i < sums; ++i) greatest = fmaxf(greatest, s.greatest_sum[i].x);
      float total = 0;
      float sum_of_all = 0;
#pragma unroll 4
      for (int i = 0; i < sums; ++i) {
        const float2 each = s.greatest_sum[i];
        const float weight = power_of_two(each.x - greatest);
        total = fmaf(weight, each.y, total);
        sum_of_all = fmaf(weight, s.o[i][thread], sum_of_all);
      }
      out_of(p, token, head)[dim] = __float2bfloat16_rn(gated(sum_of_all, reciprocal(total), gate));
    }
    __syncthreads();
  }
}

__device__ inline void merge_segments(const AttentionParameters& p, const MergeRows& rows, MergeShared& s, int merger,
                                      int mergers, int segments) {
  if (segments <= kFewSegments) {
    merge_few(p, rows, merger, mergers);
  } else if (segments <= kSums) {
    merge_some(p, rows, merger, mergers);
  } else {
    merge_many(p, rows, s, merger, mergers);
  }
}

}  // namespace tokenspeed::kernels::cuda::decode_attention_parts
