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
        {{{us(0.00), us(0.315), 0.92, 1}, {us(0.17), us(0), 0.48, 1}, {us(1.25), us(0.063), 1, 1}, {us(1.47), us(0.253), 0.96, 1}, {us(5.59), us(0.559), 0.04, 1}}},  // few
        {{{us(0.16), us(0), 0.32, 1}, {us(2.51), us(0), 0.81, 1}, {us(2.15), us(0), 0.51, 1}, {us(0.16), us(0), 0.83, 1}, {us(8.58), us(0.236), 0.06, 1}}},  // some
        {{{us(2.15), us(0), 0.37, 0.41}, {us(8.45), us(0), 0.15, 1}, {us(6.94), us(0), 0.31, 0.62}, {us(115.77), us(0), 0.99, 0.3}, {us(2.15), us(0), 0.77, 1}}},  // many
    }},
    .step_seconds = {us(9), us(31), us(10)},
};
// clang-format on

}  // namespace tokenspeed::compile
