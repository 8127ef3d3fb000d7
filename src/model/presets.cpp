#include "model/presets.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

namespace tokenspeed::model {
namespace {

using compile::LayerKind;
using compile::ModelConfig;

// What differs between the sizes; ModelConfig's defaults are what they share.
struct Size {
  std::string_view name;
  int64_t hidden_size;
  int64_t layers;
  int64_t attention_heads;
  int64_t key_value_heads;
  int64_t linear_value_heads;
  bool tied;
  int64_t intermediate_size;  // dense
  int64_t experts;            // mixture of experts
  int64_t experts_per_token;
  int64_t expert_width;  // the shared expert's too
};

constexpr std::array<Size, 8> kSizes = {{
    {"qwen3.5-0.8b", 1024, 24, 8, 2, 16, true, 3584, 0, 0, 0},
    {"qwen3.5-2b", 2048, 24, 8, 2, 16, true, 6144, 0, 0, 0},
    {"qwen3.5-4b", 2560, 32, 16, 4, 32, true, 9216, 0, 0, 0},
    {"qwen3.5-9b", 4096, 32, 16, 4, 32, false, 12288, 0, 0, 0},
    {"qwen3.5-27b", 5120, 64, 24, 4, 48, false, 17408, 0, 0, 0},
    {"qwen3.5-35b-a3b", 2048, 40, 16, 2, 32, false, 0, 256, 8, 512},
    {"qwen3.5-122b-a10b", 3072, 48, 32, 2, 64, false, 0, 256, 8, 1024},
    {"qwen3.5-397b-a17b", 4096, 60, 32, 2, 64, false, 0, 512, 10, 1024},
}};

constexpr std::array<std::string_view, kSizes.size()> kNames = [] {
  std::array<std::string_view, kSizes.size()> names = {};
  for (size_t i = 0; i < kSizes.size(); ++i) names[i] = kSizes[i].name;
  return names;
}();

constexpr int64_t kVocabularySize = 248320;
constexpr int32_t kEndOfTurn = 248046;
constexpr int32_t kEndOfText = 248044;
constexpr int64_t kFullAttentionInterval = 4;

ModelConfig config_of(const Size& size) {
  ModelConfig config;
  config.name = size.name;
  config.model_type = size.experts > 0 ? "qwen3_5_moe" : "qwen3_5";
  config.hidden_size = size.hidden_size;
  config.vocabulary_size = kVocabularySize;
  for (int64_t i = 1; i <= size.layers; ++i) {
    config.layers.push_back(i % kFullAttentionInterval == 0 ? LayerKind::kFullAttention : LayerKind::kLinearAttention);
  }
  config.tie_word_embeddings = size.tied;
  config.attention_heads = size.attention_heads;
  config.key_value_heads = size.key_value_heads;
  config.linear_value_heads = size.linear_value_heads;
  config.intermediate_size = size.intermediate_size;
  config.experts = size.experts;
  config.experts_per_token = size.experts_per_token;
  config.expert_width = size.expert_width;
  config.shared_expert_width = size.expert_width;
  config.mtp_layers = 1;
  config.eos_token_ids = {kEndOfTurn, kEndOfText};
  return config;
}

}  // namespace

std::span<const std::string_view> preset_names() { return kNames; }

Result<ModelConfig> find_preset(std::string_view name) {
  std::string known;
  for (const Size& size : kSizes) {
    if (size.name == name) return config_of(size);
    known += (known.empty() ? "" : ", ") + std::string(size.name);
  }
  return not_found("there is no preset '" + std::string(name) + "'; presets are " + known);
}

bool preset_has_fp8_release(std::string_view name) {
  const auto first = std::find(kNames.begin(), kNames.end(), "qwen3.5-27b");  // the smallest that has one
  return std::find(first, kNames.end(), name) != kNames.end();
}

}  // namespace tokenspeed::model
