// How far measured kernels stay behind a device's bandwidth and peak: constants of the cost model, fitted to
// `bench ops` by scripts/calibrate.py. An operation of a family takes
//   phases * (the device's operation_seconds + fixed_seconds + tokens * token_seconds)
//     + max(bytes / (bandwidth * bandwidth_share), FLOPs / (peak * flops_share)),
// with rates of its own for few, some and many tokens a step, which run on different kernels.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "compile/program.h"

namespace tokenspeed::compile {

enum class OpFamily : uint8_t { kProjection, kMixer, kAttention, kExperts, kElementwise };
inline constexpr int kOpFamilies = 5;
std::string_view family_name(OpFamily family);
OpFamily family_of(OpKind kind);

enum class TokenRegime : uint8_t { kFew, kSome, kMany };  // up to 8, up to 64, more
inline constexpr int kTokenRegimes = 3;
std::string_view regime_name(TokenRegime regime);
TokenRegime regime_of(int64_t tokens);

struct FamilyRate {
  double fixed_seconds = 0;  // per phase, over the least a dependent operation costs
  double token_seconds = 0;  // per phase and token of the step
  double bandwidth_share = 1;
  double flops_share = 1;
};

// The default is a device whose kernels reach its bandwidth and peak.
struct Calibration {
  std::array<std::array<FamilyRate, kOpFamilies>, kTokenRegimes> rates = {};
  std::array<double, kTokenRegimes> step_seconds = {};  // input, sampling, publishing: what is in no operation
  const FamilyRate& rate(TokenRegime regime, OpFamily family) const {
    return rates[static_cast<size_t>(regime)][static_cast<size_t>(family)];
  }
};

// Measured on an H200. Shares and fixed times are taken for other GPUs too, so their predictions scale by bandwidth
// and peak.
extern const Calibration kH200Calibration;

}  // namespace tokenspeed::compile
