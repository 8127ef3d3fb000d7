// What the kernels for few tokens share beyond tensor_core.cuh: programmatic dependent launch, streaming copies, FP8
// conversion, order-preserving keys.
//
// The rule of dependent launch here: a kernel first starts what does not depend on its predecessor (weights), then
// calls wait_for_predecessor() in every block, then allow_successor(). So code before the wait may read what was
// written at least two launches earlier, and nothing is overwritten that an unfinished kernel still reads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda {

// Until every earlier kernel of the stream has finished and its writes are visible.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel of the stream may start its independent part.
__device__ __forceinline__ void allow_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The address of a part of a kernel's parameter, which the compiler does not know to be one: what the threads of a warp
// load from different places of a parameter is loaded one after the other.
__device__ __forceinline__ const void* as_memory(const void* parameter) {
  asm volatile("" : "+l"(parameter));
  return parameter;
}

// All threads of a cluster's blocks; what they wrote before arriving is seen after the wait.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// The same where nothing that was written is meant.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The address of this block's shared memory in the block of that rank.
__device__ __forceinline__ uint32_t on_rank(uint32_t shared, uint32_t rank) {
  uint32_t address = shared;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
#endif
  return address;
}

// 16 bytes global -> shared, past L1; the hint fetches the other half of the line, which a neighbour reads next.
__device__ __forceinline__ void copy16_streaming(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy4_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ uint4 load16_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// Within an ulp or two; results and operands below 2^-126 count as zero.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float round_bf16(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

// Four FP8 E4M3 values as two pairs of bfloat16, times 2^-120: the exponent and mantissa bits moved in place, exact
// also for subnormals. even = elements (0, 2), odd = (1, 3). 0x7f (NaN) is not kept: checkpoints hold none.
inline constexpr float kFp8Scale = 0x1p120f;
__device__ __forceinline__ void fp8_to_bf16(uint32_t word, uint32_t& even, uint32_t& odd) {
  const uint32_t up = word << 8;
  even = ((word & 0x007f007fu) << 4) | (up & 0x80008000u);
  odd = ((word >> 4) & 0x07f007f0u) | (word & 0x80008000u);
}

// Two floats as float16; four FP8 E4M3 values as two pairs of float16, exact.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ void fp8_to_f16(uint32_t word, uint32_t& low, uint32_t& high) {
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
      : "=r"(low), "=r"(high)
      : "r"(word));
}

// Registers of each thread of the four warps that call, fewer and more than the launch gave them.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Order-preserving map of floats that are not NaN to unsigned integers.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace tokenspeed::kernels::cuda
