// The kernels for 9 to 64 rows against the plain references, on fresh random inputs. Seeds are printed.
#include "kernels/cuda/batch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "gpu/few_token_data.h"
#include "kernels/gated_delta_net.h"
#include "kernels/linear.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"

namespace tokenspeed::kernels {
namespace {

constexpr double kExpertsTolerance = 4e-3;  // the activation is rounded to bfloat16; now and then the other way
constexpr double kRoundingTolerance = 3e-3;
constexpr double kWideTolerance = 5e-4;   // FP8 products come from the matrix unit with 13 bits below the greatest
constexpr double kMixerTolerance = 1e-2;  // fp32 throughout, against a reference that rounds between its steps
constexpr double kStateTolerance = 5e-3;

struct ExpertsCase {
  int64_t rows, hidden, width, experts, top_k, shared_width;
  bool fp8;
  bool alike = false;  // all rows choose the same experts
};

Matrix of_expert(const Weights& weights, int64_t expert) {
  Matrix m = weights.host();
  m.data = static_cast<const uint8_t*>(m.data) + expert * weights.stride();
  if (m.scale != nullptr) m.scale += expert * weights.scale_stride();
  return m;
}

std::vector<float> feed_forward(const BFloat16* x, const Matrix& gate_up, const Matrix& down) {
  const int64_t width = down.k;
  std::vector<float> product(static_cast<size_t>(2 * width)), result(static_cast<size_t>(down.n));
  std::vector<BFloat16> act(static_cast<size_t>(width));
  Linear linear;
  linear.rows = 1;
  linear.x = {const_cast<BFloat16*>(x), DType::kBFloat16, gate_up.k};
  linear.weight = gate_up;
  linear.y = {product.data(), DType::kFloat32, 2 * width};
  reference::linear(linear);
  reference::swiglu({1, width, linear.y, {act.data(), DType::kBFloat16, width}});
  linear.x = {act.data(), DType::kBFloat16, width};
  linear.weight = down;
  linear.y = {result.data(), DType::kFloat32, down.n};
  reference::linear(linear);
  return result;
}

void check_experts(Random* random, const ExpertsCase& c) {
  SCOPED_TRACE(testing::Message() << "rows " << c.rows << " hidden " << c.hidden << " width " << c.width << " experts "
                                  << c.experts << " fp8 " << c.fp8 << " alike " << c.alike);
  const bool shared = c.shared_width > 0;
  Bf16Rows x(random->bfloat16s(c.rows * c.hidden), c.hidden), residual(random->bfloat16s(c.rows * c.hidden), c.hidden);
  Bf16Rows normed(random->bfloat16s(c.rows * c.hidden), c.hidden);
  Weights gate_up(random, c.fp8, 2 * c.width, c.hidden, c.experts), down(random, c.fp8, c.hidden, c.width, c.experts);
  Weights shared_gate_up(random, c.fp8, std::max<int64_t>(2 * c.shared_width, 128), c.hidden);
  Weights shared_down(random, c.fp8, c.hidden, std::max<int64_t>(c.shared_width, 64));
  std::vector<float> logit_values = random->floats(c.rows * (c.experts + 1));
  for (float& value : logit_values) value = std::round(value * 64) / 64;  // ties
  if (c.alike) {
    for (size_t i = 0; i < logit_values.size(); ++i) logit_values[i] = logit_values[i % (c.experts + 1)];
  }
  FloatRows logits(logit_values, c.experts + 1);
  FloatRows gate(random->floats(c.rows), 1);
  Both<float> norm_weight(random->floats(c.hidden, 0.3f));

  cuda::BatchExperts args;
  args.rows = c.rows;
  args.experts = c.experts;
  args.top_k = c.top_k;
  args.router_logits = logits.device();
  args.router_stride = c.experts + 1;
  args.hidden = c.hidden;
  args.width = c.width;
  args.x = x.device_rows();
  args.gate_up = gate_up.device();
  args.down = down.device();
  if (shared) {
    args.shared_gate_up = shared_gate_up.device();
    args.shared_down = shared_down.device();
    args.shared_width = c.shared_width;
  }
  Both<std::byte> workspace(std::vector<std::byte>(static_cast<size_t>(
      cuda::batch_experts_workspace_bytes(c.rows, c.experts, c.top_k, c.hidden, c.width, c.shared_width))));
  args.workspace = workspace.device();
  cuda::BatchNorm end;
  end.rows = c.rows;
  end.columns = c.hidden;
  end.x = residual.device_rows();
  end.experts = cuda::batch_experts_output(args);
  end.top_k = c.top_k;
  end.shared_gate_logit = shared ? gate.device() : nullptr;
  end.norm_weight = norm_weight.device();
  end.out = normed.device_rows();
  ASSERT_TRUE(cuda::batch_experts_fits(args));
  const auto compute = [&] {
    workspace.poison();
    residual.upload();
    normed.poison();
    run(cuda::batch_experts(args, {}));
    run(cuda::batch_norm(end, {}));
  };
  compute();
  const std::vector<BFloat16> sums = residual.download(), norms = normed.download();

  std::vector<float> expected;
  for (const BFloat16 value : residual.host) expected.push_back(to_float(value));
  for (int64_t t = 0; t < c.rows; ++t) {
    std::vector<int32_t> ids(static_cast<size_t>(c.top_k));
    std::vector<float> weights(ids.size());
    reference::moe_router(
        {1, c.experts, c.top_k, true, logits.host.data() + t * (c.experts + 1), ids.data(), weights.data()});
    const BFloat16* const row = x.host.data() + t * c.hidden;
    const auto add = [&](const std::vector<float>& part, float factor) {
      for (int64_t n = 0; n < c.hidden; ++n)
        expected[static_cast<size_t>(t * c.hidden + n)] += factor * part[static_cast<size_t>(n)];
    };
    for (size_t i = 0; i < ids.size(); ++i)
      add(feed_forward(row, of_expert(gate_up, ids[i]), of_expert(down, ids[i])), weights[i]);
    if (shared)
      add(feed_forward(row, shared_gate_up.host(), shared_down.host()),
          1.0f / (1.0f + std::exp(-gate.host[static_cast<size_t>(t)])));
  }
  std::vector<float> got;
  for (const BFloat16 value : sums) got.push_back(to_float(value));
  EXPECT_CLOSE(got, expected, kExpertsTolerance);
  std::vector<BFloat16> rounded(expected.size()), expected_norms(expected.size());
  std::transform(expected.begin(), expected.end(), rounded.begin(), to_bfloat16);
  reference::rms_norm({.rows = c.rows,
                       .columns = c.hidden,
                       .x = {rounded.data(), DType::kBFloat16, c.hidden},
                       .weight = norm_weight.host.data(),
                       .out = {expected_norms.data(), DType::kBFloat16, c.hidden}});
  EXPECT_CLOSE(norms, expected_norms, kExpertsTolerance);
  compute();
  EXPECT_TRUE(same_bits(residual.download(), sums)) << "not the same again";

  // The last row alone.
  const int64_t t = c.rows - 1;
  args.rows = end.rows = 1;
  args.x.data = x.device() + t * c.hidden;
  args.router_logits = logits.device() + t * (c.experts + 1);
  end.x.data = residual.device() + t * c.hidden;
  end.experts = cuda::batch_experts_output(args);
  if (shared) end.shared_gate_logit = gate.device() + t;
  compute();
  const std::vector<BFloat16> alone = residual.download();
  EXPECT_TRUE(same_bits(std::vector<BFloat16>(alone.begin() + t * c.hidden, alone.begin() + (t + 1) * c.hidden),
                        std::vector<BFloat16>(sums.begin() + t * c.hidden, sums.begin() + (t + 1) * c.hidden)))
      << "a row's bits depend on the others";
}

TEST(BatchExperts, ReferenceAndRowInvariance) {
  Random random(fresh_seed());
  for (const ExpertsCase& c :
       {ExpertsCase{9, 256, 128, 32, 8, 128, true}, ExpertsCase{17, 512, 256, 40, 4, 128, true},
        ExpertsCase{33, 384, 128, 256, 8, 256, true}, ExpertsCase{64, 256, 128, 16, 8, 128, true},
        ExpertsCase{40, 256, 128, 8, 2, 0, true, true}, ExpertsCase{64, 256, 128, 64, 10, 128, true, true},
        ExpertsCase{32, 1024, 128, 300, 10, 128, true}, ExpertsCase{9, 256, 64, 32, 8, 64, false},
        ExpertsCase{33, 384, 192, 24, 8, 64, false}, ExpertsCase{64, 128, 64, 12, 4, 0, false},
        ExpertsCase{48, 128, 128, 12, 4, 192, false, true}}) {
    check_experts(&random, c);
  }
}

struct LinearCase {
  int64_t rows, k;
  std::vector<std::pair<int64_t, bool>> segments;  // n, FP8
  bool accumulate = false;
  bool wide = false;
};

void check_linear(Random* random, const LinearCase& c) {
  SCOPED_TRACE(testing::Message() << "rows " << c.rows << " k " << c.k << " n " << c.segments[0].first << " segments "
                                  << c.segments.size() << " fp8 " << c.segments[0].second);
  Bf16Rows x(random->bfloat16s(c.rows * c.k), c.k);
  std::vector<std::unique_ptr<Weights>> weights;
  std::vector<std::unique_ptr<FloatRows>> wide;
  std::vector<std::unique_ptr<Bf16Rows>> narrow;
  cuda::BatchLinear args;
  args.rows = c.rows;
  args.x = x.device_rows();
  for (const auto& [n, fp8] : c.segments) {
    weights.push_back(std::make_unique<Weights>(random, fp8, n, c.k));
    wide.push_back(std::make_unique<FloatRows>(random->floats(c.rows * n), n));
    narrow.push_back(std::make_unique<Bf16Rows>(random->bfloat16s(c.rows * n), n));
    args.segments[args.segment_count++] = {
        weights.back()->device(), c.wide ? wide.back()->device_rows() : narrow.back()->device_rows(), c.accumulate};
  }
  ASSERT_TRUE(cuda::batch_linear_fits(args));
  const auto outputs = [&] {
    std::vector<float> all;
    for (size_t i = 0; i < wide.size(); ++i) {
      for (const float value : wide[i]->download()) all.push_back(c.wide ? value : 0.0f);
      for (const BFloat16 value : narrow[i]->download()) all.push_back(c.wide ? 0.0f : to_float(value));
    }
    return all;
  };
  const auto compute = [&](const cuda::BatchLinear& a) {
    for (size_t i = 0; i < wide.size(); ++i) {
      wide[i]->upload();
      narrow[i]->upload();
      if (c.accumulate) continue;
      c.wide ? wide[i]->poison() : narrow[i]->poison();
    }
    run(cuda::batch_linear(a, {}));
    return outputs();
  };
  const std::vector<float> got = compute(args);
  Both<std::byte> split(std::vector<std::byte>(static_cast<size_t>(cuda::batch_split_bytes(c.rows, c.k))));
  split.poison();
  run(cuda::batch_split(args.x, c.rows, c.k, split.device(), {}));
  args.split = split.device();
  EXPECT_TRUE(same_bits(compute(args), got)) << "other bits with rows that were split before";
  std::vector<float> expected;
  for (size_t i = 0; i < weights.size(); ++i) {
    Linear linear;
    linear.rows = c.rows;
    linear.x = x.host_rows();
    linear.weight = weights[i]->host();
    linear.y = c.wide ? wide[i]->host_rows() : narrow[i]->host_rows();
    linear.accumulate = c.accumulate;
    reference::linear(linear);
    for (const float value : wide[i]->host) expected.push_back(c.wide ? value : 0.0f);
    for (const BFloat16 value : narrow[i]->host) expected.push_back(c.wide ? 0.0f : to_float(value));
  }
  EXPECT_CLOSE(got, expected, c.wide ? kWideTolerance : kRoundingTolerance);
}

TEST(BatchLinear, AgainstReference) {
  Random random(fresh_seed());
  for (const LinearCase& c :
       {LinearCase{9, 512, {{640, true}}}, LinearCase{17, 2048, {{1024, true}, {512, true}, {32, false}, {16, false}}},
        LinearCase{33, 1024, {{384, true}}, true}, LinearCase{64, 4096, {{512, true}}, true},
        LinearCase{16, 256, {{1000, false}}}, LinearCase{32, 2048, {{256, false}, {1, false}}, false, true},
        LinearCase{64, 2048, {{256, false}, {1, false}}, false, true}, LinearCase{48, 256, {{128, true}}, false, true},
        LinearCase{32, 2048, {{12288, true}, {64, false}}}, LinearCase{64, 2176, {{300, false}}, true}}) {
    check_linear(&random, c);
  }
}

TEST(BatchNorm, WithoutExperts) {
  Random random(fresh_seed());
  for (const int64_t columns : {64, 2048, 5120}) {
    const int64_t rows = 33;
    Bf16Rows x(random.bfloat16s(rows * columns), columns), out(random.bfloat16s(rows * columns), columns);
    Both<float> weight(random.floats(columns, 0.3f));
    out.poison();
    cuda::BatchNorm args;
    args.rows = rows;
    args.columns = columns;
    args.x = x.device_rows();
    args.norm_weight = weight.device();
    args.out = out.device_rows();
    Both<std::byte> split(std::vector<std::byte>(static_cast<size_t>(cuda::batch_split_bytes(rows, columns))));
    Both<std::byte> split_again(split.host);
    if (columns % 128 == 0) args.split = split.device();
    run(cuda::batch_norm(args, {}));
    if (columns % 128 == 0) {
      split.poison();
      split_again.poison();
      run(cuda::batch_norm(args, {}));
      run(cuda::batch_split(args.out, rows, columns, split_again.device(), {}));
      EXPECT_EQ(split.download(), split_again.download());
    }
    reference::rms_norm(
        {.rows = rows, .columns = columns, .x = x.host_rows(), .weight = weight.host.data(), .out = out.host_rows()});
    EXPECT_CLOSE(out.download(), out.host, kRoundingTolerance);
  }
}

void check_gdn(Random* random, const GdnShape& shape, int32_t sequences) {
  SCOPED_TRACE(testing::Message() << shape.key_heads << " key heads, " << shape.value_heads << " value heads, "
                                  << sequences << " sequences");
  std::vector<int32_t> contexts;
  for (int32_t s = 0; s < sequences; ++s) contexts.push_back(s % 5 == 3 ? 0 : 7);  // some have no state yet
  Batch batch(random, std::vector<int32_t>(static_cast<size_t>(sequences), 1), contexts, 16);
  const int64_t recurrent = shape.value_heads * 128 * 128 * 4, slot = recurrent + 3 * shape.channels() * 2;
  Both<std::byte> memory(std::vector<std::byte>(static_cast<size_t>(slot * batch.slots)));
  for (int32_t i = 0; i < batch.slots; ++i) {
    const std::vector<float> states = random->floats(recurrent / 4, 0.1f);
    const std::vector<BFloat16> conv = random->bfloat16s(3 * shape.channels());
    std::memcpy(memory.host.data() + i * slot, states.data(), static_cast<size_t>(recurrent));
    std::memcpy(memory.host.data() + i * slot + recurrent, conv.data(), conv.size() * 2);
  }
  memory.upload();
  const int64_t values = shape.value_heads * 128;
  const int64_t stride = (shape.channels() + values + 2 * shape.value_heads + 7) / 8 * 8;
  Bf16Rows projected(random->bfloat16s(sequences * stride), stride), out(random->bfloat16s(sequences * values), values);
  Both<float> taps(random->floats(shape.channels() * 4, 0.5f)), a_log(random->floats(shape.value_heads)),
      dt_bias(random->floats(shape.value_heads)), norm(random->floats(128));
  const auto make = [&](bool device, void* workspace) {
    const auto pick = [&](Both<float>& array) { return device ? array.device() : array.host.data(); };
    const Rows all = device ? projected.device_rows() : projected.host_rows();
    const auto part = [&](int64_t column) {
      return Rows{static_cast<BFloat16*>(all.data) + column, DType::kBFloat16, stride};
    };
    std::byte* const base = device ? memory.device() : memory.host.data();
    return GdnMixer{shape,
                    device ? batch.on_device() : batch.on_host(),
                    {base, base + recurrent, DType::kBFloat16, slot},
                    all,
                    part(shape.channels()),
                    part(shape.channels() + values),
                    part(shape.channels() + values + shape.value_heads),
                    pick(taps),
                    pick(a_log),
                    pick(dt_bias),
                    pick(norm),
                    1e-6f,
                    device ? out.device_rows() : out.host_rows(),
                    workspace};
  };
  out.poison();
  Both<std::byte> split(std::vector<std::byte>(static_cast<size_t>(cuda::batch_split_bytes(sequences, values))));
  Both<std::byte> split_again(split.host);
  split.poison();
  split_again.poison();
  run(cuda::batch_gdn(make(true, nullptr), split.device(), {}));
  run(cuda::batch_split(out.device_rows(), sequences, values, split_again.device(), {}));
  EXPECT_EQ(split.download(), split_again.download());
  std::vector<std::byte> workspace(static_cast<size_t>(gdn_mixer_workspace_bytes(shape, sequences)));
  reference::gdn_mixer(make(false, workspace.data()));
  EXPECT_CLOSE(out.download(), out.host, kMixerTolerance);
  const std::vector<std::byte> got = memory.download();
  for (const int32_t written : batch.state_out.host) {
    const auto floats = [&](const std::vector<std::byte>& bytes) {
      std::vector<float> state(static_cast<size_t>(recurrent / 4));
      std::memcpy(state.data(), bytes.data() + written * slot, static_cast<size_t>(recurrent));
      return state;
    };
    EXPECT_CLOSE(floats(got), floats(memory.host), kStateTolerance);
    EXPECT_EQ(std::memcmp(got.data() + written * slot + recurrent, memory.host.data() + written * slot + recurrent,
                          static_cast<size_t>(slot - recurrent)),
              0);
  }
}

TEST(BatchGdn, AgainstReference) {
  Random random(fresh_seed());
  check_gdn(&random, {2, 4, 128, 128, 4}, 9);
  check_gdn(&random, {1, 1, 128, 128, 4}, 33);
  check_gdn(&random, {2, 8, 128, 128, 4}, 17);
  check_gdn(&random, {2, 6, 128, 128, 4}, 64);
}

}  // namespace
}  // namespace tokenspeed::kernels
