#include "kernels/gated_delta_net.h"

#include <cmath>
#include <vector>

#include "kernels/elements.h"
#include "kernels/norm.h"

namespace tokenspeed::kernels::reference {
namespace {

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

std::byte* slot(std::byte* layer, const GdnState& state, int32_t index) {
  return layer + static_cast<int64_t>(index) * state.slot_stride;
}

// x * rsqrt(sum x^2 + 1e-6) * factor over one head.
void l2_normalise(const Rows& rows, int64_t row, int64_t begin, int64_t columns, float factor) {
  double sum = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const double value = load_element(rows, row, begin + i);
    sum += value * value;
  }
  const float scale = static_cast<float>(1.0 / std::sqrt(sum + 1e-6)) * factor;
  for (int64_t i = 0; i < columns; ++i) store_element(rows, row, begin + i, load_element(rows, row, begin + i) * scale);
}

// One token of one value head: updates state [value_dim][key_dim] and writes value_dim outputs.
void delta_step(const GatedDeltaRule& args, int64_t token, int64_t head, std::vector<float>& state) {
  const GdnShape& shape = args.shape;
  const int64_t key_head = head / (shape.value_heads / shape.key_heads);
  const int64_t query = key_head * shape.key_dim;
  const int64_t key = (shape.key_heads + key_head) * shape.key_dim;
  const int64_t value = 2 * shape.key_heads * shape.key_dim + head * shape.value_dim;
  const float decay = args.decay[token * shape.value_heads + head];
  const float beta = args.beta[token * shape.value_heads + head];
  for (int64_t v = 0; v < shape.value_dim; ++v) {
    float* row = state.data() + v * shape.key_dim;
    double memory = 0;
    for (int64_t k = 0; k < shape.key_dim; ++k) {
      row[k] *= decay;
      memory += static_cast<double>(row[k]) * load_element(args.qkv, token, key + k);
    }
    const float delta = beta * static_cast<float>(load_element(args.qkv, token, value + v) - memory);
    double out = 0;
    for (int64_t k = 0; k < shape.key_dim; ++k) {
      row[k] += delta * load_element(args.qkv, token, key + k);
      out += static_cast<double>(row[k]) * load_element(args.qkv, token, query + k);
    }
    store_element(args.out, token, head * shape.value_dim + v, static_cast<float>(out));
  }
}

}  // namespace

void causal_conv(const CausalConv& args) {
  const SequenceBatch& batch = args.batch;
  const int64_t channels = args.shape.channels();
  const int64_t taps = args.shape.conv_kernel;
  std::vector<float> inputs;
  for (int32_t s = 0; s < batch.sequences; ++s) {
    const int64_t begin = batch.token_begin[s];
    const int64_t count = batch.token_begin[s + 1] - begin;
    if (count == 0) continue;
    for (int64_t channel = 0; channel < channels; ++channel) {
      inputs.assign(static_cast<size_t>(taps - 1), 0.0f);
      for (int64_t i = 0; i < taps - 1 && batch.state_in[s] >= 0; ++i) {
        inputs[static_cast<size_t>(i)] = load_element(
            args.state.conv_dtype, slot(args.state.conv, args.state, batch.state_in[s]), i * channels + channel);
      }
      for (int64_t t = 0; t < count; ++t) inputs.push_back(load_element(args.qkv, begin + t, channel));
      for (int64_t t = 0; t < count; ++t) {
        float sum = 0;
        for (int64_t j = 0; j < taps; ++j) sum += args.weight[channel * taps + j] * inputs[static_cast<size_t>(t + j)];
        store_element(args.out, begin + t, channel, sum * sigmoid(sum));
      }
      for (int64_t i = 0; i < taps - 1; ++i) {
        store_element(args.state.conv_dtype, slot(args.state.conv, args.state, batch.state_out[s]),
                      i * channels + channel, inputs[static_cast<size_t>(count + i)]);
      }
    }
  }
}

void gdn_gates(const GdnGates& args) {
  for (int64_t token = 0; token < args.tokens; ++token) {
    for (int64_t head = 0; head < args.value_heads; ++head) {
      const float x = load_element(args.a, token, head) + args.dt_bias[head];
      const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
      args.beta[token * args.value_heads + head] = sigmoid(load_element(args.b, token, head));
      args.decay[token * args.value_heads + head] = std::exp(-std::exp(args.a_log[head]) * softplus);
    }
  }
}

void gdn_l2_norm(const GdnL2Norm& args) {
  const GdnShape& shape = args.shape;
  const float query_factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.key_dim)));
  for (int64_t token = 0; token < args.tokens; ++token) {
    for (int64_t head = 0; head < 2 * shape.key_heads; ++head) {
      l2_normalise(args.qkv, token, head * shape.key_dim, shape.key_dim, head < shape.key_heads ? query_factor : 1.0f);
    }
  }
}

void gated_delta_rule(const GatedDeltaRule& args) {
  const SequenceBatch& batch = args.batch;
  const int64_t size = args.shape.value_dim * args.shape.key_dim;
  std::vector<float> state;
  for (int32_t s = 0; s < batch.sequences; ++s) {
    if (batch.token_begin[s] == batch.token_begin[s + 1]) continue;
    for (int64_t head = 0; head < args.shape.value_heads; ++head) {
      state.assign(static_cast<size_t>(size), 0.0f);
      if (batch.state_in[s] >= 0) {
        const auto* from =
            reinterpret_cast<const float*>(slot(args.state.recurrent, args.state, batch.state_in[s])) + head * size;
        state.assign(from, from + size);
      }
      for (int64_t token = batch.token_begin[s]; token < batch.token_begin[s + 1]; ++token) {
        delta_step(args, token, head, state);
      }
      auto* to = reinterpret_cast<float*>(slot(args.state.recurrent, args.state, batch.state_out[s])) + head * size;
      for (int64_t i = 0; i < size; ++i) to[i] = state[static_cast<size_t>(i)];
    }
  }
}

void gdn_mixer(const GdnMixer& args) {
  const GdnShape& shape = args.shape;
  const int64_t tokens = args.batch.tokens;
  const Rows mixed{args.workspace, DType::kFloat32, shape.channels()};
  float* beta = static_cast<float*>(args.workspace) + tokens * shape.channels();
  float* decay = beta + tokens * shape.value_heads;
  causal_conv({shape, args.batch, args.state, args.qkv, args.conv_weight, mixed});
  gdn_gates({tokens, shape.value_heads, args.b, args.a, args.a_log, args.dt_bias, beta, decay});
  gdn_l2_norm({shape, tokens, mixed});
  gated_delta_rule({shape, args.batch, args.state, mixed, beta, decay, args.out});
  gated_rms_norm(
      {tokens, shape.value_heads, shape.value_dim, args.out, args.z, args.norm_weight, args.epsilon, args.out});
}

}  // namespace tokenspeed::kernels::reference
