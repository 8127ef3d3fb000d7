// Convolution and recurrence of Gated DeltaNet for one head. Include from files of one instruction set only.
#pragma once

#include "kernels/cpu/vector_rows.h"

namespace tokenspeed::kernels::cpu {
namespace {

constexpr int64_t kMaxHeadDim = 256;

inline Elements advance(Elements x, int64_t elements) {
  return {static_cast<char*>(x.data) + elements * (x.is_bfloat16 ? 2 : 4), x.is_bfloat16};
}

// The three inputs before token 0, then the window slides; each output is the same four products in the same order.
void conv(const ConvChannels& args) {
  for_each_vec(args.channels, [&](int64_t channel, int64_t left) {
    Vec weight[4];
    for (int tap = 0; tap < 4; ++tap) weight[tap] = load_every_fourth(args.weight + 4 * channel, tap, left);
    Vec past[3] = {splat(0), splat(0), splat(0)};
    if (args.state_in.data != nullptr) {
      for (int64_t i = 0; i < 3; ++i) past[i] = load(args.state_in, i * args.state_stride + channel, left);
    }
    for (int64_t token = 0; token < args.tokens; ++token) {
      const Vec present = load(args.input, token * args.input_stride + channel, left);
      Vec sum = weight[0] * past[0];
      sum = fma(weight[1], past[1], sum);
      sum = fma(weight[2], past[2], sum);
      sum = fma(weight[3], present, sum);
      store(args.output, token * args.output_stride + channel, left, silu(sum));
      past[0] = past[1];
      past[1] = past[2];
      past[2] = present;
    }
    for (int64_t i = 0; i < 3; ++i) store(args.state_out, i * args.state_stride + channel, left, past[i]);
  });
}

// What one token does to every state row: S <- decay S + delta k^T, with the reads S k and S q taken before the update
// (S' q = decay (S q) + delta (k . q)), so that the state is passed over once.
struct DeltaToken {
  const float* query;
  const float* key;
  const float* value;
  float* output;  // [value_dim]
  float beta;
  float decay;
  float key_query;
};

inline float delta_of(const DeltaToken& token, int64_t row, float memory, float read) {
  const float delta = token.beta * (token.value[row] - token.decay * memory);
  token.output[row] = token.decay * read + delta * token.key_query;
  return delta;
}

// One state row of any length in memory.
inline void delta_row(const DeltaToken* tokens, int64_t count, int64_t row, float* state, int64_t n) {
  for (int64_t t = 0; t < count; ++t) {
    Vec memory = splat(0);
    Vec read = splat(0);
    for (int64_t i = 0; i < n; i += kLanes) {
      memory = fma(load(state + i), load(tokens[t].key + i), memory);
      read = fma(load(state + i), load(tokens[t].query + i), read);
    }
    const Vec delta = splat(delta_of(tokens[t], row, sum_lanes(memory), sum_lanes(read)));
    const Vec decay = splat(tokens[t].decay);
    for (int64_t i = 0; i < n; i += kLanes)
      store(state + i, fma(delta, load(tokens[t].key + i), decay * load(state + i)));
  }
}

// Two state rows of 8 registers each that stay in registers over all tokens.
inline void delta_two_rows(const DeltaToken* tokens, int64_t count, int64_t row, float* state) {
  constexpr int64_t kVecs = 8;
  constexpr int64_t n = kVecs * kLanes;
  Vec first[kVecs];
  Vec second[kVecs];
  for (int64_t i = 0; i < kVecs; ++i) {
    first[i] = load(state + i * kLanes);
    second[i] = load(state + n + i * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    const float* key = tokens[t].key;
    const float* query = tokens[t].query;
    Vec dots[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int64_t i = 0; i < kVecs; ++i) {
      const Vec k = load(key + i * kLanes);
      const Vec q = load(query + i * kLanes);
      dots[0] = fma(first[i], k, dots[0]);
      dots[1] = fma(first[i], q, dots[1]);
      dots[2] = fma(second[i], k, dots[2]);
      dots[3] = fma(second[i], q, dots[3]);
    }
    alignas(16) float sums[4];
    _mm_store_ps(sums, sum_lanes(dots[0], dots[1], dots[2], dots[3]));
    const Vec first_delta = splat(delta_of(tokens[t], row, sums[0], sums[1]));
    const Vec second_delta = splat(delta_of(tokens[t], row + 1, sums[2], sums[3]));
    const Vec decay = splat(tokens[t].decay);
    for (int64_t i = 0; i < kVecs; ++i) {
      const Vec k = load(key + i * kLanes);
      first[i] = fma(first_delta, k, decay * first[i]);
      second[i] = fma(second_delta, k, decay * second[i]);
    }
  }
  for (int64_t i = 0; i < kVecs; ++i) {
    store(state + i * kLanes, first[i]);
    store(state + n + i * kLanes, second[i]);
  }
}

// Tokens go in groups whose keys and queries stay in the first cache while every state row passes over them. The state
// between groups is what one token after another would leave, so grouping does not show in the bits.
void delta(const DeltaHead& args) {
  constexpr int64_t kGroup = 16;
  const int64_t size = args.key_dim * args.value_dim;
  if (args.state_in == nullptr) {
    for (int64_t i = 0; i < size; ++i) args.state_out[i] = 0;
  } else if (args.state_in != args.state_out) {
    for (int64_t i = 0; i < size; ++i) args.state_out[i] = args.state_in[i];
  }
  alignas(64) float outputs[kGroup][kMaxHeadDim];
  DeltaToken tokens[kGroup];
  for (int64_t begin = 0; begin < args.tokens; begin += kGroup) {
    const int64_t count = args.tokens - begin < kGroup ? args.tokens - begin : kGroup;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = begin + i;
      const float* query = args.query + t * args.key_stride;
      const float* key = args.key + t * args.key_stride;
      const float key_query =
          sum_of(args.key_dim, [&](int64_t j, int64_t, Vec sum) { return fma(load(key + j), load(query + j), sum); });
      tokens[i] = {query,
                   key,
                   args.value + t * args.value_stride,
                   outputs[i],
                   args.beta[t * args.gate_stride],
                   args.decay[t * args.gate_stride],
                   key_query};
    }
    if (kLanes == 16 && args.key_dim == 128) {
      for (int64_t row = 0; row < args.value_dim; row += 2) {
        delta_two_rows(tokens, count, row, args.state_out + row * args.key_dim);
      }
    } else {
      for (int64_t row = 0; row < args.value_dim; ++row) {
        delta_row(tokens, count, row, args.state_out + row * args.key_dim, args.key_dim);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      convert({outputs[i], false}, args.value_dim, advance(args.output, (begin + i) * args.output_stride));
    }
  }
}

}  // namespace
}  // namespace tokenspeed::kernels::cpu
