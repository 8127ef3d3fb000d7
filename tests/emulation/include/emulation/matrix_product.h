// The tensor core's product of a warp (mma.sync m16n8k16, fp32 accumulators) and conversions of its operands.
#pragma once

#include <cstdint>

#include "emulation/machine.h"

namespace tokenspeed::emulation {

// d[16x8] += a[16x16] b[16x8]; kernels/cuda/tensor_core.cuh says who holds what.
void multiply_add_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place place);
void multiply_add_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place place);

// Two FP8 E4M3 values as two float16, exact.
uint32_t fp8_pair_to_f16(uint32_t pair);

}  // namespace tokenspeed::emulation
