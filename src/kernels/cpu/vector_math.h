// exp and the activations made of it, shared by all vector kernels so that a value's bits do not depend on the kernel.
// Include from files of one instruction set only (see vector.h).
#pragma once

#include "kernels/cpu/vector.h"

namespace tokenspeed::kernels::cpu {
namespace {

// Within 1.5 units in the last place; exp(0) is exactly 1, exp(-inf) 0, overflow inf, NaN stays NaN.
// exp(x) = 2^n exp(r), r = x - n ln 2 in [-ln2/2, ln2/2]; (exp(r) - 1 - r) / r^2 is a polynomial interpolated at
// Chebyshev nodes (relative error of exp 0.012 * 2^-24).
inline Vec exp(Vec x) {
  x = min(splat(90.0f), max(splat(-110.0f), x));
  const Vec n = round(x * splat(0x1.715476p+0f));
  const Vec r = fma(n, splat(-0x1.7f7d1cp-20f), fma(n, splat(-0x1.62e4p-1f), x));
  Vec p = fma(splat(0x1.a124f2p-13f), r, splat(0x1.6d4324p-10f));
  p = fma(p, r, splat(0x1.1110ep-7f));
  p = fma(p, r, splat(0x1.5554eap-5f));
  p = fma(p, r, splat(0x1.555556p-3f));
  p = fma(p, r, splat(0x1p-1f));
  return scale_by_power(fma(p, r * r, r) + splat(1.0f), n);
}

inline Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }
inline Vec silu(Vec x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }

}  // namespace
}  // namespace tokenspeed::kernels::cpu
