#include "model/config.h"

#include <algorithm>
#include <array>

#include "base/mapped_file.h"
#include "model/config_fields.h"

namespace tokenspeed::model {
namespace {

using compile::LayerKind;
using compile::ModelConfig;
using nlohmann::json;

// Far above any model, low enough that no product of them in sizes of weights or caches reaches 2^63.
constexpr IntegerRange kWidths = {1, int64_t{1} << 17};
constexpr IntegerRange kVocabulary = {1, int64_t{1} << 22};
constexpr IntegerRange kPositions = {1, int64_t{1} << 24};
constexpr IntegerRange kLayers = {1, 1024};
constexpr IntegerRange kHeads = {1, 1024};
constexpr IntegerRange kHeadDims = {1, 1024};
constexpr IntegerRange kConvKernels = {2, 16};
constexpr IntegerRange kExperts = {1, 8192};
constexpr int64_t kFullAttentionInterval = 4;
constexpr double kPartialRotaryFactor = 0.25;
constexpr size_t kConfigFileLimit = size_t{16} << 20;

struct ModelType {
  std::string_view text;
  std::string_view family;
};
constexpr std::array<ModelType, 4> kModelTypes = {{{"qwen3_5", "qwen3_5"},
                                                   {"qwen3_5_text", "qwen3_5"},
                                                   {"qwen3_5_moe", "qwen3_5_moe"},
                                                   {"qwen3_5_moe_text", "qwen3_5_moe"}}};

std::string_view family_of(std::string_view model_type) {
  for (const ModelType& type : kModelTypes) {
    if (type.text == model_type) return type.family;
  }
  return {};
}

std::string supported_types() {
  std::string list;
  for (const ModelType& type : kModelTypes) list += (list.empty() ? "" : ", ") + std::string(type.text);
  return list;
}

void read_model_type(ConfigFields& outer, ConfigFields& text, ModelConfig& config) {
  const std::string type = outer.text("model_type", "");
  const std::string inner = text.text("model_type", type);
  for (const std::string& name : {type, inner}) {
    if (!family_of(name).empty()) continue;
    outer.fail_unsupported((name.empty() ? "'model_type' is missing" : "'model_type' " + shown(name) + " is unknown") +
                           "; supported are " + supported_types());
    return;
  }
  if (family_of(type) != family_of(inner)) {
    outer.fail_invalid("'model_type' is " + shown(type) + ", but that of 'text_config' is " + shown(inner));
  }
  config.model_type = family_of(type);
}

void read_layers(ConfigFields& text, const json& object, ModelConfig& config) {
  const int64_t count = text.integer("num_hidden_layers", kLayers);
  const int64_t interval = text.integer("full_attention_interval", kLayers, kFullAttentionInterval);
  if (!text.has("layer_types")) {
    for (int64_t i = 0; i < count; ++i) {
      config.layers.push_back((i + 1) % interval == 0 ? LayerKind::kFullAttention : LayerKind::kLinearAttention);
    }
    return;
  }
  const json& types = object["layer_types"];
  if (!types.is_array() || static_cast<int64_t>(types.size()) != count) {
    return text.fail_invalid("'layer_types' is " + shown(types) +
                             "; it must be a list of 'num_hidden_layers' = " + std::to_string(count) + " entries");
  }
  for (const json& type : types) {
    if (type == "full_attention") {
      config.layers.push_back(LayerKind::kFullAttention);
    } else if (type == "linear_attention") {
      config.layers.push_back(LayerKind::kLinearAttention);
    } else {
      return text.fail_unsupported("'layer_types' holds " + shown(type) +
                                   "; supported are \"full_attention\" and \"linear_attention\"");
    }
  }
}

// Newer files keep everything in rope_parameters, older ones theta and the factor beside it and the rest in
// rope_scaling.
void read_rope(ConfigFields& text, const std::string& where, ModelConfig& config) {
  ConfigFields rope(text.object(text.has("rope_parameters") ? "rope_parameters" : "rope_scaling"), where);
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (type != "default" && type != "mrope") {
    rope.fail_unsupported("'rope_type' " + shown(type) + " is not supported; supported is \"default\"");
  }
  const double theta = text.number("rope_theta", 1, 1e12, config.rope_theta);
  config.rope_theta = static_cast<float>(rope.number("rope_theta", 1, 1e12, theta));
  const double outer_factor = text.number("partial_rotary_factor", 0, 1, kPartialRotaryFactor);
  const double factor = rope.number("partial_rotary_factor", 0, 1, outer_factor);
  config.rotary_dim = static_cast<int64_t>(static_cast<double>(config.head_dim) * factor);
  if (config.rotary_dim < 2 || config.rotary_dim % 2 != 0) {
    rope.fail_invalid("'partial_rotary_factor' " + shown(factor) + " of 'head_dim' " + std::to_string(config.head_dim) +
                      " gives " + std::to_string(config.rotary_dim) +
                      " rotated dimensions; it must be even and at least 2");
  }
  text.fail(rope.status());
}

void require_multiple(ConfigFields& text, const char* many, int64_t count, const char* few, int64_t of) {
  if (count % of == 0) return;
  text.fail_invalid(std::string("'") + many + "' is " + std::to_string(count) + "; it must be a multiple of '" + few +
                    "' = " + std::to_string(of));
}

void read_mixers(ConfigFields& text, const std::string& where, ModelConfig& config) {
  config.attention_heads = text.integer("num_attention_heads", kHeads);
  config.key_value_heads = text.integer("num_key_value_heads", kHeads);
  require_multiple(text, "num_attention_heads", config.attention_heads, "num_key_value_heads", config.key_value_heads);
  config.head_dim = text.integer("head_dim", kHeadDims, config.head_dim);
  read_rope(text, where, config);
  text.only("attention_bias", false);
  text.only("attn_output_gate", true);

  config.linear_key_heads = text.integer("linear_num_key_heads", kHeads, config.linear_key_heads);
  config.linear_value_heads = text.integer("linear_num_value_heads", kHeads);
  require_multiple(text, "linear_num_value_heads", config.linear_value_heads, "linear_num_key_heads",
                   config.linear_key_heads);
  config.linear_key_dim = text.integer("linear_key_head_dim", kHeadDims, config.linear_key_dim);
  config.linear_value_dim = text.integer("linear_value_head_dim", kHeadDims, config.linear_value_dim);
  config.linear_conv_kernel = text.integer("linear_conv_kernel_dim", kConvKernels, config.linear_conv_kernel);
  const std::string gate = text.text("output_gate_type", "swish");
  if (gate != "swish" && gate != "silu") {
    text.fail_unsupported("'output_gate_type' " + shown(gate) + " is not supported; supported is \"swish\"");
  }
}

void read_feed_forward(ConfigFields& text, const json& object, ModelConfig& config) {
  const std::string activation = text.text("hidden_act", "silu");
  if (activation != "silu") {
    text.fail_unsupported("'hidden_act' " + shown(activation) + " is not supported; supported is \"silu\"");
  }
  if (config.model_type == "qwen3_5") {
    config.intermediate_size = text.integer("intermediate_size", kWidths);
    return;
  }
  config.experts = text.integer("num_experts", kExperts);
  config.experts_per_token = text.integer("num_experts_per_tok", {1, config.experts});
  config.expert_width = text.integer("moe_intermediate_size", kWidths);
  config.shared_expert_width = text.integer("shared_expert_intermediate_size", kWidths);
  config.normalize_top_k = text.boolean("norm_topk_prob", true);
  if (text.integer("decoder_sparse_step", kLayers, 1) != 1) {
    text.fail_unsupported("'decoder_sparse_step' must be 1: models that mix dense and expert layers are not supported");
  }
  if (text.has("mlp_only_layers") && object["mlp_only_layers"] != json::array()) {
    text.fail_unsupported("'mlp_only_layers' must be empty: models that mix dense and expert layers are not supported");
  }
}

void read_quantization(ConfigFields& fields, const std::string& where, ModelConfig& config) {
  if (!fields.has("quantization_config")) return;
  const json& object = fields.object("quantization_config");
  ConfigFields quantization(object, where + " (quantization_config)");
  const std::string method = quantization.text("quant_method", "");
  if (method != "fp8") {
    quantization.fail_unsupported(
        "'quant_method' " + shown(method) +
        " is not supported; supported are unquantised checkpoints and \"fp8\" in 128x128 blocks");
  } else if (!quantization.has("weight_block_size") || object["weight_block_size"] != json({128, 128})) {
    quantization.fail_unsupported("'weight_block_size' must be [128, 128]");
  }
  const std::string scheme = quantization.text("activation_scheme", "dynamic");
  if (scheme != "dynamic") {
    quantization.fail_unsupported("'activation_scheme' " + shown(scheme) +
                                  " is not supported; supported is \"dynamic\"");
  }
  config.fp8_blocks = true;
  fields.fail(quantization.status());
}

// generation_config.json's tokens come first: they are what the model was tuned to end a turn with.
Status add_generation_config(const Directory& directory, ModelConfig& config) {
  const Result<std::string> text = directory.read("generation_config.json", kConfigFileLimit);
  if (!text.ok()) return text.status().code() == StatusCode::kNotFound ? Status() : text.status();
  const std::string where = "generation_config.json of '" + config.name + "'";
  TS_ASSIGN_OR_RETURN(const json object, parse_json_object(*text, where));
  ConfigFields fields(object, where);
  std::vector<int32_t> ids = fields.token_ids("eos_token_id", config.vocabulary_size);
  TS_RETURN_IF_ERROR(fields.status());
  for (int32_t id : config.eos_token_ids) {
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  config.eos_token_ids = std::move(ids);
  return {};
}

}  // namespace

Result<ModelConfig> parse_config(std::string_view text_of_file, const std::string& name) {
  const std::string where = "config.json of '" + name + "'";
  TS_ASSIGN_OR_RETURN(const json object, parse_json_object(text_of_file, where));
  ConfigFields outer(object, where);
  const json& text_object = outer.has("text_config") ? outer.object("text_config") : object;
  ConfigFields text(text_object, where);

  ModelConfig config;
  config.name = name;
  read_model_type(outer, text, config);
  TS_RETURN_IF_ERROR(Status(outer.status()));
  config.hidden_size = text.integer("hidden_size", kWidths);
  config.vocabulary_size = text.integer("vocab_size", kVocabulary);
  config.max_position_embeddings = text.integer("max_position_embeddings", kPositions, config.max_position_embeddings);
  config.rms_norm_epsilon = static_cast<float>(text.number("rms_norm_eps", 0, 0.1, config.rms_norm_epsilon));
  config.tie_word_embeddings = outer.boolean("tie_word_embeddings", text.boolean("tie_word_embeddings", false));
  read_layers(text, text_object, config);
  read_mixers(text, where, config);
  read_feed_forward(text, text_object, config);
  config.mtp_layers = text.integer("mtp_num_hidden_layers", {0, 1}, 0);
  text.only("mtp_use_dedicated_embeddings", false);
  read_quantization(outer.has("quantization_config") ? outer : text, where, config);
  config.eos_token_ids = (text.has("eos_token_id") ? text : outer).token_ids("eos_token_id", config.vocabulary_size);
  TS_RETURN_IF_ERROR(Status(outer.status()));
  TS_RETURN_IF_ERROR(Status(text.status()));
  return config;
}

Result<ModelConfig> load_config(const Directory& directory) {
  TS_ASSIGN_OR_RETURN(const std::string text, directory.read("config.json", kConfigFileLimit));
  TS_ASSIGN_OR_RETURN(ModelConfig config, parse_config(text, directory.name()));
  TS_RETURN_IF_ERROR(add_generation_config(directory, config));
  return config;
}

}  // namespace tokenspeed::model
