// Packing a Program's weights from whatever dtypes, slices and expert storage the source has.
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "runtime/cpu_weights.h"

namespace tokenspeed::runtime {
namespace {

using compile::ProgramWeight;
using compile::WeightForm;
using kernels::MatrixLayout;

class FakeSource : public compile::WeightSource {
 public:
  // Element (r, c) is base + r * columns + c: exact in bfloat16 up to 256.
  void add(const std::string& name, int64_t rows, int64_t columns, DType dtype, float base = 0) {
    Tensor& tensor = tensors_[name];
    tensor.bytes.resize(static_cast<size_t>(rows * columns) * dtype_size(dtype));
    tensor.view = {tensor.bytes.data(), dtype, {rows, columns}, nullptr};
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float value = base + static_cast<float>(i);
      if (dtype == DType::kFloat32) reinterpret_cast<float*>(tensor.bytes.data())[i] = value;
      if (dtype == DType::kBFloat16) reinterpret_cast<BFloat16*>(tensor.bytes.data())[i] = to_bfloat16(value);
      if (dtype == DType::kFloat8E4M3) {
        reinterpret_cast<uint8_t*>(tensor.bytes.data())[i] = float_to_float8_e4m3(static_cast<float>(i % 8));
      }
    }
  }
  void set_scales(const std::string& name, std::vector<float> scales) {
    tensors_[name].scales = std::move(scales);
    tensors_[name].view.scale = tensors_[name].scales.data();
  }
  bool has(const std::string& name) const override { return tensors_.contains(name); }
  Result<compile::WeightView> view(const std::string& name) const override {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) return not_found("no tensor '" + name + "'");
    return found->second.view;
  }

 private:
  struct Tensor {
    std::vector<std::byte> bytes;
    std::vector<float> scales;
    compile::WeightView view;
  };
  std::map<std::string, Tensor> tensors_;
};

ProgramWeight whole(const std::string& name, int64_t rows, int64_t columns, WeightForm form = WeightForm::kMatrix) {
  ProgramWeight weight;
  weight.name = name;
  weight.form = form;
  weight.pieces = {{name, rows, columns, 0, rows, 0, columns}};
  weight.rows = rows;
  weight.columns = columns;
  return weight;
}

Result<CpuWeights> load(const FakeSource& source, std::vector<ProgramWeight> weights, MatrixLayout layout) {
  compile::Program program;
  program.weights = std::move(weights);
  const compile::Program* pointer = &program;
  ThreadPool pool(2);
  return CpuWeights::load({&pointer, 1}, source, layout, &pool);
}

// By the layout's definition in kernels/types.h.
float element(const LoadedWeight& weight, int64_t matrix, int64_t n, int64_t k) {
  const kernels::Matrix& held = weight.matrix;
  const std::byte* data = static_cast<const std::byte*>(held.data) + matrix * weight.matrix_stride;
  int64_t index = n * held.k + k;
  if (held.layout == MatrixLayout::kPanel16) {
    const int64_t pair = held.dtype == DType::kBFloat16 ? 2 : 1;
    const int64_t steps = (held.k + pair - 1) / pair;
    index = ((n / 16 * steps + k / pair) * 16 + n % 16) * pair + k % pair;
  }
  if (held.dtype == DType::kFloat32) return reinterpret_cast<const float*>(data)[index];
  return to_float(reinterpret_cast<const BFloat16*>(data)[index]);
}

class Layouts : public testing::TestWithParam<MatrixLayout> {};

TEST_P(Layouts, HoldTheTensorsElements) {
  FakeSource source;
  source.add("wide", 20, 5, DType::kFloat32, 0.25f);
  source.add("narrow", 35, 7, DType::kBFloat16);
  const auto weights = load(source, {whole("wide", 20, 5), whole("narrow", 35, 7)}, GetParam());
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  const LoadedWeight& wide = weights->at("wide");
  EXPECT_EQ(wide.matrix.dtype, DType::kFloat32);
  EXPECT_EQ(wide.matrix.layout, GetParam());
  for (int64_t i = 0; i < 100; ++i) EXPECT_EQ(element(wide, 0, i / 5, i % 5), 0.25f + static_cast<float>(i));
  // Wanted as float32, but bfloat16 is exact and half the bytes.
  const LoadedWeight& narrow = weights->at("narrow");
  EXPECT_EQ(narrow.matrix.dtype, DType::kBFloat16);
  for (int64_t i = 0; i < 245; ++i) EXPECT_EQ(element(narrow, 0, i / 7, i % 7), static_cast<float>(i));
}

TEST_P(Layouts, PutPiecesOneBelowTheOther) {
  FakeSource source;
  source.add("a", 12, 10, DType::kBFloat16);
  source.add("b", 30, 10, DType::kFloat32);
  ProgramWeight weight = whole("ab", 10 + 20, 4);
  weight.pieces = {{"a", 12, 10, 1, 10, 3, 4}, {"b", 30, 10, 10, 20, 6, 4}};
  const auto weights = load(source, {weight}, GetParam());
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  const LoadedWeight& held = weights->at("ab");
  EXPECT_EQ(held.matrix.dtype, DType::kFloat32);
  for (int64_t n = 0; n < 30; ++n) {
    for (int64_t k = 0; k < 4; ++k) {
      const float expected = static_cast<float>(n < 10 ? (n + 1) * 10 + k + 3 : n * 10 + k + 6);
      EXPECT_EQ(element(held, 0, n, k), expected) << n << ", " << k;
    }
  }
}

TEST_P(Layouts, HoldExpertsOneAfterTheOther) {
  FakeSource source;
  ProgramWeight weight = whole("experts", 6 + 6, 4, WeightForm::kExperts);
  weight.count = 3;
  weight.dtype = DType::kBFloat16;
  weight.pieces = {{"e.*.gate", 6, 4, 0, 6, 0, 4}, {"e.*.up", 6, 4, 0, 6, 0, 4}};
  for (int e = 0; e < 3; ++e) {
    source.add("e." + std::to_string(e) + ".gate", 6, 4, DType::kFloat32, static_cast<float>(e * 64));
    source.add("e." + std::to_string(e) + ".up", 6, 4, DType::kBFloat16, static_cast<float>(e * 64 + 32));
  }
  const auto weights = load(source, {weight}, GetParam());
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  const LoadedWeight& held = weights->at("experts");
  EXPECT_EQ(held.matrix.dtype, DType::kBFloat16);
  for (int e = 0; e < 3; ++e) {
    for (int64_t n = 0; n < 12; ++n) {
      const float expected = static_cast<float>(e * 64 + (n < 6 ? n * 4 : 32 + (n - 6) * 4) + 2);
      EXPECT_EQ(element(held, e, n, 2), expected) << e << ", " << n;
    }
  }
}

TEST_P(Layouts, DequantiseFp8Blocks) {
  FakeSource source;
  source.add("w", 130, 140, DType::kFloat8E4M3);
  source.set_scales("w", {1, 2, 4, 8});  // [2, 2] blocks of 128 x 128
  const auto weights = load(source, {whole("w", 130, 140)}, GetParam());
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  for (int64_t n : {0, 127, 128, 129}) {
    for (int64_t k : {0, 127, 128, 139}) {
      const float scale = static_cast<float>(1 << (n / 128 * 2 + k / 128));
      EXPECT_EQ(element(weights->at("w"), 0, n, k), static_cast<float>((n * 140 + k) % 8) * scale) << n << ", " << k;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Both, Layouts, testing::Values(MatrixLayout::kRowMajor, MatrixLayout::kPanel16));

TEST(CpuWeightsTest, VectorsAndTablesAreNotPacked) {
  FakeSource source;
  source.add("norm", 8, 1, DType::kBFloat16);
  source.add("table", 24, 3, DType::kBFloat16);
  const auto weights =
      load(source, {whole("norm", 8, 1, WeightForm::kVector), whole("table", 24, 3, WeightForm::kTable)},
           MatrixLayout::kPanel16);
  ASSERT_TRUE(weights.ok()) << weights.status().message();
  for (int i = 0; i < 8; ++i) EXPECT_EQ(weights->at("norm").vector()[i], static_cast<float>(i));
  EXPECT_EQ(weights->at("table").matrix.layout, MatrixLayout::kRowMajor);
}

TEST(CpuWeightsTest, NamesTheTensorAtFault) {
  FakeSource source;
  source.add("w", 20, 5, DType::kFloat32);
  const auto wrong = load(source, {whole("w", 20, 6)}, MatrixLayout::kPanel16);
  ASSERT_FALSE(wrong.ok());
  EXPECT_EQ(wrong.status().code(), StatusCode::kDataLoss);
  EXPECT_NE(wrong.status().message().find("'w' has shape [20, 5]"), std::string::npos) << wrong.status().message();
  const auto missing = load(source, {whole("v", 20, 5)}, MatrixLayout::kPanel16);
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), StatusCode::kNotFound);
}

}  // namespace
}  // namespace tokenspeed::runtime
