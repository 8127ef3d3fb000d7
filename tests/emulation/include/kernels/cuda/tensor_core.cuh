// In place of kernels/cuda/tensor_core.cuh: what the kernels that the machine runs use of it.
#pragma once

#include <cstdint>

#include "emulation/matrix_product.h"
#include "kernels/cuda/device.cuh"

namespace tokenspeed::kernels::cuda {

inline uint32_t shared_address(const void* p) { return emulation::shared_address(p); }

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         emulation::Place place = emulation::Place::current()) {
  emulation::multiply_add_bf16(d, a, b0, b1, place);
}
inline void multiply_add_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              emulation::Place place = emulation::Place::current()) {
  emulation::multiply_add_f16(d, a, b0, b1, place);
}

inline uint32_t pack_bf16(float low, float high) {
  return std::bit_cast<uint32_t>(__nv_bfloat162_raw(__floats2bfloat162_rn(low, high)));
}

}  // namespace tokenspeed::kernels::cuda
