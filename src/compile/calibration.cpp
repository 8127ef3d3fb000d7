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
        {{{us(0.00), us(0.397), 1, 1}, {us(0.00), us(0), 0.48, 1}, {us(0.35), us(0.221), 1, 1}, {us(1.34), us(0.073), 0.99, 1}, {us(5.47), us(0.547), 0.04, 1}}},  // few
        {{{us(0.00), us(0), 0.32, 1}, {us(2.01), us(0), 0.78, 1}, {us(1.66), us(0), 0.49, 1}, {us(0.00), us(0), 0.82, 1}, {us(7.36), us(0.243), 0.06, 1}}},  // some
        {{{us(4.98), us(0), 0.92, 0.41}, {us(8.76), us(0), 0.15, 1}, {us(7.27), us(0), 0.31, 0.64}, {us(2.61), us(0), 0.61, 0.26}, {us(2.61), us(0), 0.76, 1}}},  // many
    }},
    .step_seconds = {us(8), us(31), us(10)},
};
// clang-format on

}  // namespace tokenspeed::compile
