// Conversions between the FP8 (e4m3, unscaled) of KV pages and what the attention kernels compute with. All but those
// towards FP8 are exact; those round to nearest even and saturate at 448, NaN stays NaN.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda {

// Two FP8 values (the low or high half of a word) as float16.
__device__ __forceinline__ uint32_t half_pair(uint32_t word, bool high) {
#if __CUDA_ARCH__ >= 890
  uint32_t pair;
  if (high) {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.rn.f16x2.e4m3x2 %0, b;}" : "=r"(pair) : "r"(word));
  } else {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.rn.f16x2.e4m3x2 %0, a;}" : "=r"(pair) : "r"(word));
  }
  return pair;
#else
  const uint16_t two = static_cast<uint16_t>(high ? word >> 16 : word);
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3);
  return pair.x | static_cast<uint32_t>(pair.y) << 16;
#endif
}
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 halves = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&halves);
}
// A pair of bfloat16 as float16: normed queries are in its range.
__device__ __forceinline__ uint32_t half_from_bf16(uint32_t pair) {
  return pack_half(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ __forceinline__ uint32_t bf16_from_half(uint32_t pair) {
  const float2 wide = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  return pack_bf16(wide.x, wide.y);
}
// Eight FP8 values as bfloat16.
__device__ __forceinline__ uint4 bf16_from_fp8(const uint2& raw) {
  return {bf16_from_half(half_pair(raw.x, false)), bf16_from_half(half_pair(raw.x, true)),
          bf16_from_half(half_pair(raw.y, false)), bf16_from_half(half_pair(raw.y, true))};
}

__device__ __forceinline__ uint32_t fp8_from_bf16(uint32_t pair) {
  const float2 wide = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
#if __CUDA_ARCH__ >= 890
  uint16_t two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(wide.y), "f"(wide.x));
  return two;
#else
  return __nv_cvt_float2_to_fp8x2(wide, __NV_SATFINITE, __NV_E4M3);
#endif
}
__device__ __forceinline__ uint2 fp8_from_bf16(const uint4& pairs) {
  return {fp8_from_bf16(pairs.x) | fp8_from_bf16(pairs.y) << 16, fp8_from_bf16(pairs.z) | fp8_from_bf16(pairs.w) << 16};
}

}  // namespace tokenspeed::kernels::cuda
