#include "base/dtype.h"

#include <cmath>
#include <limits>

namespace tokenspeed {

float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

float float8_e4m3_to_float(uint8_t bits) {
  const uint32_t exponent = (bits >> 3) & 0xfu;
  const uint32_t mantissa = bits & 7u;
  float magnitude = 0;
  if (exponent == 15 && mantissa == 7) {
    magnitude = std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -9);
  } else {
    magnitude = std::ldexp(static_cast<float>(8 + mantissa), static_cast<int>(exponent) - 10);
  }
  return (bits & 0x80u) ? -magnitude : magnitude;
}

uint8_t float_to_float8_e4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return sign | 0x7f;
  const float magnitude = std::fabs(value);
  if (magnitude >= 448.0f) return sign | 0x7e;
  if (magnitude == 0.0f) return sign;  // frexp gives zero the exponent of 0.5
  int exponent = 0;
  std::frexp(magnitude, &exponent);                    // magnitude = f * 2^exponent, f in [0.5, 1)
  const int unit = exponent < -5 ? -9 : exponent - 4;  // weight of the last mantissa bit
  const float steps = std::nearbyint(std::ldexp(magnitude, -unit));
  const int count = static_cast<int>(steps);                  // 0..16
  if (unit == -9) return sign | static_cast<uint8_t>(count);  // subnormals and the first binade share one spacing
  // count is 8..16; 16 carries into the next exponent by plain addition.
  return sign | static_cast<uint8_t>(((unit + 10) << 3) + (count - 8));
}

}  // namespace tokenspeed
