// The kernels for steps of few tokens (kernels/cuda/decode.h): against the plain references on fresh random inputs, and
// T rows in one launch against T launches of one row, bit for bit. Seeds are printed.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>

#include "gpu/device_data.h"
#include "gpu/few_token_data.h"
#include "kernels/cuda/decode.h"
#include "kernels/embedding.h"
#include "kernels/linear.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"
#include "kernels/sampling.h"

namespace tokenspeed::kernels {
namespace {

constexpr double kRoundingTolerance = 3e-3;   // one bfloat16 rounding of the result, now and then the other way
constexpr double kFloatTolerance = 1e-4;      // float32 results of bfloat16 inputs that a norm rounded the other way
constexpr double kExpertsTolerance = 6e-3;    // h rounded in between
constexpr double kAttentionTolerance = 6e-3;  // probabilities in bfloat16
constexpr double kMixerTolerance = 6e-3;      // o rounded before its norm
constexpr double kStateTolerance = 1e-5;

struct LinearCase {
  int64_t rows, k;
  std::vector<std::pair<int64_t, bool>> segments;  // n, fp8
  bool norm, accumulate, float_out;
};

void check_linear(Random* random, const LinearCase& c) {
  SCOPED_TRACE(testing::Message() << "rows " << c.rows << " k " << c.k << " first n " << c.segments[0].first << " fp8 "
                                  << c.segments[0].second << " norm " << c.norm);
  Bf16Rows x(random->bfloat16s(c.rows * (c.k + 8)), c.k + 8);
  Both<float> norm(random->floats(c.k, 0.3f));
  Bf16Rows normed(random->bfloat16s(c.rows * c.k), c.k);
  normed.poison();
  std::vector<std::unique_ptr<Weights>> weights;
  std::vector<std::unique_ptr<Bf16Rows>> narrow;
  std::vector<std::unique_ptr<FloatRows>> wide;
  cuda::DecodeLinear args;
  args.rows = c.rows;
  args.x = x.device_rows();
  args.segment_count = static_cast<int32_t>(c.segments.size());
  if (c.norm) {
    args.norm_weight = norm.device();
    args.normed = normed.device_rows();
  }
  for (size_t i = 0; i < c.segments.size(); ++i) {
    const auto [n, fp8] = c.segments[i];
    weights.push_back(std::make_unique<Weights>(random, fp8, n, c.k));
    narrow.push_back(std::make_unique<Bf16Rows>(random->bfloat16s(c.rows * (n + 3)), n + 3));
    wide.push_back(std::make_unique<FloatRows>(random->floats(c.rows * (n + 3)), n + 3));
    if (!c.accumulate) {
      narrow.back()->poison();
      wide.back()->poison();
    }
    args.segments[i] = {weights.back()->device(),
                        c.float_out ? wide.back()->device_rows() : narrow.back()->device_rows(), c.accumulate};
  }
  run(cuda::decode_linear(args, {}));
  std::vector<std::vector<BFloat16>> together;
  for (size_t i = 0; i < c.segments.size(); ++i) {
    Linear reference;
    reference.rows = c.rows;
    reference.x = x.host_rows();
    reference.weight = weights[i]->host();
    reference.y = c.float_out ? wide[i]->host_rows() : narrow[i]->host_rows();
    reference.accumulate = c.accumulate;
    std::vector<float> workspace(static_cast<size_t>(c.rows * c.k));
    if (c.norm) {
      reference.norm_weight = norm.host.data();
      reference.workspace = workspace.data();
    }
    const std::vector<BFloat16> narrow_before = narrow[i]->host;
    const std::vector<float> wide_before = wide[i]->host;
    reference::linear(reference);
    // Columns between rows are compared only where they were not poisoned.
    std::vector<float> got, expected;
    const int64_t n = c.segments[i].first;
    const std::vector<BFloat16> narrow_got = narrow[i]->download();
    const std::vector<float> wide_got = wide[i]->download();
    for (int64_t t = 0; t < c.rows; ++t) {
      for (int64_t j = 0; j < n; ++j) {
        const size_t at = static_cast<size_t>(t * (n + 3) + j);
        got.push_back(c.float_out ? wide_got[at] : to_float(narrow_got[at]));
        expected.push_back(c.float_out ? wide[i]->host[at] : to_float(narrow[i]->host[at]));
      }
    }
    // A float result still carries the norm's bfloat16 rounding, which may fall the other way for a few elements.
    EXPECT_CLOSE(got, expected, c.float_out && !c.norm ? kFloatTolerance : kRoundingTolerance);
    narrow[i]->host = narrow_before;
    wide[i]->host = wide_before;
    together.push_back(narrow_got);
  }
  // Row by row: the same bits.
  if (c.float_out) return;
  for (size_t i = 0; i < c.segments.size(); ++i) {
    narrow[i]->upload();
    if (!c.accumulate) narrow[i]->poison();
  }
  for (int64_t t = 0; t < c.rows; ++t) {
    cuda::DecodeLinear one = args;
    one.rows = 1;
    one.x.data = x.device() + t * one.x.stride;
    one.normed.data = nullptr;
    for (size_t i = 0; i < c.segments.size(); ++i) {
      one.segments[i].y.data = static_cast<BFloat16*>(one.segments[i].y.data) + t * one.segments[i].y.stride;
    }
    run(cuda::decode_linear(one, {}));
  }
  for (size_t i = 0; i < c.segments.size(); ++i)
    EXPECT_TRUE(same_bits(narrow[i]->download(), together[i])) << "segment " << i;
}

TEST(FewTokenLinear, ReferenceAndRowInvariance) {
  Random random(fresh_seed());
  for (const int64_t rows : {1, 2, 3, 5, 8}) {
    check_linear(&random, {rows, 2048, {{1088, true}, {512, true}, {32, false}, {32, false}}, true, false, false});
    check_linear(&random, {rows, 2048, {{1040, false}}, true, false, false});
    check_linear(&random, {rows, 4096, {{2048, true}}, false, true, false});
    check_linear(&random, {rows, 1024, {{257, false}, {1, false}}, true, false, true});
    check_linear(&random, {rows, 2560, {{2576, true}}, true, false, false});
    check_linear(&random, {rows, 5120, {{96, true}, {7, false}}, true, false, false});
    check_linear(&random, {rows, 2048, {{8192, true}, {4096, true}, {32, false}, {32, false}}, true, false, false});
    check_linear(&random, {rows, 448, {{576, true}}, false, true, false});
  }
  check_linear(&random, {1, 64, {{1, false}}, false, false, true});
  check_linear(&random, {2, 128, {{16, true}}, false, true, false});
  check_linear(&random, {4, 17408, {{320, true}}, false, true, false});
  check_linear(&random, {8, 17408, {{48, true}, {16, false}}, false, true, false});  // in two launches
  check_linear(&random, {8, 2048, {{40000, false}}, true, false, true});             // several batches of tiles
  check_linear(&random, {1, 1024, {{70000, false}}, true, false, false});
}

TEST(FewTokenLinear, EveryFp8CodeIsExact) {
  // w[n, k] is nonzero at k = n only: y is the code's value times the activation and the scale.
  const int64_t k = 256, n = 256;
  std::vector<uint8_t> codes(static_cast<size_t>(n * k), 0);
  for (int64_t i = 0; i < n; ++i) codes[static_cast<size_t>(i * k + i % k)] = static_cast<uint8_t>(i);
  Both<uint8_t> weight(codes);
  Both<float> scale(std::vector<float>{0.25f, 0.25f, 4.0f, 4.0f});
  Bf16Rows x(std::vector<BFloat16>(static_cast<size_t>(k), to_bfloat16(1.5f)), k);
  FloatRows y(std::vector<float>(static_cast<size_t>(n)), n);
  y.poison();
  cuda::DecodeLinear args;
  args.rows = 1;
  args.x = x.device_rows();
  args.segment_count = 1;
  args.segments[0] = {{weight.device(), DType::kFloat8E4M3, MatrixLayout::kRowMajor, n, k, scale.device()},
                      y.device_rows()};
  run(cuda::decode_linear(args, {}));
  const std::vector<float> got = y.download();
  for (int64_t i = 0; i < n; ++i) {
    if ((i & 0x7f) == 0x7f) continue;  // NaN codes are not kept
    EXPECT_EQ(got[static_cast<size_t>(i)],
              float8_e4m3_to_float(static_cast<uint8_t>(i)) * 1.5f * (i < 128 ? 0.25f : 4.0f))
        << i;
  }
}

struct ExpertsCase {
  int64_t rows, hidden, width, experts, top_k, shared_width;
  bool fp8;
};

void check_experts(Random* random, const ExpertsCase& c) {
  SCOPED_TRACE(testing::Message() << "rows " << c.rows << " hidden " << c.hidden << " width " << c.width << " experts "
                                  << c.experts << " fp8 " << c.fp8);
  const bool routed = c.experts > 0;
  const bool shared = c.shared_width > 0;
  Bf16Rows x(random->bfloat16s(c.rows * c.hidden), c.hidden), y(random->bfloat16s(c.rows * c.hidden), c.hidden);
  Weights gate_up(random, c.fp8, 2 * c.width, c.hidden, std::max<int64_t>(c.experts, 1));
  Weights down(random, c.fp8, c.hidden, c.width, std::max<int64_t>(c.experts, 1));
  Weights shared_gate_up(random, c.fp8, std::max<int64_t>(2 * c.shared_width, 16), c.hidden);
  Weights shared_down(random, c.fp8, c.hidden, std::max<int64_t>(c.shared_width, 64));
  // Rows agree on some experts; equal logits test the order of ties.
  std::vector<float> logit_values = random->floats(c.rows * (c.experts + 1));
  for (float& value : logit_values) value = std::round(value * 64) / 64;
  for (int64_t t = 1; t < c.rows; ++t) logit_values[static_cast<size_t>(t * (c.experts + 1))] = 9.0f;
  FloatRows logits(logit_values, c.experts + 1);
  FloatRows gate(random->floats(c.rows), 1);
  const int64_t h_width = std::max(c.width, c.shared_width);
  Bf16Rows h(random->bfloat16s(c.rows * (c.top_k + 1) * h_width), h_width);
  h.poison();
  Both<int32_t> ids(std::vector<int32_t>(static_cast<size_t>(std::max<int64_t>(c.rows * c.top_k, 1))));
  Both<float> weights(std::vector<float>(ids.host.size()));

  cuda::DecodeExperts experts;
  if (routed) experts = {c.experts, c.top_k, true, logits.device(), c.experts + 1, gate_up.device(), down.device()};
  cuda::DecodeGateUp up;
  up.rows = c.rows;
  up.hidden = c.hidden;
  up.width = c.width;
  up.x = x.device_rows();
  up.routed = experts;
  if (shared) up.shared_gate_up = shared_gate_up.device();
  up.shared_width = c.shared_width;
  up.h = h.device();
  if (routed) {
    up.expert_ids = ids.device();
    up.expert_weights = weights.device();
  }
  cuda::DecodeDown low;
  low.rows = c.rows;
  low.hidden = c.hidden;
  low.width = c.width;
  low.routed = experts;
  if (shared) low.shared_down = shared_down.device();
  low.shared_width = c.shared_width;
  low.shared_gate_logit = routed ? gate.device() : nullptr;
  low.h = h.device();
  low.y = y.device_rows();
  run(cuda::decode_gate_up(up, {}));
  run(cuda::decode_down(low, {}));
  const std::vector<BFloat16> together = y.download();

  // The same step by step in fp32 from the references of the parts.
  std::vector<float> expected(y.host.size());
  for (size_t i = 0; i < expected.size(); ++i) expected[i] = to_float(y.host[i]);
  if (routed) {
    std::vector<int32_t> want_ids(ids.host.size());
    std::vector<float> want_weights(ids.host.size());
    for (int64_t t = 0; t < c.rows; ++t) {
      reference::moe_router({1, c.experts, c.top_k, true, logits.host.data() + t * (c.experts + 1),
                             want_ids.data() + t * c.top_k, want_weights.data() + t * c.top_k});
    }
    EXPECT_EQ(ids.download(), want_ids);
    EXPECT_CLOSE(weights.download(), want_weights, 1e-5);
    std::vector<int32_t> used = want_ids;
    std::sort(used.begin(), used.end());
    used.erase(std::unique(used.begin(), used.end()), used.end());
    for (int64_t t = 0; t < c.rows; ++t) {
      for (int64_t i = 0; i < c.top_k; ++i) {
        const int64_t e = want_ids[static_cast<size_t>(t * c.top_k + i)];
        const auto of_expert = [&](const Weights& w) {
          Matrix m = w.host();
          m.data = static_cast<const uint8_t*>(m.data) + e * w.stride();
          if (c.fp8) m.scale += e * w.scale_stride();
          return m;
        };
        std::vector<float> product(static_cast<size_t>(2 * c.width)), part(static_cast<size_t>(c.hidden));
        std::vector<BFloat16> act(static_cast<size_t>(c.width));
        Linear linear;
        linear.rows = 1;
        linear.x = {x.host.data() + t * c.hidden, DType::kBFloat16, c.hidden};
        linear.weight = of_expert(gate_up);
        linear.y = {product.data(), DType::kFloat32, 2 * c.width};
        reference::linear(linear);
        reference::swiglu({1, c.width, linear.y, {act.data(), DType::kBFloat16, c.width}});
        linear.x = {act.data(), DType::kBFloat16, c.width};
        linear.weight = of_expert(down);
        linear.y = {part.data(), DType::kFloat32, c.hidden};
        reference::linear(linear);
        for (int64_t n = 0; n < c.hidden; ++n) {
          expected[static_cast<size_t>(t * c.hidden + n)] +=
              want_weights[static_cast<size_t>(t * c.top_k + i)] * part[static_cast<size_t>(n)];
        }
      }
    }
  }
  if (shared) {
    for (int64_t t = 0; t < c.rows; ++t) {
      std::vector<float> product(static_cast<size_t>(2 * c.shared_width)), part(static_cast<size_t>(c.hidden));
      std::vector<BFloat16> act(static_cast<size_t>(c.shared_width));
      Linear linear;
      linear.rows = 1;
      linear.x = {x.host.data() + t * c.hidden, DType::kBFloat16, c.hidden};
      linear.weight = shared_gate_up.host();
      linear.y = {product.data(), DType::kFloat32, 2 * c.shared_width};
      reference::linear(linear);
      reference::swiglu({1, c.shared_width, linear.y, {act.data(), DType::kBFloat16, c.shared_width}});
      linear.x = {act.data(), DType::kBFloat16, c.shared_width};
      linear.weight = shared_down.host();
      linear.y = {part.data(), DType::kFloat32, c.hidden};
      reference::linear(linear);
      const float g = routed ? 1.0f / (1.0f + std::exp(-gate.host[static_cast<size_t>(t)])) : 1.0f;
      for (int64_t n = 0; n < c.hidden; ++n)
        expected[static_cast<size_t>(t * c.hidden + n)] += g * part[static_cast<size_t>(n)];
    }
  }
  std::vector<float> got;
  for (const BFloat16 value : together) got.push_back(to_float(value));
  EXPECT_CLOSE(got, expected, kExpertsTolerance);

  y.upload();
  for (int64_t t = 0; t < c.rows; ++t) {
    cuda::DecodeGateUp one_up = up;
    cuda::DecodeDown one_low = low;
    one_up.rows = one_low.rows = 1;
    one_up.x.data = x.device() + t * c.hidden;
    one_up.routed.router_logits = one_low.routed.router_logits =
        routed ? logits.device() + t * (c.experts + 1) : nullptr;
    one_up.expert_ids = nullptr;
    one_low.y.data = y.device() + t * c.hidden;
    if (routed) one_low.shared_gate_logit = gate.device() + t;
    run(cuda::decode_gate_up(one_up, {}));
    run(cuda::decode_down(one_low, {}));
  }
  EXPECT_TRUE(same_bits(y.download(), together));
}

TEST(FewTokenExperts, ReferenceAndRowInvariance) {
  Random random(fresh_seed());
  for (const bool fp8 : {true, false}) {
    for (const int64_t rows : {1, 2, 4, 8}) {
      check_experts(&random, {rows, 512, 128, 24, 8, 128, fp8});
      check_experts(&random, {rows, 256, 256, 512, 10, 256, fp8});
      check_experts(&random, {rows, 2048, 512, 16, 2, 512, fp8});
    }
    check_experts(&random, {3, 1024, 64, 0, 0, 3584, fp8});  // dense
    check_experts(&random, {2, 128, 64, 5, 4, 0, fp8});      // no shared expert
  }
}

TEST(FewTokenGdn, ReferenceAndRowInvariance) {
  Random random(fresh_seed());
  for (const int64_t per_key : {1, 2, 3, 4}) {
    for (const auto& [lengths, contexts] : std::vector<std::pair<std::vector<int32_t>, std::vector<int32_t>>>{
             {{1}, {5}}, {{1}, {0}}, {{8}, {3}}, {{1, 3, 1, 2}, {4, 0, 9, 7}}, {{4}, {1}}}) {
      SCOPED_TRACE(testing::Message() << "value heads per key head " << per_key << " first length " << lengths[0]);
      const GdnShape shape{2, 2 * per_key, 128, 128, 4};
      Batch batch(&random, lengths, contexts, 16);
      const int64_t tokens = batch.tokens();
      const int64_t channels = shape.channels(), values = shape.value_heads * 128;
      const int64_t columns = channels + values + 2 * shape.value_heads + 8;
      const int64_t stride = (columns + 7) / 8 * 8;
      Bf16Rows in(random.bfloat16s(tokens * stride), stride), out(random.bfloat16s(tokens * values), values);
      out.poison();
      Both<float> conv(random.floats(channels * 4, 0.5f)), a_log(random.floats(shape.value_heads)),
          dt_bias(random.floats(shape.value_heads)), norm(random.floats(128));
      const int64_t recurrent_bytes = values * 128 * 4, conv_bytes = 3 * channels * 2;
      const int64_t slot = recurrent_bytes + conv_bytes;
      std::vector<uint8_t> pool(static_cast<size_t>(slot * batch.slots));
      for (int32_t s = 0; s < batch.slots; ++s) {
        const std::vector<float> state = random.floats(values * 128, 0.1f);
        const std::vector<BFloat16> tail = random.bfloat16s(3 * channels);
        std::memcpy(pool.data() + s * slot, state.data(), static_cast<size_t>(recurrent_bytes));
        std::memcpy(pool.data() + s * slot + recurrent_bytes, tail.data(), static_cast<size_t>(conv_bytes));
      }
      Both<uint8_t> slots(pool);
      const auto mixer = [&](const SequenceBatch& step, Rows rows, void* base, Rows result, auto pointer) {
        const auto column = [&](int64_t at) {
          return Rows{static_cast<BFloat16*>(rows.data) + at, rows.dtype, rows.stride};
        };
        GdnMixer args;
        args.shape = shape;
        args.batch = step;
        args.state = {static_cast<std::byte*>(base), static_cast<std::byte*>(base) + recurrent_bytes, DType::kBFloat16,
                      slot};
        args.qkv = rows;
        args.z = column(channels);
        args.b = column(channels + values);
        args.a = column(channels + values + shape.value_heads);
        args.conv_weight = pointer(conv);
        args.a_log = pointer(a_log);
        args.dt_bias = pointer(dt_bias);
        args.norm_weight = pointer(norm);
        args.out = result;
        return args;
      };
      const auto on_device = [](const Both<float>& array) { return static_cast<const float*>(array.device()); };
      run(cuda::decode_gdn(mixer(batch.on_device(), in.device_rows(), slots.device(), out.device_rows(), on_device),
                           {}));
      const std::vector<BFloat16> together = out.download();
      const std::vector<uint8_t> state_together = slots.download();

      GdnMixer reference = mixer(batch.on_host(), in.host_rows(), slots.host.data(), out.host_rows(),
                                 [](const Both<float>& array) { return array.host.data(); });
      std::vector<uint8_t> workspace(static_cast<size_t>(gdn_mixer_workspace_bytes(shape, tokens)) + 64);
      reference.workspace = workspace.data();
      const std::vector<uint8_t> state_before = slots.host;
      reference::gdn_mixer(reference);
      EXPECT_CLOSE(together, out.host, kMixerTolerance);
      const auto states = [&](const std::vector<uint8_t>& from) {
        std::vector<float> all;
        for (int32_t s = 0; s < batch.slots; ++s) {
          const size_t at = all.size();
          all.resize(at + static_cast<size_t>(values * 128));
          std::memcpy(all.data() + at, from.data() + s * slot, static_cast<size_t>(recurrent_bytes));
        }
        return all;
      };
      const auto tails = [&](const std::vector<uint8_t>& from) {
        std::vector<uint8_t> all;
        for (int32_t s = 0; s < batch.slots; ++s) {
          all.insert(all.end(), from.begin() + s * slot + recurrent_bytes, from.begin() + (s + 1) * slot);
        }
        return all;
      };
      EXPECT_CLOSE(states(state_together), states(slots.host), kStateTolerance);
      EXPECT_EQ(tails(state_together), tails(slots.host));

      // One token at a time, each sequence alone.
      slots.host = state_before;
      slots.upload();
      out.poison();
      for (size_t s = 0; s < lengths.size(); ++s) {
        for (int32_t i = 0; i < lengths[s]; ++i) {
          const int32_t row = batch.token_begin.host[s] + i;
          Both<int32_t> begin(std::vector<int32_t>{0, 1}), position(std::vector<int32_t>{contexts[s] + i}),
              sequence(std::vector<int32_t>{0}),
              state_in(std::vector<int32_t>{i == 0 ? batch.state_in.host[s] : batch.state_out.host[s]}),
              state_out(std::vector<int32_t>{batch.state_out.host[s]});
          SequenceBatch one;
          one.sequences = one.tokens = 1;
          one.token_begin = begin.device();
          one.position = position.device();
          one.sequence = sequence.device();
          one.state_in = state_in.device();
          one.state_out = state_out.device();
          run(cuda::decode_gdn(mixer(one, {in.device() + row * stride, DType::kBFloat16, stride}, slots.device(),
                                     {out.device() + row * values, DType::kBFloat16, values}, on_device),
                               {}));
        }
      }
      EXPECT_TRUE(same_bits(out.download(), together));
      EXPECT_TRUE(same_bits(slots.download(), state_together));
    }
  }
}

TEST(FewTokenAttention, ReferenceAndRowInvariance) {
  constexpr int32_t kMiddle = cuda::kDecodeMiddleSegments, kLong = cuda::kDecodeLongSegments;  // other segments behind
  Random random(fresh_seed());
  for (const bool fp8 : {false, true}) {
    for (const auto& [query_heads, kv_heads] :
         std::vector<std::pair<int64_t, int64_t>>{{16, 2}, {4, 1}, {24, 4}, {16, 1}}) {
      for (const auto& [lengths, contexts] :
           std::vector<std::pair<std::vector<int32_t>, std::vector<int32_t>>>{{{1}, {0}},
                                                                              {{1}, {63}},
                                                                              {{1}, {700}},
                                                                              {{8}, {60}},
                                                                              {{8}, {124}},
                                                                              {{8}, {252}},
                                                                              {{5}, {8 * 256 - 2}},
                                                                              {{8}, {0}},
                                                                              {{1, 2, 1, 4}, {64, 127, 0, 1000}},
                                                                              {{3}, {5000}},
                                                                              {{8}, {32 * 128 - 3}},
                                                                              {{2}, {33 * 256}},
                                                                              {{8}, {kMiddle - 3}},
                                                                              {{1, 2, 3}, {kMiddle, 100, kMiddle - 1}},
                                                                              {{5}, {kLong - 4}},
                                                                              {{2}, {kLong + 700}}}) {
        if (contexts[0] > 4000 && kv_heads > 1) continue;  // the reference takes its time
        SCOPED_TRACE(testing::Message() << "heads " << query_heads << " " << kv_heads << " context " << contexts[0]
                                        << " length " << lengths[0] << " fp8 " << fp8);
        const int32_t page_size = std::array{16, 24, 64}[random.below(3)];
        Batch batch(&random, lengths, contexts, page_size);
        const int64_t tokens = batch.tokens();
        AttentionShape shape;
        shape.query_heads = query_heads;
        shape.kv_heads = kv_heads;
        const int64_t q_columns = query_heads * 512, kv_columns = kv_heads * 256;
        Bf16Rows q_gate(random.bfloat16s(tokens * q_columns), q_columns),
            key(random.bfloat16s(tokens * kv_columns), kv_columns),
            value(random.bfloat16s(tokens * kv_columns), kv_columns),
            out(random.bfloat16s(tokens * query_heads * 256), query_heads * 256);
        out.poison();
        Both<float> query_norm(random.floats(256, 0.3f)), key_norm(random.floats(256, 0.3f));
        const int64_t elements = static_cast<int64_t>(batch.pages) * page_size * kv_columns;
        std::vector<BFloat16> keys = random.bfloat16s(elements), values = random.bfloat16s(elements);
        std::vector<uint8_t> narrow_keys, narrow_values;
        for (size_t i = 0; i < keys.size() && fp8; ++i) {
          narrow_keys.push_back(float_to_float8_e4m3(to_float(keys[i])));
          narrow_values.push_back(float_to_float8_e4m3(to_float(values[i])));
          keys[i] = to_bfloat16(float8_e4m3_to_float(narrow_keys[i]));
          values[i] = to_bfloat16(float8_e4m3_to_float(narrow_values[i]));
        }
        Both<BFloat16> wide_k(keys), wide_v(values);
        Both<uint8_t> narrow_k(narrow_keys), narrow_v(narrow_values);
        int64_t longest = 0;
        for (size_t s = 0; s < lengths.size(); ++s) longest = std::max<int64_t>(longest, contexts[s] + lengths[s]);
        const int64_t max_context = longest <= cuda::decode_key_segment(0) ? longest : longest + 300;
        Both<uint8_t> workspace(std::vector<uint8_t>(
            static_cast<size_t>(cuda::decode_attention_workspace_bytes(shape, tokens, max_context)) + 16));
        cuda::DecodeAttention args;
        args.shape = shape;
        args.batch = batch.on_device();
        args.pages = {fp8 ? static_cast<void*>(narrow_k.device()) : wide_k.device(),
                      fp8 ? static_cast<void*>(narrow_v.device()) : wide_v.device(),
                      fp8 ? DType::kFloat8E4M3 : DType::kBFloat16,
                      page_size,
                      static_cast<int32_t>(kv_heads),
                      256};
        args.q_gate = q_gate.device_rows();
        args.key = key.device_rows();
        args.value = value.device_rows();
        args.query_norm = query_norm.device();
        args.key_norm = key_norm.device();
        args.out = out.device_rows();
        args.max_context = max_context;
        args.workspace = workspace.device();
        run(cuda::decode_attention(args, {}));
        const std::vector<BFloat16> together = out.download();

        Bf16Rows query(random.bfloat16s(tokens * query_heads * 256), query_heads * 256);
        AttentionPrepare prepare;
        prepare.shape = shape;
        prepare.batch = batch.on_host();
        prepare.pages = {
            wide_k.host.data(), wide_v.host.data(), DType::kBFloat16, page_size, static_cast<int32_t>(kv_heads), 256};
        prepare.q_gate = q_gate.host_rows();
        prepare.key = key.host_rows();
        prepare.value = value.host_rows();
        prepare.query_norm = query_norm.host.data();
        prepare.key_norm = key_norm.host.data();
        prepare.query = query.host_rows();
        reference::attention_prepare(prepare);
        const std::vector<BFloat16> got_keys = wide_k.download();
        const std::vector<uint8_t> got_narrow_keys = narrow_k.download();
        if (fp8) {
          for (size_t i = 0; i < got_narrow_keys.size(); ++i) {
            wide_k.host[i] = to_bfloat16(float8_e4m3_to_float(float_to_float8_e4m3(to_float(wide_k.host[i]))));
            wide_v.host[i] = to_bfloat16(float8_e4m3_to_float(float_to_float8_e4m3(to_float(wide_v.host[i]))));
          }
          std::vector<BFloat16> as_wide;
          for (const uint8_t code : got_narrow_keys) as_wide.push_back(to_bfloat16(float8_e4m3_to_float(code)));
          EXPECT_CLOSE(as_wide, wide_k.host, 1e-2);
        } else {
          EXPECT_CLOSE(got_keys, wide_k.host, kRoundingTolerance);
          EXPECT_CLOSE(wide_v.download(), wide_v.host, 0);
        }
        PagedAttention attention;
        attention.shape = shape;
        attention.batch = batch.on_host();
        attention.pages = prepare.pages;
        attention.query = query.host_rows();
        attention.gate = {q_gate.host.data() + 256, DType::kBFloat16, q_columns};
        attention.gate_head_stride = 512;
        attention.out = out.host_rows();
        reference::paged_attention(attention);
        EXPECT_CLOSE(together, out.host, fp8 ? 2 * kAttentionTolerance : kAttentionTolerance);

        // One token at a time over the same pages.
        out.poison();
        for (size_t s = 0; s < lengths.size(); ++s) {
          for (int32_t i = 0; i < lengths[s]; ++i) {
            const int32_t row = batch.token_begin.host[s] + i;
            Both<int32_t> begin(std::vector<int32_t>{0, 1}), position(std::vector<int32_t>{contexts[s] + i}),
                sequence(std::vector<int32_t>{0}), context(std::vector<int32_t>{contexts[s] + i});
            cuda::DecodeAttention one = args;
            one.batch.sequences = one.batch.tokens = 1;
            one.batch.token_begin = begin.device();
            one.batch.context = context.device();
            one.batch.position = position.device();
            one.batch.sequence = sequence.device();
            one.batch.page_table += static_cast<int64_t>(s) * one.batch.page_table_stride;
            one.q_gate.data = q_gate.device() + row * q_columns;
            one.key.data = key.device() + row * kv_columns;
            one.value.data = value.device() + row * kv_columns;
            one.out.data = out.device() + row * query_heads * 256;
            one.max_context = contexts[s] + i + 1;
            run(cuda::decode_attention(one, {}));
          }
        }
        EXPECT_TRUE(same_bits(out.download(), together));
      }
    }
  }
}

TEST(FewTokenAttention, RefusesPositionsWhosePageItCannotTell) {
  cuda::DecodeAttention args;
  args.shape.query_heads = args.shape.kv_heads = 1;
  args.batch.sequences = args.batch.tokens = 1;
  args.pages.page_size = 64;
  args.max_context = (1 << 20) + 1;
  EXPECT_EQ(
      cuda::decode_attention(args, {}).to_string(),
      "invalid argument: decode_attention: contexts of at most 1048576 tokens in pages of at most 4096 are taken");
  args.max_context = 100;
  args.pages.page_size = 5000;
  EXPECT_FALSE(cuda::decode_attention(args, {}).ok());
}

TEST(FewTokenArgmax, TiesAndBadValues) {
  Random random(fresh_seed());
  const int64_t vocabulary = 248077, stride = 248320, rows = 8;
  std::vector<float> values = random.floats(rows * stride);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = vocabulary; i < stride; ++i)
      values[static_cast<size_t>(t * stride + i)] = 100;  // padding, never chosen
  }
  values[static_cast<size_t>(1 * stride + 77)] = values[static_cast<size_t>(1 * stride + 200000)] = 50;
  values[static_cast<size_t>(2 * stride + 5)] = NAN;
  values[static_cast<size_t>(3 * stride + 248076)] = INFINITY;
  values[static_cast<size_t>(4 * stride + 248076)] = 60;
  for (int64_t i = 0; i < vocabulary; ++i) values[static_cast<size_t>(5 * stride + i)] = -INFINITY;
  for (int64_t i = 0; i < vocabulary; ++i) values[static_cast<size_t>(6 * stride + i)] = -3.0f;
  Both<float> logits(values);
  Both<int32_t> tokens(std::vector<int32_t>(static_cast<size_t>(rows), -7));
  Both<uint8_t> workspace(std::vector<uint8_t>(static_cast<size_t>(cuda::decode_argmax_workspace_bytes(rows)), 0));
  std::vector<int32_t> expected;
  for (int64_t t = 0; t < rows; ++t) {
    SampleRow row;
    row.logits = logits.host.data() + t * stride;
    row.vocabulary = vocabulary;
    row.temperature = 0;
    expected.push_back(reference::sample(row).token);
  }
  for (int repeat = 0; repeat < 3; ++repeat) {  // the workspace is left clean
    tokens.poison();
    run(cuda::decode_argmax({rows, vocabulary, logits.device(), stride, tokens.device(), workspace.device()}, {}));
    EXPECT_EQ(tokens.download(), expected);
  }
}

TEST(FewTokenSample, SameTokensAsTheReference) {
  Random random(fresh_seed());
  const int64_t rows = 8;
  for (const auto& [vocabulary, spread] :
       std::vector<std::pair<int64_t, float>>{{248077, 3.0f}, {1000, 1.0f}, {5, 1.0f}}) {
    for (int repeat = 0; repeat < 4; ++repeat) {
      const int64_t stride = vocabulary + 3;
      std::vector<float> values = random.floats(rows * stride, spread);
      for (float& value : values) value = std::round(value * 1024) / 1024;  // equal logits occur
      Both<float> logits(values);
      std::vector<cuda::DecodeSampleRow> parameters(static_cast<size_t>(rows));
      std::vector<int32_t> expected;
      for (int64_t t = 0; t < rows; ++t) {
        cuda::DecodeSampleRow& p = parameters[static_cast<size_t>(t)];
        p.temperature = t == 0 ? 0.0f : 0.25f * static_cast<float>(1 + random.below(6));
        p.top_k = random.below(2) ? static_cast<int32_t>(1 + random.below(60)) : 0;
        p.top_p = random.below(2) ? 0.05f * static_cast<float>(1 + random.below(19)) : 1.0f;
        p.min_p = random.below(3) ? 0.0f : 0.01f * static_cast<float>(random.below(30));
        p.seed = static_cast<uint64_t>(random.below(1 << 30)) << 20;
        p.position = random.below(300000);
        SampleRow row;
        row.logits = logits.host.data() + t * stride;
        row.vocabulary = vocabulary;
        row.temperature = p.temperature;
        row.top_k = p.top_k;
        row.top_p = p.top_p;
        row.min_p = p.min_p;
        row.seed = p.seed;
        row.position = p.position;
        expected.push_back(reference::sample(row).token);
      }
      Both<cuda::DecodeSampleRow> on_device(parameters);
      Both<int32_t> tokens(std::vector<int32_t>(static_cast<size_t>(rows), -7));
      run(cuda::decode_sample({rows, vocabulary, logits.device(), stride, on_device.device(), tokens.device()}, {}));
      EXPECT_EQ(tokens.download(), expected) << "vocabulary " << vocabulary;
    }
  }
}

TEST(FewTokenSample, GreedyAndBadValues) {
  Random random(fresh_seed());
  const int64_t rows = 8, vocabulary = 4099, stride = 4103;  // rows begin between the vectors of four
  std::vector<float> values = random.floats(rows * stride);
  const auto row = [&](int64_t t) { return values.begin() + t * stride; };
  row(0)[5] = NAN;
  row(1)[4098] = INFINITY;
  std::fill(row(2), row(2) + vocabulary, -INFINITY);
  row(3)[7] = row(3)[4000] = 9.0f;
  std::fill(row(4), row(4) + vocabulary, -INFINITY);
  row(4)[4001] = -3.0f;
  row(5)[4098] = 11.0f;
  std::fill(row(6) + vocabulary, row(6) + stride, NAN);  // padding, never read
  row(7)[0] = -NAN;
  Both<float> logits(values);
  for (const float temperature : {0.0f, 0.01f}) {
    std::vector<cuda::DecodeSampleRow> parameters(static_cast<size_t>(rows));
    std::vector<int32_t> expected;
    for (int64_t t = 0; t < rows; ++t) {
      cuda::DecodeSampleRow& p = parameters[static_cast<size_t>(t)];
      p.temperature = temperature;
      p.top_k = t % 2 == 0 ? 20 : 0;
      p.top_p = 0.9f;
      SampleRow one;
      one.logits = logits.host.data() + t * stride;
      one.vocabulary = vocabulary;
      one.temperature = p.temperature;
      one.top_k = p.top_k;
      one.top_p = p.top_p;
      expected.push_back(reference::sample(one).token);
    }
    Both<cuda::DecodeSampleRow> on_device(parameters);
    Both<int32_t> tokens(std::vector<int32_t>(static_cast<size_t>(rows), -7));
    run(cuda::decode_sample({rows, vocabulary, logits.device(), stride, on_device.device(), tokens.device()}, {}));
    EXPECT_EQ(tokens.download(), expected) << "temperature " << temperature;
  }
}

}  // namespace
}  // namespace tokenspeed::kernels
