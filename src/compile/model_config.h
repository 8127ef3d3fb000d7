// The text model's shape, as config.json states it or a preset defines it: all that the Graph depends on.
// Invariant after model::parse_config or model::preset: every field is checked (positive, consistent, within the limits
// that keep sizes below 2^63), so nothing downstream checks again.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tokenspeed::compile {

enum class LayerKind : uint8_t { kLinearAttention, kFullAttention };

struct ModelConfig {
  std::string name;        // preset name or directory name, for messages
  std::string model_type;  // "qwen3_5" or "qwen3_5_moe" (text suffix removed)
  int64_t hidden_size = 0;
  int64_t vocabulary_size = 0;
  int64_t max_position_embeddings = 262144;
  std::vector<LayerKind> layers;
  float rms_norm_epsilon = 1e-6f;
  bool tie_word_embeddings = false;

  // Full attention.
  int64_t attention_heads = 0;
  int64_t key_value_heads = 0;
  int64_t head_dim = 256;
  int64_t rotary_dim = 64;
  float rope_theta = 1e7f;

  // Gated DeltaNet.
  int64_t linear_key_heads = 16;
  int64_t linear_value_heads = 0;
  int64_t linear_key_dim = 128;
  int64_t linear_value_dim = 128;
  int64_t linear_conv_kernel = 4;

  // Dense MLP when experts == 0.
  int64_t intermediate_size = 0;
  int64_t experts = 0;
  int64_t experts_per_token = 0;
  int64_t expert_width = 0;
  int64_t shared_expert_width = 0;
  bool normalize_top_k = true;

  int64_t mtp_layers = 0;              // 0 or 1
  bool fp8_blocks = false;             // checkpoint holds official FP8 128x128 blocks
  std::vector<int32_t> eos_token_ids;  // config.json's; generation_config.json's come first where present

  bool is_moe() const { return experts > 0; }
};

}  // namespace tokenspeed::compile
