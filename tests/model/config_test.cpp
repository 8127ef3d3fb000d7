#include "model/config.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "model/checkpoint_builder.h"

namespace tokenspeed::model {
namespace {

using compile::LayerKind;
using compile::ModelConfig;
using nlohmann::json;

const std::string kSource = TOKENSPEED_SOURCE_DIR;

// A flat dense configuration of the keys that have no default.
json dense() {
  return {{"model_type", "qwen3_5_text"}, {"hidden_size", 64},        {"vocab_size", 100},
          {"num_hidden_layers", 8},       {"num_attention_heads", 4}, {"num_key_value_heads", 2},
          {"linear_num_value_heads", 32}, {"intermediate_size", 96}};
}

json moe() {
  json config = dense();
  config.erase("intermediate_size");
  config.update({{"model_type", "qwen3_5_moe_text"},
                 {"num_experts", 16},
                 {"num_experts_per_tok", 4},
                 {"moe_intermediate_size", 32},
                 {"shared_expert_intermediate_size", 48}});
  return config;
}

Result<ModelConfig> parse(const json& config) { return parse_config(config.dump(), "m"); }

TEST(Config, MissingKeysGetTheFamilysValues) {
  const auto config = parse(dense());
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->name, "m");
  EXPECT_EQ(config->model_type, "qwen3_5");
  EXPECT_EQ(config->head_dim, 256);
  EXPECT_EQ(config->rotary_dim, 64);
  EXPECT_EQ(config->rope_theta, 1e7f);
  EXPECT_EQ(config->rms_norm_epsilon, 1e-6f);
  EXPECT_EQ(config->linear_key_heads, 16);
  EXPECT_EQ(config->linear_key_dim, 128);
  EXPECT_EQ(config->linear_value_dim, 128);
  EXPECT_EQ(config->linear_conv_kernel, 4);
  EXPECT_EQ(config->max_position_embeddings, 262144);
  EXPECT_FALSE(config->tie_word_embeddings);
  EXPECT_FALSE(config->is_moe());
  EXPECT_EQ(config->mtp_layers, 0);
  EXPECT_FALSE(config->fp8_blocks);
  EXPECT_TRUE(config->eos_token_ids.empty());
  ASSERT_EQ(config->layers.size(), 8u);
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(config->layers[i], i % 4 == 3 ? LayerKind::kFullAttention : LayerKind::kLinearAttention) << i;
  }
  const auto experts = parse(moe());
  ASSERT_TRUE(experts.ok()) << experts.status().to_string();
  EXPECT_TRUE(experts->normalize_top_k);
  EXPECT_EQ(experts->model_type, "qwen3_5_moe");
  EXPECT_EQ(experts->shared_expert_width, 48);
}

TEST(Config, NestedAndFlatAreTheSame) {
  json inner = dense();
  inner["eos_token_id"] = 7;
  for (const char* type : {"qwen3_5_text", "qwen3_5"}) {
    inner["model_type"] = type;
    const auto nested = parse({{"model_type", "qwen3_5"}, {"text_config", inner}, {"vision_config", {{"depth", 12}}}});
    ASSERT_TRUE(nested.ok()) << nested.status().to_string();
    EXPECT_EQ(nested->hidden_size, 64);
    EXPECT_EQ(nested->intermediate_size, 96);
    EXPECT_EQ(nested->eos_token_ids, std::vector<int32_t>{7});
  }
}

TEST(Config, TyingIsReadFromTheTopFirst) {
  json inner = dense();
  inner["tie_word_embeddings"] = true;
  EXPECT_TRUE(parse(inner)->tie_word_embeddings);
  json outer = {{"model_type", "qwen3_5"}, {"text_config", inner}};
  EXPECT_TRUE(parse(outer)->tie_word_embeddings);
  outer["tie_word_embeddings"] = false;
  EXPECT_FALSE(parse(outer)->tie_word_embeddings);
}

TEST(Config, RopeParametersInTheirPlaces) {
  json config = dense();
  config["rope_parameters"] = {{"rope_theta", 5e6}, {"partial_rotary_factor", 0.5}, {"rope_type", "default"}};
  EXPECT_EQ(parse(config)->rotary_dim, 128);
  EXPECT_EQ(parse(config)->rope_theta, 5e6f);
  config.erase("rope_parameters");
  config.update({{"rope_theta", 1000000}, {"partial_rotary_factor", 1.0}, {"rope_scaling", nullptr}});
  EXPECT_EQ(parse(config)->rotary_dim, 256);
  EXPECT_EQ(parse(config)->rope_theta, 1e6f);
}

TEST(Config, Fp8Blocks) {
  json config = moe();
  config["quantization_config"] = {
      {"quant_method", "fp8"}, {"activation_scheme", "dynamic"}, {"weight_block_size", {128, 128}}};
  ASSERT_TRUE(parse(config).ok()) << parse(config).status().to_string();
  EXPECT_TRUE(parse(config)->fp8_blocks);
}

struct Refusal {
  json change;  // merged into a good configuration
  const char* expected;
};

void expect_refusals(const json& good, const std::vector<Refusal>& refusals) {
  for (const Refusal& refusal : refusals) {
    SCOPED_TRACE(refusal.change.dump().substr(0, 200));
    json config = good;
    config.update(refusal.change);
    const auto parsed = parse(config);
    ASSERT_FALSE(parsed.ok());
    const std::string& message = parsed.status().message();
    EXPECT_NE(message.find(refusal.expected), std::string::npos) << message;
    EXPECT_TRUE(message.starts_with("config.json of 'm'")) << message;
    EXPECT_LT(message.size(), 400u);
  }
}

TEST(Config, BadValuesAreNamedWithTheirLimits) {
  expect_refusals(
      dense(),
      {
          {{{"hidden_size", 0}}, "'hidden_size' is 0; it must be between 1 and 131072"},
          {{{"hidden_size", -1}}, "'hidden_size' is -1"},
          {{{"hidden_size", 1000000000000}}, "'hidden_size' is 1000000000000; it must be between 1 and 131072"},
          {{{"hidden_size", 18446744073709551615u}}, "'hidden_size' is 18446744073709551615"},
          {{{"hidden_size", 64.5}}, "'hidden_size' must be an integer between 1 and 131072, but is 64.5"},
          {{{"hidden_size", "64"}}, "but is \"64\""},
          {{{"hidden_size", {64}}}, "but is a list of 1"},
          {{{"hidden_size", nullptr}}, "'hidden_size' is missing"},
          {{{"vocab_size", 1 << 30}}, "'vocab_size' is 1073741824"},
          {{{"num_hidden_layers", 100000}}, "'num_hidden_layers' is 100000; it must be between 1 and 1024"},
          {{{"num_hidden_layers", nullptr}}, "'num_hidden_layers' is missing"},
          {{{"full_attention_interval", 0}}, "'full_attention_interval' is 0"},
          {{{"layer_types", {"full_attention"}}},
           "'layer_types' is a list of 1; it must be a list of 'num_hidden_layers' = 8"},
          {{{"layer_types", json(std::vector<std::string>(8, "sliding_attention"))}},
           "'layer_types' holds \"sliding_attention\""},
          {{{"num_attention_heads", 3}},
           "'num_attention_heads' is 3; it must be a multiple of 'num_key_value_heads' = 2"},
          {{{"num_key_value_heads", 0}}, "'num_key_value_heads' is 0"},
          {{{"linear_num_value_heads", 24}},
           "'linear_num_value_heads' is 24; it must be a multiple of 'linear_num_key_heads' = 16"},
          {{{"linear_conv_kernel_dim", 1}}, "'linear_conv_kernel_dim' is 1"},
          {{{"head_dim", 100000}}, "'head_dim' is 100000"},
          {{{"head_dim", 20}}, "gives 5 rotated dimensions"},
          {{{"partial_rotary_factor", 2}},
           "'partial_rotary_factor' must be a number above 0.0 and at most 1.0, but is 2"},
          {{{"rope_theta", "x"}}, "'rope_theta' must be a number"},
          {{{"rope_parameters", {{"rope_type", "yarn"}, {"factor", 4}}}}, "'rope_type' \"yarn\" is not supported"},
          {{{"rope_parameters", 5}}, "'rope_parameters' must be an object"},
          {{{"rms_norm_eps", 0}}, "'rms_norm_eps' must be a number above 0.0"},
          {{{"max_position_embeddings", int64_t{1} << 40}}, "'max_position_embeddings' is 1099511627776"},
          {{{"tie_word_embeddings", 1}}, "'tie_word_embeddings' must be true or false, but is 1"},
          {{{"intermediate_size", nullptr}}, "'intermediate_size' is missing"},
          {{{"hidden_act", "gelu"}}, "'hidden_act' \"gelu\" is not supported"},
          {{{"output_gate_type", "sigmoid"}}, "'output_gate_type' \"sigmoid\" is not supported"},
          {{{"attention_bias", true}}, "'attention_bias' is true; only false is supported"},
          {{{"attn_output_gate", false}}, "'attn_output_gate' is false; only true is supported"},
          {{{"mtp_num_hidden_layers", 2}}, "'mtp_num_hidden_layers' is 2; it must be between 0 and 1"},
          {{{"mtp_use_dedicated_embeddings", true}}, "'mtp_use_dedicated_embeddings' is true"},
          {{{"eos_token_id", 100}}, "'eos_token_id' is 100; it must be between 0 and 99"},
          {{{"eos_token_id", {1, -1}}}, "'eos_token_id' is -1"},
          {{{"eos_token_id", json(std::vector<int>(65, 1))}}, "'eos_token_id' lists 65 tokens; at most 64"},
          {{{"quantization_config", {{"quant_method", "gptq"}}}}, "'quant_method' \"gptq\" is not supported"},
          {{{"quantization_config", {{"quant_method", "fp8"}}}}, "'weight_block_size' must be [128, 128]"},
          {{{"quantization_config",
             {{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}, {"activation_scheme", "static"}}}},
           "'activation_scheme' \"static\" is not supported"},
          {{{"quantization_config", "fp8"}}, "'quantization_config' must be an object"},
          {{{"text_config", 3}}, "'text_config' must be an object, but is 3"},
      });
  expect_refusals(moe(),
                  {
                      {{{"num_experts", nullptr}}, "'num_experts' is missing"},
                      {{{"num_experts", 100000}}, "'num_experts' is 100000"},
                      {{{"num_experts_per_tok", 17}}, "'num_experts_per_tok' is 17; it must be between 1 and 16"},
                      {{{"moe_intermediate_size", 0}}, "'moe_intermediate_size' is 0"},
                      {{{"shared_expert_intermediate_size", nullptr}}, "'shared_expert_intermediate_size' is missing"},
                      {{{"decoder_sparse_step", 2}}, "'decoder_sparse_step' must be 1"},
                      {{{"mlp_only_layers", {0}}}, "'mlp_only_layers' must be empty"},
                  });
}

TEST(Config, UnknownModelTypesListTheSupported) {
  const char* supported = "supported are qwen3_5, qwen3_5_text, qwen3_5_moe, qwen3_5_moe_text";
  expect_refusals(dense(), {{{{"model_type", "qwen3_next"}}, supported},
                            {{{"model_type", "llama"}}, "'model_type' \"llama\" is unknown"},
                            {{{"model_type", std::string(5000, 'x')}}, supported},
                            {{{"model_type", nullptr}}, "'model_type' is missing"},
                            {{{"model_type", 5}}, "'model_type' must be a string, but is 5"},
                            {{{"model_type", "qwen3_5_moe"}, {"text_config", dense()}}, "that of 'text_config' is"}});
}

TEST(Config, WhatIsNoJsonObject) {
  for (const auto& [text, expected] :
       std::vector<std::pair<std::string, std::string>>{{"", "is not valid JSON (at byte 1 of 0)"},
                                                        {"{\"hidden_size\": ", "is not valid JSON"},
                                                        {"[1]", "must be a JSON object, but is a list of 1"},
                                                        {"{\"a\": \"\xff\"}", "is not valid JSON"},
                                                        {"{\"a\": 1e999}", "is not valid JSON"},
                                                        {std::string(100'000, '['), "is not valid JSON"}}) {
    const auto parsed = parse_config(text, "m");
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_NE(parsed.status().message().find(expected), std::string::npos) << parsed.status().message();
  }
}

TEST(Config, DirectoriesOfTheRepository) {
  const auto demo = load_config(kSource + "/models/demo/");
  ASSERT_TRUE(demo.ok()) << demo.status().to_string();
  EXPECT_EQ(demo->name, "demo");
  EXPECT_EQ(demo->mtp_layers, 1);
  EXPECT_EQ(demo->experts, 8);
  EXPECT_TRUE(demo->tie_word_embeddings);
  const json generation = json::parse(read_all(kSource + "/models/demo/generation_config.json"));
  const json& eos = generation.at("eos_token_id");
  ASSERT_FALSE(demo->eos_token_ids.empty());
  EXPECT_EQ(demo->eos_token_ids[0], (eos.is_array() ? eos[0] : eos).get<int32_t>());
  EXPECT_NE(std::find(demo->eos_token_ids.begin(), demo->eos_token_ids.end(), 6118), demo->eos_token_ids.end());

  const auto dense_a = load_config(kSource + "/tests/goldens/random/dense-a");
  ASSERT_TRUE(dense_a.ok()) << dense_a.status().to_string();
  EXPECT_EQ(dense_a->rotary_dim, 16);
  EXPECT_EQ(dense_a->attention_heads, 3);
  const auto moe_a = load_config(kSource + "/tests/goldens/random/moe-a");
  ASSERT_TRUE(moe_a.ok()) << moe_a.status().to_string();
  EXPECT_EQ(moe_a->experts_per_token, 4);
  const auto moe_b = load_config(kSource + "/tests/goldens/random/moe-b");
  ASSERT_TRUE(moe_b.ok()) << moe_b.status().to_string();
  EXPECT_TRUE(moe_b->tie_word_embeddings);
}

TEST(Config, GenerationTokensComeFirst) {
  const TemporaryDirectory directory;
  json config = dense();
  config["eos_token_id"] = 5;
  directory.write("config.json", config.dump());
  EXPECT_EQ(load_config(directory.path())->eos_token_ids, std::vector<int32_t>{5});
  directory.write("generation_config.json", R"({"eos_token_id": [7, 5]})");
  EXPECT_EQ(load_config(directory.path())->eos_token_ids, (std::vector<int32_t>{7, 5}));
  directory.write("generation_config.json", R"({"eos_token_id": [700]})");
  const auto refused = load_config(directory.path());
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("generation_config.json"), std::string::npos) << refused.status().message();
  EXPECT_EQ(load_config(std::string("/nonexistent")).status().code(), StatusCode::kNotFound);
}

TEST(Config, RandomTextNeverCrashes) {
  EXPECT_TRUE(rc::check("random text", [](const std::string& text) { (void)parse_config(text, "m"); }));
}

// Any integer in any field either is refused or leaves a configuration whose numbers are all positive.
TEST(Config, RandomValuesNeverPassUnchecked) {
  EXPECT_TRUE(rc::check("random values", [] {
    json config = *rc::gen::arbitrary<bool>() ? dense() : moe();
    std::vector<std::string> keys = {"head_dim", "linear_key_head_dim", "linear_num_key_heads",
                                     "full_attention_interval"};
    for (const auto& [key, value] : config.items()) {
      if (value.is_number()) keys.push_back(key);
    }
    const int changes = *rc::gen::inRange(1, 4);
    for (int i = 0; i < changes; ++i) {
      config[*rc::gen::elementOf(keys)] =
          *rc::gen::oneOf(rc::gen::inRange<int64_t>(-2, 300), rc::gen::arbitrary<int64_t>());
    }
    const auto parsed = parse(config);
    if (!parsed.ok()) {
      RC_ASSERT(!parsed.status().message().empty());
      return;
    }
    RC_ASSERT(parsed->hidden_size > 0);
    RC_ASSERT(parsed->rotary_dim % 2 == 0 && parsed->rotary_dim > 0 && parsed->rotary_dim <= parsed->head_dim);
    RC_ASSERT(parsed->attention_heads % parsed->key_value_heads == 0);
    RC_ASSERT(parsed->linear_value_heads % parsed->linear_key_heads == 0);
    RC_ASSERT((parsed->is_moe() ? parsed->experts_per_token <= parsed->experts : parsed->intermediate_size > 0));
    RC_ASSERT(!parsed->layers.empty() && parsed->layers.size() <= 1024u);
  }));
}

}  // namespace
}  // namespace tokenspeed::model
