#include "model/loader.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <nlohmann/json.hpp>

#include "model/checkpoint_builder.h"
#include "model/presets.h"

namespace tokenspeed::model {
namespace {

const std::string kSource = TOKENSPEED_SOURCE_DIR;
const std::string kDense = kSource + "/tests/goldens/random/dense-a";

void expect_error(const Result<LoadedModel>& model, StatusCode code, const std::string& expected) {
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.status().code(), code);
  EXPECT_NE(model.status().message().find(expected), std::string::npos) << model.status().message();
}

TEST(Loader, LoadsTheRepositorysCheckpoints) {
  for (const char* path : {"/tests/goldens/random/dense-a", "/tests/goldens/random/moe-a",
                           "/tests/goldens/random/moe-b", "/models/demo"}) {
    for (const LoadFormat format : {LoadFormat::kAuto, LoadFormat::kSafetensors, LoadFormat::kDummy}) {
      const auto model = load_model(kSource + path, format);
      ASSERT_TRUE(model.ok()) << model.status().to_string();
      ASSERT_TRUE(model->directory.has_value());
      EXPECT_EQ(model->directory->path(), kSource + path);
      EXPECT_EQ(model->config.mtp_layers, std::string(path) == "/models/demo" ? 1 : 0);
      EXPECT_FALSE(model->config.fp8_blocks);
      EXPECT_TRUE(model->weights->has("norm.weight"));
    }
  }
}

TEST(Loader, ReadsAnEmbeddedModelAsItsDirectory) {
  const std::string config = read_all(kDense + "/config.json");
  const std::string weights = read_all(kDense + "/model.safetensors");
  const std::array files = {EmbeddedFile{"config.json", as_bytes(config)},
                            EmbeddedFile{"model.safetensors", as_bytes(weights)}};
  const auto embedded = load_model(Directory::embedded("dense-a", files), LoadFormat::kAuto);
  ASSERT_TRUE(embedded.ok()) << embedded.status().to_string();
  const auto of_files = load_model(kDense, LoadFormat::kAuto);
  EXPECT_EQ(embedded->config.name, of_files->config.name);
  for (const char* name : {"embed_tokens.weight", "layers.3.self_attn.q_proj.weight", "norm.weight"}) {
    const auto here = embedded->weights->view(name);
    const auto there = of_files->weights->view(name);
    ASSERT_TRUE(here.ok() && there.ok()) << name;
    ASSERT_EQ(here->shape, there->shape);
    int64_t bytes = static_cast<int64_t>(dtype_size(here->dtype));
    for (const int64_t extent : here->shape) bytes *= extent;
    EXPECT_EQ(std::memcmp(here->data, there->data, static_cast<size_t>(bytes)), 0) << name;
  }
  const auto lacking = load_model(Directory::embedded("dense-a", std::span(files).first(1)), LoadFormat::kAuto);
  expect_error(lacking, StatusCode::kNotFound, "'embedded:dense-a' holds no weights");
}

TEST(Loader, PresetsNeedDummyWeights) {
  const auto model = load_model("qwen3.5-0.8b", LoadFormat::kDummy);
  ASSERT_TRUE(model.ok()) << model.status().to_string();
  EXPECT_FALSE(model->directory.has_value());
  EXPECT_EQ(model->config.hidden_size, 1024);
  EXPECT_TRUE(model->weights->has("mtp.fc.weight"));
  for (const LoadFormat format : {LoadFormat::kAuto, LoadFormat::kSafetensors}) {
    expect_error(load_model("qwen3.5-0.8b", format), StatusCode::kFailedPrecondition, "--load-format dummy");
  }
}

TEST(Loader, UnknownNameListsThePresets) {
  expect_error(load_model("qwen3.5-1b", LoadFormat::kAuto), StatusCode::kNotFound,
               "'qwen3.5-1b' is no directory: there is no preset 'qwen3.5-1b'; presets are qwen3.5-0.8b, ");
  expect_error(load_model("", LoadFormat::kDummy), StatusCode::kNotFound, "presets are");
}

class DirectoryOf : public ::testing::Test {
 protected:
  void SetUp() override {
    config_ = nlohmann::json::parse(read_all(kDense + "/config.json"));
    std::filesystem::copy_file(kDense + "/model.safetensors", directory_.path() + "/model.safetensors");
    write_config();
  }
  void write_config() { directory_.write("config.json", config_.dump()); }
  Result<LoadedModel> load(LoadFormat format = LoadFormat::kAuto) { return load_model(directory_.path(), format); }

  nlohmann::json config_;
  TemporaryDirectory directory_;
};

TEST_F(DirectoryOf, ConfigThatDoesNotFitTheWeights) {
  ASSERT_TRUE(load().ok());
  config_["text_config"]["intermediate_size"] = 321;
  write_config();
  expect_error(load(), StatusCode::kDataLoss,
               "tensor 'layers.0.mlp.gate_proj.weight' has shape [320, 192], but config.json");
  config_["text_config"]["intermediate_size"] = 320;
  config_["text_config"]["num_hidden_layers"] = 8;
  config_["text_config"].erase("layer_types");
  write_config();
  expect_error(load(), StatusCode::kNotFound, "tensor 'layers.4.input_layernorm.weight' is missing");
}

TEST_F(DirectoryOf, MissingMtpWeightsTurnTheLayerOff) {
  config_["text_config"]["mtp_num_hidden_layers"] = 1;
  write_config();
  const auto model = load();
  ASSERT_TRUE(model.ok()) << model.status().to_string();
  EXPECT_EQ(model->config.mtp_layers, 0);
}

TEST_F(DirectoryOf, WithoutWeightsOrConfig) {
  std::filesystem::remove(directory_.path() + "/model.safetensors");
  expect_error(load(), StatusCode::kNotFound, "--load-format dummy");
  EXPECT_TRUE(load(LoadFormat::kDummy).ok());
  std::filesystem::remove(directory_.path() + "/config.json");
  expect_error(load(), StatusCode::kNotFound, "config.json");
  expect_error(load(LoadFormat::kDummy), StatusCode::kNotFound, "config.json");
}

}  // namespace
}  // namespace tokenspeed::model
