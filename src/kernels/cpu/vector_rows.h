// Norms and elementwise loops over one row. Include from files of one instruction set only (see vector.h).
#pragma once

#include "kernels/cpu/vector_kernels.h"
#include "kernels/cpu/vector_math.h"

namespace tokenspeed::kernels::cpu {
namespace {

inline Vec load(Elements x, int64_t i, int64_t n) {
  if (x.is_bfloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + i;
    return n >= kLanes ? load(p) : load(p, n);
  }
  const float* p = static_cast<const float*>(x.data) + i;
  return n >= kLanes ? load(p) : load(p, n);
}

inline void store(Elements x, int64_t i, int64_t n, Vec value) {
  if (x.is_bfloat16) {
    uint16_t* p = static_cast<uint16_t*>(x.data) + i;
    n >= kLanes ? store(p, value) : store(p, value, n);
  } else {
    float* p = static_cast<float*>(x.data) + i;
    n >= kLanes ? store(p, value) : store(p, value, n);
  }
}

// Calls body(i, remaining) for each register of n elements; the last may be partial, its other lanes zero.
template <typename Body>
inline void for_each_vec(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, n - i);
}

// Four running sums: the order depends on n alone.
template <typename Term>
inline float sum_of(int64_t n, const Term& term) {
  Vec sums[4] = {splat(0), splat(0), splat(0), splat(0)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int64_t j = 0; j < 4; ++j) sums[j] = term(i + j * kLanes, kLanes, sums[j]);
  }
  for_each_vec(n - i, [&](int64_t j, int64_t left) { sums[0] = term(i + j, left, sums[0]); });
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline float sum_of_squares(Elements x, int64_t n) {
  return sum_of(n, [&](int64_t i, int64_t left, Vec sum) {
    const Vec value = load(x, i, left);
    return fma(value, value, sum);
  });
}

inline float inverse_root_mean_square(Elements x, int64_t n, float epsilon) {
  return 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + epsilon);
}

void convert(Elements from, int64_t n, Elements to) {
  for_each_vec(n, [&](int64_t i, int64_t left) { store(to, i, left, load(from, i, left)); });
}

void add(Elements a, Elements b, int64_t n, Elements out) {
  for_each_vec(n, [&](int64_t i, int64_t left) { store(out, i, left, load(a, i, left) + load(b, i, left)); });
}

void rms_norm(Elements x, const float* weight, float epsilon, int64_t n, Elements out) {
  const Vec scale = splat(inverse_root_mean_square(x, n, epsilon));
  for_each_vec(n, [&](int64_t i, int64_t left) {
    const Vec gain = splat(1.0f) + (left >= kLanes ? load(weight + i) : load(weight + i, left));
    store(out, i, left, load(x, i, left) * scale * gain);
  });
}

void gated_rms_norm(Elements x, Elements z, const float* weight, float epsilon, int64_t n, Elements out) {
  const Vec scale = splat(inverse_root_mean_square(x, n, epsilon));
  for_each_vec(n, [&](int64_t i, int64_t left) {
    const Vec gain = left >= kLanes ? load(weight + i) : load(weight + i, left);
    store(out, i, left, load(x, i, left) * scale * gain * silu(load(z, i, left)));
  });
}

void l2_norm(Elements x, float factor, int64_t n) {
  const Vec scale = splat(factor / __builtin_sqrtf(sum_of_squares(x, n) + 1e-6f));
  for_each_vec(n, [&](int64_t i, int64_t left) { store(x, i, left, load(x, i, left) * scale); });
}

void swiglu(Elements gate, Elements up, int64_t n, Elements out) {
  for_each_vec(n, [&](int64_t i, int64_t left) { store(out, i, left, silu(load(gate, i, left)) * load(up, i, left)); });
}

void sigmoid_multiply(Elements x, Elements gate, int64_t n, Elements out) {
  for_each_vec(n,
               [&](int64_t i, int64_t left) { store(out, i, left, load(x, i, left) * sigmoid(load(gate, i, left))); });
}

void scale_by_sigmoid(float logit, Elements x, int64_t n) {
  const Vec gate = sigmoid(splat(logit));
  for_each_vec(n, [&](int64_t i, int64_t left) { store(x, i, left, load(x, i, left) * gate); });
}

void shared_expert_combine(Elements x, const float* gate_weight, Elements shared, Elements routed, Elements residual,
                           int64_t n, Elements out) {
  const Elements weight{const_cast<float*>(gate_weight), false};
  const float logit =
      sum_of(n, [&](int64_t i, int64_t left, Vec sum) { return fma(load(x, i, left), load(weight, i, left), sum); });
  const Vec gate = sigmoid(splat(logit));
  for_each_vec(n, [&](int64_t i, int64_t left) {
    Vec sum = load(routed, i, left) + load(shared, i, left) * gate;
    if (residual.data != nullptr) sum = sum + load(residual, i, left);
    store(out, i, left, sum);
  });
}

void rotate(Elements x, const float* cosine, const float* sine, int64_t half) {
  for_each_vec(half, [&](int64_t i, int64_t left) {
    const Vec c = left >= kLanes ? load(cosine + i) : load(cosine + i, left);
    const Vec s = left >= kLanes ? load(sine + i) : load(sine + i, left);
    const Vec low = load(x, i, left);
    const Vec high = load(x, i + half, left);
    store(x, i, left, low * c - high * s);
    store(x, i + half, left, high * c + low * s);
  });
}

}  // namespace
}  // namespace tokenspeed::kernels::cpu
