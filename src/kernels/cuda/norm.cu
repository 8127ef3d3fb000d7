#include "kernels/cuda/norm.h"

#include "kernels/cuda/device.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = 8;

// One block per row. The sum runs over fixed columns per thread, so a row's bits do not depend on the others.
__global__ void rms_norm_kernel(bf16* x, int64_t x_stride, const bf16* add, int64_t add_stride, const float* weight,
                                int columns, float epsilon, bf16* out, int64_t out_stride) {
  bf16* row = x + blockIdx.x * x_stride;
  const bf16* add_row = add ? add + blockIdx.x * add_stride : nullptr;
  bf16* out_row = out + blockIdx.x * out_stride;
  float squares = 0;
  for (int c = threadIdx.x * 8; c < columns; c += kThreads * 8) {
    float v[8];
    load8(row + c, v);
    if (add_row) {
      float a[8];
      load8(add_row + c, a);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = __bfloat162float(__float2bfloat16(v[i] + a[i]));
      store8(row + c, v);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
  }
  const float scale = rsqrtf(block_sum<kThreads>(squares) / columns + epsilon);
  for (int c = threadIdx.x * 8; c < columns; c += kThreads * 8) {
    float v[8];
    load8(row + c, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale * (1.0f + weight[c + i]);
    store8(out_row + c, v);
  }
}

// One warp per head of a token; columns <= 8 * 32.
template <bool kGated>
__global__ void head_norm_kernel(const bf16* x, int64_t x_stride, const bf16* z, int64_t z_stride, const float* weight,
                                 int64_t tokens, int heads, int columns, int64_t head_stride, float epsilon, bf16* out,
                                 int64_t out_stride) {
  const int64_t index = blockIdx.x * int64_t{kWarpsPerBlock} + threadIdx.x / kWarp;
  if (index >= tokens * heads) return;
  const int64_t token = index / heads;
  const int64_t at = index % heads * head_stride;
  const int c = static_cast<int>(threadIdx.x % kWarp) * 8;
  float v[8] = {};
  if (c < columns) load8(x + token * x_stride + at + c, v);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
  const float scale = rsqrtf(warp_sum(squares) / columns + epsilon);
  if (c >= columns) return;
  if constexpr (kGated) {
    float gate[8];
    load8(z + token * z_stride + at + c, gate);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = weight[c + i] * (v[i] * scale) * silu(gate[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale * (1.0f + weight[c + i]);
  }
  store8(out + token * out_stride + at + c, v);
}

}  // namespace

void rms_norm(const RmsNorm& args, cudaStream_t stream) {
  rms_norm_kernel<<<static_cast<unsigned>(args.rows), kThreads, 0, stream>>>(
      static_cast<bf16*>(args.x.data), args.x.stride, static_cast<const bf16*>(args.add.data), args.add.stride, args.weight,
      static_cast<int>(args.columns), args.epsilon, static_cast<bf16*>(args.out.data), args.out.stride);
}

void gated_rms_norm(const GatedRmsNorm& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(args.tokens * args.heads, kWarpsPerBlock));
  head_norm_kernel<true><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(
      static_cast<const bf16*>(args.x.data), args.x.stride, static_cast<const bf16*>(args.z.data), args.z.stride, args.weight,
      args.tokens, static_cast<int>(args.heads), static_cast<int>(args.columns), args.columns, args.epsilon,
      static_cast<bf16*>(args.out.data), args.out.stride);
}

void head_rms_norm(const HeadRmsNorm& args, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(args.tokens * args.heads, kWarpsPerBlock));
  head_norm_kernel<false><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(
      static_cast<const bf16*>(args.x.data), args.x.stride, nullptr, 0, args.weight, args.tokens,
      static_cast<int>(args.heads), static_cast<int>(args.columns), args.head_stride, args.epsilon,
      static_cast<bf16*>(args.x.data), args.x.stride);
}

}  // namespace tokenspeed::kernels::cuda
