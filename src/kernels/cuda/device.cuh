// Small device-side pieces shared by the many-token kernels: vectors of eight bfloat16, reductions, launch arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace tokenspeed::kernels::cuda {

using bf16 = __nv_bfloat16;
inline constexpr int kWarp = 32;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct alignas(16) Bf16x8 {
  bf16 v[8];
};
static_assert(sizeof(Bf16x8) == 16, "one 16-byte access");

// Eight consecutive elements at p, which is 16-byte aligned.
__device__ inline void load8(const bf16* p, float out[8]) {
  const Bf16x8 x = *reinterpret_cast<const Bf16x8*>(p);
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = __bfloat162float(x.v[i]);
}
__device__ inline void store8(bf16* p, const float in[8]) {
  Bf16x8 x;
#pragma unroll
  for (int i = 0; i < 8; ++i) x.v[i] = __float2bfloat16(in[i]);
  *reinterpret_cast<Bf16x8*>(p) = x;
}

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Every thread gets the sum over the block's kThreads threads; all of them must call.
template <int kThreads>
__device__ inline float block_sum(float x) {
  __shared__ float partial[kThreads / kWarp];
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) sum += partial[i];
  __syncthreads();
  return sum;
}

}  // namespace tokenspeed::kernels::cuda
