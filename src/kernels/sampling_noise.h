// The random part of sampling, shared by every CPU implementation so that they draw the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/random.h"

namespace tokenspeed::kernels {

// gumbel(id) of sampling.h, in double: u needs 25 bits and must never round to 1.
inline double gumbel_noise(uint64_t seed, int64_t position, int32_t id) {
  const uint32_t word = philox(seed, static_cast<uint64_t>(position), static_cast<uint64_t>(id))[0];
  const double u = (static_cast<double>(word >> 8) + 0.5) * 0x1.0p-24;
  return -std::log(-std::log(u));
}

}  // namespace tokenspeed::kernels
