// Element types of tensors and their conversions to float. Conversions are exact towards float32 and round to nearest
// even from it (NaN stays NaN).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tokenspeed {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kInt32, kInt64, kUInt8 };

constexpr size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt64:
      return 8;
    case DType::kFloat8E4M3:
    case DType::kUInt8:
      return 1;
  }
  return 0;
}

constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3:
      return "float8_e4m3";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUInt8:
      return "uint8";
  }
  return "?";
}

// bfloat16 is the upper half of a float32.
struct BFloat16 {
  uint16_t bits = 0;
};
static_assert(sizeof(BFloat16) == 2, "tensors of BFloat16 are raw 16-bit arrays");

inline float to_float(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(float value) { return value; }

inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
// The value after a round trip through bfloat16: the model's own rounding of activations.
inline float round_to_bfloat16(float value) { return to_float(to_bfloat16(value)); }

// IEEE half and FP8 E4M3 (bias 7, no infinities, 0x7f/0xff NaN), exact.
float float16_to_float(uint16_t bits);
float float8_e4m3_to_float(uint8_t bits);
// Nearest even, saturating at 448.
uint8_t float_to_float8_e4m3(float value);

}  // namespace tokenspeed
