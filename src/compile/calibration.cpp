#include "compile/calibration.h"

#include "compile/phases.h"

namespace tokenspeed::compile {
namespace {

constexpr int64_t kSomeTokens = 64;

constexpr double us(double microseconds) { return microseconds * 1e-6; }

}  // namespace

std::string_view family_name(OpFamily family) {
  constexpr std::array<std::string_view, kOpFamilies> kNames = {"projection", "mixer", "attention", "experts",
                                                                "elementwise"};
  return kNames[static_cast<size_t>(family)];
}

OpFamily family_of(OpKind kind) {
  switch (kind) {
    case OpKind::kLinear:
      return OpFamily::kProjection;
    case OpKind::kCausalConv:
    case OpKind::kGdnGates:
    case OpKind::kGdnL2Norm:
    case OpKind::kGatedDeltaRule:
    case OpKind::kGatedRmsNorm:
    case OpKind::kGdnMixer:
      return OpFamily::kMixer;
    case OpKind::kAttentionPrepare:
    case OpKind::kAttention:
      return OpFamily::kAttention;
    case OpKind::kExperts:
      return OpFamily::kExperts;
    default:
      return OpFamily::kElementwise;
  }
}

std::string_view regime_name(TokenRegime regime) {
  constexpr std::array<std::string_view, kTokenRegimes> kNames = {"few", "some", "many"};
  return kNames[static_cast<size_t>(regime)];
}

TokenRegime regime_of(int64_t tokens) {
  return tokens <= kMaxPhaseTokens ? TokenRegime::kFew
         : tokens <= kSomeTokens   ? TokenRegime::kSome
                                   : TokenRegime::kMany;
}

// What `scripts/calibrate.py bench/h200_ops.jsonl` prints; docs/performance.md says how to take the measurements anew.
// clang-format off
const Calibration kH200Calibration = {
    .rates = {{
        // fixed us, us per token, share of bandwidth, share of peak of: projection, mixer, attention, experts, elementwise
        {{{us(0.66), us(0.374), 0.64, 1}, {us(1.52), us(0.161), 0.42, 1}, {us(3.87), us(0.034), 0.77, 1}, {us(4.39), us(1.232), 1, 1}, {us(6.03), us(0.746), 1, 1}}},  // few
        {{{us(0.73), us(0), 0.32, 1}, {us(3.08), us(0), 0.81, 1}, {us(3.73), us(0), 0.76, 1}, {us(0.73), us(0), 0.86, 1}, {us(8.67), us(0.222), 0.06, 1}}},  // some
        {{{us(5.04), us(0), 0.93, 0.41}, {us(18.81), us(0), 0.14, 1}, {us(7.41), us(0), 0.31, 0.62}, {us(2.62), us(0), 0.61, 0.26}, {us(2.62), us(0), 0.76, 1}}},  // many
    }},
    .step_seconds = {us(12), us(31), us(12)},
};
// clang-format on

}  // namespace tokenspeed::compile
