#include "kernels/cuda/device.cuh"
#include "kernels/cuda/norm.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostPieces = 8;  // 16,384 columns

__device__ inline void load_floats8(const float* p, float out[8]) {
  const float4 low = reinterpret_cast<const float4*>(p)[0];
  const float4 high = reinterpret_cast<const float4*>(p)[1];
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

// One block per row, which stays in registers: kPieces runs of 8 columns a thread. The sum runs over fixed columns per
// thread, so a row's bits do not depend on the others.
template <int kPieces>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(bf16* x, int64_t x_stride, const bf16* add, int64_t add_stride, const float* weight, int columns,
                    float epsilon, bf16* out, int64_t out_stride) {
  bf16* row = x + blockIdx.x * x_stride;
  const bf16* add_row = add ? add + blockIdx.x * add_stride : nullptr;
  bf16* out_row = out + blockIdx.x * out_stride;
  float v[kPieces][8] = {};
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int c = (p * kThreads + static_cast<int>(threadIdx.x)) * 8;
    if (c >= columns) continue;
    load8(row + c, v[p]);
    if (add_row) {
      float a[8];
      load8(add_row + c, a);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[p][i] = __bfloat162float(__float2bfloat16(v[p][i] + a[i]));
      store8(row + c, v[p]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += v[p][i] * v[p][i];
  }
  const float scale = rsqrtf(block_sum<kThreads>(squares) / columns + epsilon);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int c = (p * kThreads + static_cast<int>(threadIdx.x)) * 8;
    if (c >= columns) continue;
    float w[8];
    load_floats8(weight + c, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[p][i] *= scale * (1.0f + w[i]);
    store8(out_row + c, v[p]);
  }
}

// columns / 8 lanes per head of a token; columns a power of two from 32 to 256.
template <bool kGated>
__global__ void head_norm_kernel(const bf16* x, int64_t x_stride, const bf16* z, int64_t z_stride, const float* weight,
                                 int64_t tokens, int heads, int columns, int64_t head_stride, float epsilon, bf16* out,
                                 int64_t out_stride) {
  const int lanes = columns / 8;
  const uint32_t wanted = (blockIdx.x * uint32_t{kThreads} + threadIdx.x) / lanes;
  const uint32_t index = min(wanted, static_cast<uint32_t>(tokens * heads - 1));
  const int64_t token = index / heads;
  const int64_t at = index % heads * head_stride;
  const int c = static_cast<int>(threadIdx.x) % lanes * 8;
  float v[8] = {};
  load8(x + token * x_stride + at + c, v);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
  for (int offset = lanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
  const float scale = rsqrtf(squares / columns + epsilon);
  if (wanted != index) return;
  float w[8];
  load_floats8(weight + c, w);
  if constexpr (kGated) {
    float gate[8];
    load8(z + token * z_stride + at + c, gate);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = w[i] * (v[i] * scale) * silu(gate[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale * (1.0f + w[i]);
  }
  store8(out + token * out_stride + at + c, v);
}

}  // namespace

void rms_norm(const RmsNorm& args, cudaStream_t stream) {
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(args.rows), kThreads, 0, stream>>>(
        static_cast<bf16*>(args.x.data), args.x.stride, static_cast<const bf16*>(args.add.data), args.add.stride,
        args.weight, static_cast<int>(args.columns), args.epsilon, static_cast<bf16*>(args.out.data), args.out.stride);
  };
  switch (ceil_div(args.columns, kThreads * 8)) {
    case 1:
      return launch(rms_norm_kernel<1>);
    case 2:
      return launch(rms_norm_kernel<2>);
    case 3:
      return launch(rms_norm_kernel<3>);
    default:
      return launch(rms_norm_kernel<kMostPieces>);
  }
}

void gated_rms_norm(const GatedRmsNorm& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(args.tokens * args.heads * args.columns / 8, kThreads));
  head_norm_kernel<true><<<blocks, kThreads, 0, stream>>>(
      static_cast<const bf16*>(args.x.data), args.x.stride, static_cast<const bf16*>(args.z.data), args.z.stride,
      args.weight, args.tokens, static_cast<int>(args.heads), static_cast<int>(args.columns), args.columns,
      args.epsilon, static_cast<bf16*>(args.out.data), args.out.stride);
}

void head_rms_norm(const HeadRmsNorm& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(args.tokens * args.heads * args.columns / 8, kThreads));
  head_norm_kernel<false>
      <<<blocks, kThreads, 0, stream>>>(static_cast<const bf16*>(args.x.data), args.x.stride, nullptr, 0, args.weight,
                                        args.tokens, static_cast<int>(args.heads), static_cast<int>(args.columns),
                                        args.head_stride, args.epsilon, static_cast<bf16*>(args.x.data), args.x.stride);
}

}  // namespace tokenspeed::kernels::cuda
