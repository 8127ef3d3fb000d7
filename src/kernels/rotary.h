// The rotary angles of the family, shared by every CPU implementation so that they turn by the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/elements.h"

namespace tokenspeed::kernels {

struct Rotation {
  float cosine = 1;
  float sine = 0;
};

// theta^(-2 pair / rotary_dim) in float32, as the model computes it: 1 / theta^(2 pair / rotary_dim).
inline float rotary_frequency(const AttentionShape& shape, int64_t pair) {
  const float exponent = static_cast<float>(2 * pair) / static_cast<float>(shape.rotary_dim);
  return 1.0f / static_cast<float>(std::pow(static_cast<double>(shape.rope_theta), static_cast<double>(exponent)));
}

// Rounded to the dtype of the rows that turn.
inline Rotation rotation(float frequency, int32_t position, DType dtype) {
  const float angle = static_cast<float>(position) * frequency;
  return {round_to(dtype, std::cos(angle)), round_to(dtype, std::sin(angle))};
}

}  // namespace tokenspeed::kernels
