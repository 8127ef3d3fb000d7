// Passes over a row of logits. Include from files of one instruction set only.
#pragma once

#include "kernels/cpu/vector_rows.h"

namespace tokenspeed::kernels::cpu {
namespace {

inline Vec load_some(const float* p, int64_t left) { return left >= kLanes ? load(p) : load(p, left); }
inline uint32_t lanes_below(int64_t left) { return left >= kLanes ? (1u << kLanes) - 1 : (1u << left) - 1; }

float greatest(const float* logits, int64_t n, bool* invalid) {
  const Vec infinity = splat(__builtin_inff());
  Vec top = splat(-__builtin_inff());
  uint32_t bad = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec x = load(logits + i);
    bad |= not_less(x, infinity);
    top = max(top, x);
  }
  float result = max_lanes(top);
  for (; i < n; ++i) {
    bad |= !(logits[i] < __builtin_inff());
    result = logits[i] > result ? logits[i] : result;
  }
  *invalid = bad != 0;
  return result;
}

double exp_sum(const float* logits, int64_t n, float greatest, float inverse_temperature, float* weight) {
  constexpr int64_t kRun = 256 * kLanes;  // float sums over short runs, double over the runs
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = begin + kRun < n ? begin + kRun : n;
    Vec sum = splat(0);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec e = exp((load(logits + i) - splat(greatest)) * splat(inverse_temperature));
      if (weight != nullptr) store(weight + i, e);
      sum = sum + e;
    }
    total += sum_lanes(sum);
    if (i < end) {
      float rest[kLanes];
      store(rest, exp((load(logits + i, end - i) - splat(greatest)) * splat(inverse_temperature)));
      for (int64_t j = 0; j < end - i; ++j) {
        if (weight != nullptr) weight[i + j] = rest[j];
        total += rest[j];
      }
    }
  }
  return total;
}

int64_t count_greater(const float* logits, int64_t n, float bound) {
  int64_t count = 0;
  for_each_vec(n, [&](int64_t i, int64_t left) {
    count += __builtin_popcount(greater(load_some(logits + i, left), splat(bound)) & lanes_below(left));
  });
  return count;
}

int64_t at_least(const float* logits, int64_t n, float bound, int32_t* ids, int64_t capacity) {
  int64_t count = 0;
  for_each_vec(n, [&](int64_t i, int64_t left) {
    uint32_t lanes = not_less(load_some(logits + i, left), splat(bound)) & lanes_below(left);
    for (; lanes != 0; lanes &= lanes - 1, ++count) {
      if (count < capacity) ids[count] = static_cast<int32_t>(i + __builtin_ctz(lanes));
    }
  });
  return count;
}

// Word 0 of philox(seed, stream, id) for consecutive ids.
inline IntVec philox_words(uint64_t seed, uint64_t stream, IntVec ids) {
  IntVec counter[4] = {ids, splat_int(0), splat_int(static_cast<uint32_t>(stream)),
                       splat_int(static_cast<uint32_t>(stream >> 32))};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    IntVec high[2];
    IntVec low[2];
    multiply_wide(counter[0], splat_int(0xD2511F53u), &high[0], &low[0]);
    multiply_wide(counter[2], splat_int(0xCD9E8D57u), &high[1], &low[1]);
    counter[0] = high[1] ^ counter[1] ^ splat_int(key[0]);
    counter[1] = low[1];
    counter[2] = high[0] ^ counter[3] ^ splat_int(key[1]);
    counter[3] = low[0];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter[0];
}

// s - log(-log u) > key needs 1 - u <= -log u < exp(s - key). The margins cover the float arithmetic on both sides.
int64_t gumbel_candidates(const float* logits, int64_t begin, int64_t end, float greatest, float inverse_temperature,
                          uint64_t seed, int64_t position, float key, int32_t* ids) {
  int64_t count = 0;
  for_each_vec(end - begin, [&](int64_t i, int64_t left) {
    const Vec scaled = (load_some(logits + begin + i, left) - splat(greatest)) * splat(inverse_temperature);
    const Vec limit = fma(exp(scaled - splat(key)), splat(1.0f + 1e-3f), splat(0x1p-22f));
    const IntVec words =
        philox_words(seed, static_cast<uint64_t>(position), count_from(static_cast<uint32_t>(begin + i)));
    const Vec above = splat(1.0f) - to_float_lanes(shift_right(words, 8)) * splat(0x1p-24f);  // 1 - u + 2^-25
    uint32_t lanes = not_less(limit, above) & lanes_below(left);
    for (; lanes != 0; lanes &= lanes - 1) ids[count++] = static_cast<int32_t>(begin + i + __builtin_ctz(lanes));
  });
  return count;
}

}  // namespace
}  // namespace tokenspeed::kernels::cpu
