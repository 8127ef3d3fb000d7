// In place of kernels/cuda/common.cuh: what the kernels that the machine runs use of it.
#pragma once

#include <cstdint>

#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda {

// Launches run one after the other.
inline void wait_for_predecessor() {}
inline void allow_successor() {}

inline const void* as_memory(const void* parameter) { return parameter; }

inline uint4 load16_shared(uint32_t address, emulation::Place place = emulation::Place::current()) {
  if (address % 16 != 0) emulation::fail("a load of 16 bytes that is not aligned", place);
  uint4 value;
  std::memcpy(&value, emulation::at_shared(address, sizeof(value), place), sizeof(value));
  return value;
}

inline float warp_max(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

inline float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
inline float round_bf16(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

inline uint32_t pack_f16(float low, float high) {
  return std::bit_cast<uint32_t>(__half2_raw(__floats2half2_rn(low, high)));
}
inline void fp8_to_f16(uint32_t word, uint32_t& low, uint32_t& high) {
  low = emulation::fp8_pair_to_f16(word & 0xffff);
  high = emulation::fp8_pair_to_f16(word >> 16);
}

template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}

inline uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace tokenspeed::kernels::cuda
