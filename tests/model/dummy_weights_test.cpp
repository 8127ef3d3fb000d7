#include "model/dummy_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "model/architecture.h"
#include "model/presets.h"

namespace tokenspeed::model {
namespace {

using compile::ModelConfig;
using compile::WeightView;

ModelConfig small_moe() {
  ModelConfig config = *find_preset("qwen3.5-35b-a3b");
  config.hidden_size = 256;
  config.vocabulary_size = 1000;
  config.experts = 4;
  config.experts_per_token = 2;
  config.expert_width = 128;
  config.shared_expert_width = 128;
  config.layers.resize(4);
  return config;
}

std::vector<float> floats(const WeightView& view) {
  int64_t elements = 1;
  for (const int64_t extent : view.shape) elements *= extent;
  std::vector<float> out(static_cast<size_t>(elements));
  compile::read_rows_as_float(view, 0, view.shape[0], out.data());
  return out;
}

struct Moments {
  double mean = 0;
  double deviation = 0;
};

Moments moments(const std::vector<float>& values) {
  double sum = 0;
  double squares = 0;
  for (const float value : values) {
    EXPECT_TRUE(std::isfinite(value));
    sum += value;
    squares += static_cast<double>(value) * value;
  }
  const double mean = sum / static_cast<double>(values.size());
  return {mean, std::sqrt(squares / static_cast<double>(values.size()) - mean * mean)};
}

std::vector<std::string> all_names(const ModelConfig& config) {
  std::vector<std::string> names;
  for (const TensorSpec& spec : list_tensors(*build_graph(config))) {
    for (int64_t i = 0; i < spec.count; ++i) names.push_back(spec.name_of(i));
  }
  return names;
}

TEST(DummyWeights, HasEveryTensorInItsShape) {
  for (const bool fp8 : {false, true}) {
    ModelConfig config = small_moe();
    config.fp8_blocks = fp8;
    const auto weights = DummyWeights::create(config);
    ASSERT_TRUE(weights.ok()) << weights.status().to_string();
    for (const TensorSpec& spec : list_tensors(*build_graph(config))) {
      const auto view = (*weights)->view(spec.name_of(0));
      ASSERT_TRUE(view.ok()) << view.status().to_string();
      int64_t elements = 1;
      for (const int64_t extent : view->shape) elements *= extent;
      EXPECT_EQ(view->shape[0], spec.rows) << spec.name;
      EXPECT_EQ(elements, spec.elements()) << spec.name;
      EXPECT_EQ(view->dtype == DType::kFloat8E4M3, fp8 && spec.quantizable) << spec.name;
      EXPECT_EQ(view->scale != nullptr, fp8 && spec.quantizable) << spec.name;
      EXPECT_EQ(reinterpret_cast<uintptr_t>(view->data) % dtype_size(view->dtype), 0u);
    }
    EXPECT_TRUE((*weights)->has("layers.0.mlp.experts.3.up_proj.weight"));
    EXPECT_FALSE((*weights)->has("layers.0.mlp.experts.4.up_proj.weight"));
    EXPECT_FALSE((*weights)->has("layers.0.mlp.experts.*.up_proj.weight"));
    const auto missing = (*weights)->view("layers.9.norm.weight");
    ASSERT_FALSE(missing.ok());
    EXPECT_EQ(missing.status().code(), StatusCode::kNotFound);
  }
}

TEST(DummyWeights, ScalesAreThoseOfATrainedModel) {
  for (const bool fp8 : {false, true}) {
    // Block scales vary by a quarter, and a small matrix has few blocks.
    const double tolerance = fp8 ? 0.26 : 0.05;
    ModelConfig config = small_moe();
    config.fp8_blocks = fp8;
    const auto weights = DummyWeights::create(config);
    ASSERT_TRUE(weights.ok());
    for (const char* name :
         {"embed_tokens.weight", "layers.0.linear_attn.in_proj_qkv.weight", "layers.3.self_attn.o_proj.weight",
          "layers.1.mlp.experts.2.down_proj.weight", "mtp.fc.weight"}) {
      const Moments m = moments(floats(*(*weights)->view(name)));
      EXPECT_NEAR(m.deviation, 0.02, 0.02 * tolerance) << name;
      EXPECT_NEAR(m.mean, 0, 0.001) << name;
    }
    for (const float value : floats(*(*weights)->view("layers.0.input_layernorm.weight")))
      EXPECT_LE(std::fabs(value), 0.11f);
    for (const float value : floats(*(*weights)->view("layers.0.linear_attn.norm.weight")))
      EXPECT_NEAR(value, 1, 0.11f);
    for (const float value : floats(*(*weights)->view("layers.0.linear_attn.A_log"))) {
      EXPECT_GE(value, 0.0f);
      EXPECT_LE(value, std::log(16.0f));
    }
    // softplus(dt_bias) is a step in [0.001, 0.1], so one token's decay lies between exp(-1.6) and exp(-0.001).
    for (const float value : floats(*(*weights)->view("layers.0.linear_attn.dt_bias"))) {
      const float step = std::log1p(std::exp(value));
      EXPECT_GT(step, 0.0009f);
      EXPECT_LT(step, 0.11f);
    }
    EXPECT_GT(moments(floats(*(*weights)->view("layers.0.linear_attn.conv1d.weight"))).deviation, 0.2);
  }
}

TEST(DummyWeights, SameSeedSameNumbersInAnyOrder) {
  const ModelConfig config = small_moe();
  const auto first = DummyWeights::create(config, 5);
  const auto second = DummyWeights::create(config, 5);
  const auto other = DummyWeights::create(config, 6);
  ASSERT_TRUE(first.ok() && second.ok() && other.ok());
  std::vector<std::string> names = all_names(config);
  std::vector<std::vector<float>> forward;
  for (const std::string& name : names) forward.push_back(floats(*(*first)->view(name)));
  for (size_t i = names.size(); i-- > 0;) {
    EXPECT_EQ(floats(*(*second)->view(names[i])), forward[i]) << names[i];
    EXPECT_NE(floats(*(*other)->view(names[i])), forward[i]) << names[i];
  }
}

TEST(DummyWeights, TensorsAndRowsDiffer) {
  ModelConfig config = small_moe();
  config.vocabulary_size = 20'000;  // more elements than are drawn before the pool repeats itself
  const auto weights = DummyWeights::create(config);
  ASSERT_TRUE(weights.ok());
  const std::vector<float> gate = floats(*(*weights)->view("layers.0.mlp.experts.0.gate_proj.weight"));
  EXPECT_NE(gate, floats(*(*weights)->view("layers.0.mlp.experts.0.up_proj.weight")));
  EXPECT_NE(gate, floats(*(*weights)->view("layers.0.mlp.experts.1.gate_proj.weight")));
  EXPECT_NE(gate, floats(*(*weights)->view("layers.1.mlp.experts.0.gate_proj.weight")));
  // No two rows of the head alike: tokens would tie for ever.
  const auto head = (*weights)->view("lm_head.weight");
  std::vector<std::vector<float>> rows;
  for (int64_t i = 0; i < config.vocabulary_size; ++i) {
    rows.emplace_back(config.hidden_size);
    compile::read_rows_as_float(*head, i, 1, rows.back().data());
  }
  std::sort(rows.begin(), rows.end());
  EXPECT_EQ(std::adjacent_find(rows.begin(), rows.end()), rows.end());
}

}  // namespace
}  // namespace tokenspeed::model
