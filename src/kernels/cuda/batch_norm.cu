// The end of one part of a layer and the beginning of the next: sum over experts, residual stream, norm. A block per
// row.
#include <string>

#include "kernels/cuda/batch.h"
#include "kernels/cuda/batch_tiles.cuh"
#include "kernels/cuda/common.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kNormThreads = 512;
constexpr int kMostPieces = 2;

__device__ inline void load_floats8(const float* p, float (&out)[8]) {
  *reinterpret_cast<float4*>(&out[0]) = __ldcg(reinterpret_cast<const float4*>(p));
  *reinterpret_cast<float4*>(&out[4]) = __ldcg(reinterpret_cast<const float4*>(p) + 1);
}

template <int kPieces, bool kExperts>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const __grid_constant__ BatchNorm a) {
  const int64_t row = blockIdx.x;
  const int columns = static_cast<int>(a.columns);
  const auto column = [](int piece) { return (piece * kNormThreads + static_cast<int>(threadIdx.x)) * 8; };
  float weight[kPieces][8];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (a.norm_weight != nullptr && column(i) < columns) load_floats8(a.norm_weight + column(i), weight[i]);
  }
  wait_for_predecessor();
  allow_successor();
  bf16* const x = static_cast<bf16*>(a.x.data) + row * a.x.stride;
  float v[kPieces][8] = {};
  float squares = 0;
  float gate = 0;
  if (kExperts && a.shared_gate_logit != nullptr) gate = sigmoid(a.shared_gate_logit[row * a.shared_gate_stride]);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (column(i) >= columns) continue;
    load8(x + column(i), v[i]);
    if constexpr (kExperts) {
      const int top_k = static_cast<int>(a.top_k);
      float sum[8] = {};
      const auto add = [&](int64_t result, float factor) {
        float piece[8];
        load_floats8(a.experts.results + result * columns + column(i), piece);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += factor * piece[j];
      };
#pragma unroll 4
      for (int e = 0; e < top_k; ++e) add(row * top_k + e, a.experts.weights[row * top_k + e]);
      if (a.shared_gate_logit != nullptr) add(a.rows * top_k + row, gate);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[i][j] = round_bf16(v[i][j] + sum[j]);
      store8(x + column(i), v[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += v[i][j] * v[i][j];
  }
  if (a.norm_weight == nullptr) return;
  const float scale = rsqrtf(block_sum<kNormThreads>(squares) / static_cast<float>(columns) + a.epsilon);
  bf16* const out = static_cast<bf16*>(a.out.data) + row * a.out.stride;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const bool inside = column(i) < columns;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[i][j] *= scale * (1.0f + weight[i][j]);
    const uint4 rounded = {pack_bf16(v[i][0], v[i][1]), pack_bf16(v[i][2], v[i][3]), pack_bf16(v[i][4], v[i][5]),
                           pack_bf16(v[i][6], v[i][7])};
    if (inside) *reinterpret_cast<uint4*>(out + column(i)) = rounded;
    if (a.split != nullptr)
      SplitRows(a.split, a.rows, columns).write(rounded, static_cast<int>(row), column(i) / 8, inside);
  }
}

constexpr int kSplitThreads = 256;

// A half warp per 128 columns of a row.
__global__ void __launch_bounds__(kSplitThreads)
    split_kernel(const bf16* x, int64_t stride, int rows, int columns, void* split) {
  wait_for_predecessor();
  allow_successor();
  const int index = static_cast<int>(blockIdx.x) * kSplitThreads + static_cast<int>(threadIdx.x);
  const int row = index / (columns / 8);
  const int piece = index % (columns / 8);
  uint4 raw = {};
  if (row < rows) raw = *reinterpret_cast<const uint4*>(x + row * stride + piece * 8);
  SplitRows(split, rows, columns).write(raw, row, piece, row < rows);
}

}  // namespace

Status batch_norm(const BatchNorm& args, const Launch& launch) {
  if (args.columns % 8 != 0 || args.columns < 8 || args.columns > kMostPieces * kNormThreads * 8) {
    return invalid_argument("batch_norm: columns are " + std::to_string(args.columns) +
                            ", they must be a multiple of 8 of at most 8192");
  }
  if (args.split != nullptr && args.columns % 128 != 0)
    return invalid_argument("batch_norm: split rows need columns in multiples of 128");
  const auto run = [&](auto* kernel) {
    return launch_kernel("batch_norm", launch, kernel, dim3(static_cast<unsigned>(args.rows)), kNormThreads, 0, 1,
                         args);
  };
  const bool wide = args.columns > kNormThreads * 8;
  if (args.experts.results != nullptr) return wide ? run(norm_kernel<2, true>) : run(norm_kernel<1, true>);
  return wide ? run(norm_kernel<2, false>) : run(norm_kernel<1, false>);
}

int64_t batch_split_bytes(int64_t rows, int64_t columns) { return SplitRows(nullptr, rows, columns).bytes(); }

Status batch_split(const Rows& x, int64_t rows, int64_t columns, void* split, const Launch& launch) {
  if (columns % 128 != 0) return invalid_argument("batch_split: columns must be a multiple of 128");
  return launch_kernel("batch_split", launch, split_kernel,
                       dim3(static_cast<unsigned>(ceil_div(rows * columns / 8, kSplitThreads))), kSplitThreads, 0, 1,
                       static_cast<const bf16*>(x.data), x.stride, static_cast<int>(rows), static_cast<int>(columns),
                       split);
}

}  // namespace tokenspeed::kernels::cuda
