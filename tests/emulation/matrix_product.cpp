#include "emulation/matrix_product.h"

#include <cuda_fp16.h>

#include <array>
#include <bit>
#include <vector>

namespace tokenspeed::emulation {
namespace {

constexpr int kRows = 16;
constexpr int kColumns = 8;
constexpr int kInner = 16;

struct Operands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

float from_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
float from_f16(uint32_t bits) {
  static const std::vector<float> all = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t i = 0; i < values.size(); ++i) {
      values[i] = __half2float(std::bit_cast<__half>(static_cast<uint16_t>(i)));
    }
    return values;
  }();
  return all[bits];
}

template <float (*kConvert)(uint32_t)>
void product(void* const* operands, unsigned) {
  float a[kRows][kInner];
  float b[kInner][kColumns];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Operands*>(operands[lane]);
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      const auto element = [i](uint32_t word) { return kConvert(word >> 16 * i & 0xffff); };
      a[group][pair + i] = element(own.a[0]);
      a[group + 8][pair + i] = element(own.a[1]);
      a[group][pair + 8 + i] = element(own.a[2]);
      a[group + 8][pair + 8 + i] = element(own.a[3]);
      b[pair + i][group] = element(own.b[0]);
      b[pair + 8 + i][group] = element(own.b[1]);
    }
  }
  float d[kRows][kColumns] = {};
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kInner; ++k) {
      for (int column = 0; column < kColumns; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const to = static_cast<const Operands*>(operands[lane])->d;
    for (int i = 0; i < 4; ++i) to[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void multiply_add_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place place) {
  Operands own = {d, a, {b0, b1}};
  meet("multiply_add", ~0u, &own, &product<from_bf16>, place);
}

void multiply_add_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Place place) {
  Operands own = {d, a, {b0, b1}};
  meet("multiply_add_half", ~0u, &own, &product<from_f16>, place);
}

uint32_t fp8_pair_to_f16(uint32_t pair) {
  static const std::array<uint16_t, 256> all = [] {
    std::array<uint16_t, 256> values;
    for (uint32_t code = 0; code < 256; ++code) {
      // The exponent's bias is 8 less than float16's; float16 holds the subnormals as such times 2^8.
      const float small = from_f16((code & 0x7f) << 7);
      const bool is_nan = (code & 0x7f) == 0x7f;
      const uint16_t bits = is_nan ? 0x7fff : std::bit_cast<uint16_t>(__float2half_rn(small * 256.0f));
      values[code] = static_cast<uint16_t>(bits | (code & 0x80) << 8);
    }
    return values;
  }();
  return all[pair & 0xff] | static_cast<uint32_t>(all[pair >> 8 & 0xff]) << 16;
}

}  // namespace tokenspeed::emulation
