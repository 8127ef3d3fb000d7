#include "kernels/gated_delta_net.h"

#include <cmath>
#include <vector>

#include "kernels/cpu/rows.h"

namespace tokenspeed::kernels::cpu {
namespace {

std::byte* slot(std::byte* layer, const GdnState& state, int32_t index) {
  return layer + static_cast<int64_t>(index) * state.slot_stride;
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float decay_of(float a, float dt_bias, float a_log) {
  const float x = a + dt_bias;
  const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
  return std::exp(-std::exp(a_log) * softplus);
}

// Convolves `count` channels from `channel` on for sequence s; the output starts at `output`.
void conv_channels(const GdnShape& shape, const SequenceBatch& batch, const GdnState& state, const Rows& qkv,
                   const float* weight, int32_t s, int64_t channel, int64_t count, Elements output,
                   int64_t output_stride) {
  const int64_t begin = batch.token_begin[s];
  Elements state_in;
  if (batch.state_in[s] >= 0)
    state_in = elements(state.conv_dtype, slot(state.conv, state, batch.state_in[s]), channel);
  vector_kernels().conv({count, batch.token_begin[s + 1] - begin, elements(qkv, begin, channel), qkv.stride, state_in,
                         elements(state.conv_dtype, slot(state.conv, state, batch.state_out[s]), channel),
                         shape.channels(), weight + channel * shape.conv_kernel, output, output_stride});
}

// state_in's and state_out's matrices of one value head.
void set_head_state(const GdnShape& shape, const SequenceBatch& batch, const GdnState& state, int32_t s, int64_t head,
                    DeltaHead* args) {
  const int64_t begin = head * shape.value_dim * shape.key_dim;
  args->key_dim = shape.key_dim;
  args->value_dim = shape.value_dim;
  args->state_in = batch.state_in[s] < 0
                       ? nullptr
                       : reinterpret_cast<const float*>(slot(state.recurrent, state, batch.state_in[s])) + begin;
  args->state_out = reinterpret_cast<float*>(slot(state.recurrent, state, batch.state_out[s])) + begin;
}

// One key head of one sequence with all its value heads, from projections to gated output.
// Workspace layout: per head of q, k, then v: [T][head dim]; then beta and decay [T][value_heads].
void mix_key_head(const GdnMixer& args, int32_t s, int64_t key_head) {
  const VectorKernels& vector = vector_kernels();
  const GdnShape& shape = args.shape;
  const int64_t tokens = args.batch.tokens;
  const int64_t begin = args.batch.token_begin[s];
  const int64_t count = args.batch.token_begin[s + 1] - begin;
  float* const work = static_cast<float*>(args.workspace);
  const auto convolve = [&](int64_t channel, int64_t width) {
    float* out = work + channel * tokens + begin * width;
    conv_channels(shape, args.batch, args.state, args.qkv, args.conv_weight, s, channel, width, {out, false}, width);
    return out;
  };
  float* const query = convolve(key_head * shape.key_dim, shape.key_dim);
  float* const key = convolve((shape.key_heads + key_head) * shape.key_dim, shape.key_dim);
  const float query_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.key_dim)));
  for (int64_t t = 0; t < count; ++t) {
    vector.l2_norm({query + t * shape.key_dim, false}, query_factor, shape.key_dim);
    vector.l2_norm({key + t * shape.key_dim, false}, 1.0f, shape.key_dim);
  }
  const int64_t repeat = shape.value_heads / shape.key_heads;
  for (int64_t head = key_head * repeat; head < (key_head + 1) * repeat; ++head) {
    const float* value = convolve(2 * shape.key_heads * shape.key_dim + head * shape.value_dim, shape.value_dim);
    float* const beta = work + tokens * shape.channels() + begin * shape.value_heads + head;
    float* const decay = beta + tokens * shape.value_heads;
    for (int64_t t = 0; t < count; ++t) {
      beta[t * shape.value_heads] = sigmoid(load_element(args.b, begin + t, head));
      decay[t * shape.value_heads] =
          decay_of(load_element(args.a, begin + t, head), args.dt_bias[head], args.a_log[head]);
    }
    const int64_t column = head * shape.value_dim;
    DeltaHead rule;
    set_head_state(shape, args.batch, args.state, s, head, &rule);
    rule.tokens = count;
    rule.query = query;
    rule.key = key;
    rule.key_stride = shape.key_dim;
    rule.value = value;
    rule.value_stride = shape.value_dim;
    rule.beta = beta;
    rule.decay = decay;
    rule.gate_stride = shape.value_heads;
    rule.output = elements(args.out, begin, column);
    rule.output_stride = args.out.stride;
    vector.delta(rule);
    for (int64_t t = begin; t < begin + count; ++t) {
      const Elements out = elements(args.out, t, column);
      vector.gated_rms_norm(out, elements(args.z, t, column), args.norm_weight, args.epsilon, shape.value_dim, out);
    }
  }
}

// One value head of one sequence; q, k and v are first brought to float32.
void delta_head(const GatedDeltaRule& args, int32_t s, int64_t head) {
  constexpr int64_t kTokens = 32;
  thread_local std::vector<float> buffer;
  const VectorKernels& vector = vector_kernels();
  const GdnShape& shape = args.shape;
  buffer.resize(static_cast<size_t>(kTokens * (2 * shape.key_dim + shape.value_dim)));
  float* const query = buffer.data();
  float* const key = query + kTokens * shape.key_dim;
  float* const value = key + kTokens * shape.key_dim;
  const int64_t key_head = head / (shape.value_heads / shape.key_heads);
  DeltaHead rule;
  set_head_state(shape, args.batch, args.state, s, head, &rule);
  rule.query = query;
  rule.key = key;
  rule.key_stride = shape.key_dim;
  rule.value = value;
  rule.value_stride = shape.value_dim;
  rule.gate_stride = shape.value_heads;
  rule.output_stride = args.out.stride;
  const int64_t end = args.batch.token_begin[s + 1];
  for (int64_t begin = args.batch.token_begin[s]; begin < end; begin += kTokens) {
    rule.tokens = std::min(kTokens, end - begin);
    for (int64_t t = 0; t < rule.tokens; ++t) {
      const auto copy = [&](int64_t column, int64_t n, float* to) {
        vector.convert(elements(args.qkv, begin + t, column), n, {to + t * n, false});
      };
      copy(key_head * shape.key_dim, shape.key_dim, query);
      copy((shape.key_heads + key_head) * shape.key_dim, shape.key_dim, key);
      copy(2 * shape.key_heads * shape.key_dim + head * shape.value_dim, shape.value_dim, value);
    }
    rule.beta = args.beta + begin * shape.value_heads + head;
    rule.decay = args.decay + begin * shape.value_heads + head;
    rule.output = elements(args.out, begin, head * shape.value_dim);
    vector.delta(rule);
    rule.state_in = rule.state_out;
  }
}

bool has_tokens(const SequenceBatch& batch, int32_t s) { return batch.token_begin[s] < batch.token_begin[s + 1]; }

}  // namespace

void causal_conv(const CausalConv& args, ThreadPool& pool) {
  constexpr int64_t kChannels = 256;
  const int64_t channels = args.shape.channels();
  const int64_t blocks = (channels + kChannels - 1) / kChannels;
  pool.parallel_for(args.batch.sequences * blocks, [&](int64_t task) {
    const int32_t s = static_cast<int32_t>(task / blocks);
    const int64_t channel = task % blocks * kChannels;
    if (!has_tokens(args.batch, s)) return;
    conv_channels(args.shape, args.batch, args.state, args.qkv, args.weight, s, channel,
                  std::min(kChannels, channels - channel), elements(args.out, args.batch.token_begin[s], channel),
                  args.out.stride);
  });
}

void gdn_gates(const GdnGates& args, ThreadPool& pool) {
  for_each_row(pool, args.tokens, 32 * args.value_heads, [&](int64_t token) {
    for (int64_t head = 0; head < args.value_heads; ++head) {
      args.beta[token * args.value_heads + head] = sigmoid(load_element(args.b, token, head));
      args.decay[token * args.value_heads + head] =
          decay_of(load_element(args.a, token, head), args.dt_bias[head], args.a_log[head]);
    }
  });
}

void gdn_l2_norm(const GdnL2Norm& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  const GdnShape& shape = args.shape;
  const float query_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.key_dim)));
  for_each_row(pool, args.tokens, 2 * shape.key_heads * shape.key_dim, [&](int64_t token) {
    for (int64_t head = 0; head < 2 * shape.key_heads; ++head) {
      vector.l2_norm(elements(args.qkv, token, head * shape.key_dim), head < shape.key_heads ? query_factor : 1.0f,
                     shape.key_dim);
    }
  });
}

void gated_delta_rule(const GatedDeltaRule& args, ThreadPool& pool) {
  const int64_t heads = args.shape.value_heads;
  pool.parallel_for(args.batch.sequences * heads, [&](int64_t task) {
    const int32_t s = static_cast<int32_t>(task / heads);
    if (has_tokens(args.batch, s)) delta_head(args, s, task % heads);
  });
}

void gdn_mixer(const GdnMixer& args, ThreadPool& pool) {
  const int64_t heads = args.shape.key_heads;
  pool.parallel_for(args.batch.sequences * heads, [&](int64_t task) {
    const int32_t s = static_cast<int32_t>(task / heads);
    if (has_tokens(args.batch, s)) mix_key_head(args, s, task % heads);
  });
}

}  // namespace tokenspeed::kernels::cpu
