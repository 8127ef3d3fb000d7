#include "model/presets.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "model/architecture.h"
#include "model/tensor_list.h"

namespace tokenspeed::model {
namespace {

using compile::LayerKind;
using compile::ModelConfig;

// docs: the family's published sizes, in billions of parameters with four decimals, and per-sequence costs.
struct Published {
  const char* name;
  double text_billions;
  double mtp_billions;
  int64_t linear_layers;
  int64_t full_layers;
  int64_t conv_channels;
  int64_t kv_bytes_per_token;  // bfloat16, without the MTP layer
  double state_mebibytes;      // float32 recurrent state per sequence
};

constexpr Published kPublished[] = {
    {"qwen3.5-0.8b", 0.7524, 0.0205, 18, 6, 6144, 12288, 18},
    {"qwen3.5-2b", 1.8818, 0.0608, 18, 6, 6144, 12288, 18},
    {"qwen3.5-4b", 4.2058, 0.1206, 24, 8, 8192, 32768, 48},
    {"qwen3.5-9b", 8.9538, 0.2433, 24, 8, 8192, 32768, 48},
    {"qwen3.5-27b", 26.8960, 0.4247, 48, 16, 10240, 65536, 144},
    {"qwen3.5-35b-a3b", 34.6606, 0.8446, 30, 10, 8192, 20480, 60},
    {"qwen3.5-122b-a10b", 122.1115, 2.5237, 36, 12, 12288, 24576, 144},
    {"qwen3.5-397b-a17b", 396.3464, 6.5956, 45, 15, 12288, 30720, 180},
};
constexpr double kRounding = 0.5e-4;  // of four decimals

double billions(const std::vector<TensorSpec>& tensors, bool mtp) {
  int64_t total = 0;
  for (const TensorSpec& tensor : tensors) {
    if (tensor.name.starts_with("mtp.") == mtp) total += tensor.elements() * tensor.count;
  }
  return static_cast<double>(total) * 1e-9;
}

TEST(Presets, NamesAreTheEightOfficialSizes) {
  ASSERT_EQ(preset_names().size(), std::size(kPublished));
  for (size_t i = 0; i < std::size(kPublished); ++i) EXPECT_EQ(preset_names()[i], kPublished[i].name);
}

TEST(Presets, ParametersAndCostsAreThePublished) {
  for (const Published& published : kPublished) {
    SCOPED_TRACE(published.name);
    const auto config = find_preset(published.name);
    ASSERT_TRUE(config.ok());
    EXPECT_EQ(config->name, published.name);
    EXPECT_EQ(std::count(config->layers.begin(), config->layers.end(), LayerKind::kLinearAttention),
              published.linear_layers);
    EXPECT_EQ(std::count(config->layers.begin(), config->layers.end(), LayerKind::kFullAttention),
              published.full_layers);
    const int64_t value_rows = config->linear_value_heads * config->linear_value_dim;
    EXPECT_EQ(2 * config->linear_key_heads * config->linear_key_dim + value_rows, published.conv_channels);
    EXPECT_EQ(published.full_layers * 2 * config->key_value_heads * config->head_dim * 2, published.kv_bytes_per_token);
    EXPECT_EQ(static_cast<double>(published.linear_layers * value_rows * config->linear_key_dim * 4) / (1 << 20),
              published.state_mebibytes);
    const auto graph = build_graph(*config);
    ASSERT_TRUE(graph.ok()) << graph.status().to_string();
    ASSERT_TRUE(graph->has_mtp);
    const auto tensors = list_tensors(*graph);
    EXPECT_NEAR(billions(tensors, false), published.text_billions, kRounding * 1.01);
    EXPECT_NEAR(billions(tensors, true), published.mtp_billions, kRounding * 1.01);
  }
}

TEST(Presets, UnknownNameListsAll) {
  const auto config = find_preset("qwen3.5-1b");
  ASSERT_FALSE(config.ok());
  EXPECT_EQ(config.status().code(), StatusCode::kNotFound);
  for (const std::string_view name : preset_names()) {
    EXPECT_NE(config.status().message().find(name), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace tokenspeed::model
