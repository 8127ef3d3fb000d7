#include "model/checkpoint.h"

#include <gtest/gtest.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <sstream>

#include "model/checkpoint_builder.h"

namespace tokenspeed::model {
namespace {

using compile::WeightView;

const std::string kMoe = TOKENSPEED_SOURCE_DIR "/tests/goldens/random/moe-a";

// Every tensor of a file, to be written again in another form.
std::vector<TensorBytes> tensors_of(const std::string& path) {
  const auto file = SafetensorsFile::open(path);
  EXPECT_TRUE(file.ok()) << file.status().to_string();
  std::vector<TensorBytes> tensors;
  for (const auto& [name, tensor] : file->tensors()) {
    const std::string dtype = tensor.dtype == DType::kFloat32 ? "F32" : "BF16";
    tensors.push_back({name, dtype, tensor.shape, {reinterpret_cast<const char*>(file->data(tensor)), tensor.size}});
  }
  return tensors;
}

std::vector<float> floats(const WeightView& view) {
  int64_t elements = 1;
  for (const int64_t extent : view.shape) elements *= extent;
  std::vector<float> out(static_cast<size_t>(elements));
  compile::read_rows_as_float(view, 0, view.shape.empty() ? 1 : view.shape[0], out.data());
  return out;
}

std::unique_ptr<Checkpoint> must_open(const std::string& directory, bool tied = false) {
  auto checkpoint = Checkpoint::open(directory, tied);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status().to_string();
  return checkpoint.ok() ? std::move(*checkpoint) : nullptr;
}

std::string refusal(const std::string& directory) {
  const auto checkpoint = Checkpoint::open(directory, false);
  EXPECT_FALSE(checkpoint.ok());
  return checkpoint.status().message();
}

// One [experts, rows, columns] tensor as one matrix per expert, as the FP8 releases store them.
void split_experts(const TensorBytes& stacked, std::vector<TensorBytes>* out) {
  const bool gate_up = stacked.name.ends_with("gate_up_proj");
  const std::string prefix = stacked.name.substr(0, stacked.name.rfind('.') + 1);
  const int64_t matrices = gate_up ? 2 : 1;
  const int64_t rows = stacked.shape[1] / matrices;
  const size_t size = static_cast<size_t>(rows * stacked.shape[2] * 2);
  for (int64_t i = 0; i < stacked.shape[0] * matrices; ++i) {
    const char* projection = !gate_up ? "down_proj" : i % 2 == 0 ? "gate_proj" : "up_proj";
    out->push_back({prefix + std::to_string(i / matrices) + "." + projection + ".weight",
                    stacked.dtype,
                    {rows, stacked.shape[2]},
                    stacked.bytes.substr(static_cast<size_t>(i) * size, size)});
  }
}

TEST(Checkpoint, StackedAndSingleExpertsAreTheSame) {
  std::vector<TensorBytes> single;
  for (const TensorBytes& tensor : tensors_of(kMoe + "/model.safetensors")) {
    if (tensor.name.find(".experts.") == std::string::npos) {
      single.push_back(tensor);
    } else {
      split_experts(tensor, &single);
    }
  }
  const TemporaryDirectory directory;
  directory.write("model.safetensors", safetensors_bytes(single));
  const auto stacked_checkpoint = must_open(kMoe);
  const auto single_checkpoint = must_open(directory.path());
  for (const char* projection : {"gate_proj", "up_proj", "down_proj"}) {
    for (const int expert : {0, 7, 15}) {
      const std::string name = "layers.5.mlp.experts." + std::to_string(expert) + "." + projection + ".weight";
      const auto a = stacked_checkpoint->view(name);
      const auto b = single_checkpoint->view(name);
      ASSERT_TRUE(a.ok() && b.ok()) << name;
      EXPECT_EQ(a->shape, b->shape);
      EXPECT_EQ(a->dtype, b->dtype);
      EXPECT_EQ(floats(*a), floats(*b)) << name;
    }
  }
  EXPECT_FALSE(stacked_checkpoint->has("layers.5.mlp.experts.16.up_proj.weight"));
  EXPECT_FALSE(single_checkpoint->has("layers.5.mlp.experts.16.up_proj.weight"));
  EXPECT_FALSE(stacked_checkpoint->has("layers.5.mlp.experts.-1.up_proj.weight"));
  EXPECT_FALSE(stacked_checkpoint->has("layers.5.mlp.experts.1.side_proj.weight"));
}

TEST(Checkpoint, BothPrefixesAndTheHeadsPlaces) {
  const TemporaryDirectory directory;
  const std::string one = bytes_of(std::vector<float>{1});
  const std::string two = bytes_of(std::vector<float>{2});
  for (const auto& [body, head] :
       std::vector<std::pair<std::string, std::string>>{{"model.language_model.", "lm_head.weight"},
                                                        {"model.", "lm_head.weight"},
                                                        {"model.", "model.lm_head.weight"}}) {
    directory.write("model.safetensors",
                    safetensors_bytes({{body + "norm.weight", "F32", {1}, one}, {head, "F32", {1, 1}, two}}));
    const auto checkpoint = must_open(directory.path());
    EXPECT_EQ(floats(*checkpoint->view("norm.weight")), std::vector<float>{1});
    EXPECT_EQ(floats(*checkpoint->view("lm_head.weight")), std::vector<float>{2});
  }
}

TEST(Checkpoint, TiedHeadIsTheEmbeddingUnlessTheFileHasOne) {
  const TemporaryDirectory directory;
  const TensorBytes embedding = {"model.embed_tokens.weight", "F32", {1, 1}, bytes_of(std::vector<float>{3})};
  directory.write("model.safetensors", safetensors_bytes({embedding}));
  EXPECT_EQ(floats(*must_open(directory.path(), true)->view("lm_head.weight")), std::vector<float>{3});
  const auto untied = must_open(directory.path(), false)->view("lm_head.weight");
  ASSERT_FALSE(untied.ok());
  EXPECT_EQ(untied.status().code(), StatusCode::kNotFound);
  EXPECT_NE(untied.status().message().find("'lm_head.weight' is missing: '" + directory.path()), std::string::npos)
      << untied.status().message();
}

TEST(Checkpoint, DTypesAndUnalignedTensors) {
  const TemporaryDirectory directory;
  // One byte first: everything behind it is unaligned.
  directory.write("model.safetensors",
                  safetensors_bytes({{"odd", "U8", {1}, "x"},
                                     {"full", "F32", {2}, bytes_of(std::vector<float>{1.5f, -2})},
                                     {"half", "F16", {2}, bytes_of(std::vector<uint16_t>{0x3c00, 0xc100})},
                                     {"brain", "BF16", {1, 2}, bytes_of(std::vector<uint16_t>{0x3f80, 0xc020})}}));
  const auto checkpoint = must_open(directory.path());
  for (const auto& [name, expected] : std::vector<std::pair<std::string, std::vector<float>>>{
           {"full", {1.5f, -2}}, {"half", {1, -2.5f}}, {"brain", {1, -2.5f}}}) {
    const auto view = checkpoint->view(name);
    ASSERT_TRUE(view.ok());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(view->data) % dtype_size(view->dtype), 0u) << name;
    EXPECT_EQ(floats(*view), expected) << name;
    EXPECT_EQ(checkpoint->view(name)->data, view->data) << "a second view must be the same memory";
  }
  const auto integer = checkpoint->view("odd");
  ASSERT_FALSE(integer.ok());
  EXPECT_NE(integer.status().message().find("has dtype uint8"), std::string::npos) << integer.status().message();
}

// 130 x 260: partial last blocks both ways.
std::vector<TensorBytes> fp8_tensors(const std::string& scale_dtype) {
  const std::vector<float> scales = {0.5f, 1, 2, 4, 8, 16};
  std::vector<uint16_t> narrow;
  for (const float scale : scales) narrow.push_back(to_bfloat16(scale).bits);
  return {{"model.layers.0.mlp.up_proj.weight_scale_inv",
           scale_dtype,
           {2, 3},
           scale_dtype == "F32" ? bytes_of(scales) : bytes_of(narrow)},
          {"model.layers.0.mlp.up_proj.weight", "F8_E4M3", {130, 260}, std::string(130 * 260, '\x38')}};  // all 1.0
}

TEST(Checkpoint, Fp8BlocksWithEitherScale) {
  for (const std::string scale_dtype : {"F32", "BF16"}) {
    const TemporaryDirectory directory;
    directory.write("model.safetensors", safetensors_bytes(fp8_tensors(scale_dtype)));
    const auto checkpoint = must_open(directory.path());
    EXPECT_TRUE(checkpoint->has_fp8());
    const auto view = checkpoint->view("layers.0.mlp.up_proj.weight");
    ASSERT_TRUE(view.ok());
    const std::vector<float> values = floats(*view);
    EXPECT_EQ(values[0], 0.5f);
    EXPECT_EQ(values[127 * 260 + 128], 1);
    EXPECT_EQ(values[127 * 260 + 259], 2);
    EXPECT_EQ(values[128 * 260 + 127], 4);
    EXPECT_EQ(values[129 * 260 + 259], 16);
  }
}

TEST(Checkpoint, Fp8WithoutProperScalesIsRefused) {
  const TemporaryDirectory directory;
  std::vector<TensorBytes> tensors = fp8_tensors("F32");
  tensors[0].shape = {3, 2};
  directory.write("model.safetensors", safetensors_bytes(tensors));
  EXPECT_NE(refusal(directory.path()).find("is float32 [3, 2]; the scales of [130, 260]"), std::string::npos);
  tensors.erase(tensors.begin());
  directory.write("model.safetensors", safetensors_bytes(tensors));
  EXPECT_NE(refusal(directory.path()).find("weight_scale_inv' with its block scales is not there"), std::string::npos);
}

TEST(Checkpoint, TwoNamesOfOneWeightAreRefused) {
  const TemporaryDirectory directory;
  directory.write("model.safetensors", safetensors_bytes({{"model.norm.weight", "U8", {1}, "x"},
                                                          {"model.language_model.norm.weight", "U8", {1}, "x"}}));
  EXPECT_NE(refusal(directory.path()).find("are the same weight"), std::string::npos);
}

TEST(Checkpoint, VisionTensorsAreSkippedWithOneLine) {
  const TemporaryDirectory directory;
  directory.write("model.safetensors",
                  safetensors_bytes({{"model.visual.patch_embed.proj.weight", "U8", {1}, "x"},
                                     {"model.visual.pos_embed.weight", "U8", {1}, "x"},
                                     {"model.norm.weight", "F32", {1}, bytes_of(std::vector<float>{1})}}));
  std::ostringstream log;
  const auto previous = spdlog::default_logger();
  spdlog::set_default_logger(
      std::make_shared<spdlog::logger>("test", std::make_shared<spdlog::sinks::ostream_sink_st>(log)));
  const auto checkpoint = must_open(directory.path());
  spdlog::set_default_logger(previous);
  const std::string text = log.str();
  EXPECT_NE(text.find("2 vision tensors are skipped"), std::string::npos) << text;
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  EXPECT_FALSE(checkpoint->has("visual.pos_embed.weight"));
  EXPECT_FALSE(checkpoint->has("model.visual.pos_embed.weight"));
}

class ShardedCheckpoint : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_.write("a.safetensors",
                     safetensors_bytes({{"model.norm.weight", "F32", {1}, bytes_of(std::vector<float>{1})}}));
    directory_.write("b.safetensors",
                     safetensors_bytes({{"lm_head.weight", "F32", {1, 1}, bytes_of(std::vector<float>{2})}}));
  }
  void write_index(const std::string& weight_map) {
    directory_.write("model.safetensors.index.json",
                     R"({"metadata":{"total_size":8},"weight_map":)" + weight_map + "}");
  }
  void expect_refusal(const std::string& expected) {
    const std::string message = refusal(directory_.path());
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  }
  TemporaryDirectory directory_;
};

TEST_F(ShardedCheckpoint, TensorsComeFromTheirShards) {
  write_index(R"({"model.norm.weight":"a.safetensors","lm_head.weight":"b.safetensors"})");
  const auto checkpoint = must_open(directory_.path());
  EXPECT_EQ(floats(*checkpoint->view("norm.weight")), std::vector<float>{1});
  EXPECT_EQ(floats(*checkpoint->view("lm_head.weight")), std::vector<float>{2});
  const auto missing = checkpoint->view("layers.0.x");
  ASSERT_FALSE(missing.ok());
  EXPECT_NE(missing.status().message().find("none of the 2 safetensors files"), std::string::npos);
}

TEST_F(ShardedCheckpoint, MissingShardsAreNamed) {
  write_index(R"({"model.norm.weight":"a.safetensors","x":"c.safetensors","y":"d.safetensors"})");
  expect_refusal("2 of the 3 shards");
  expect_refusal("'c.safetensors', 'd.safetensors'");
}

TEST_F(ShardedCheckpoint, TruncatedShardIsNamed) {
  write_index(R"({"model.norm.weight":"a.safetensors","lm_head.weight":"b.safetensors"})");
  const std::string bytes = read_all(directory_.path() + "/b.safetensors");
  directory_.write("b.safetensors", bytes.substr(0, bytes.size() - 1));
  expect_refusal("b.safetensors' is not a usable safetensors file");
}

TEST_F(ShardedCheckpoint, BrokenIndexesAreRefused) {
  for (const char* escape : {"../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "a\\\\b"}) {
    SCOPED_TRACE(escape);
    write_index(std::string(R"({"model.norm.weight":")") + escape + "\"}");
    expect_refusal("shards must be files beside the index");
  }
  write_index(R"({"model.norm.weight":"b.safetensors"})");
  expect_refusal("places tensor 'model.norm.weight' in 'b.safetensors', which does not hold it");
  write_index(R"({"model.norm.weight":"a.safetensors","model.norm.weight":"a.safetensors"})");
  expect_refusal("twice");
  write_index("{}");
  expect_refusal("names no tensor");
  write_index("[]");
  expect_refusal("no object 'weight_map'");
  write_index(R"({"model.norm.weight":1})");
  expect_refusal("gives no file name for tensor 'model.norm.weight'");
  directory_.write("model.safetensors.index.json", "{");
  expect_refusal("is not valid JSON");
}

TEST_F(ShardedCheckpoint, DirectoryWithoutWeights) {
  expect_refusal("holds no weights: neither model.safetensors nor");
}

}  // namespace
}  // namespace tokenspeed::model
