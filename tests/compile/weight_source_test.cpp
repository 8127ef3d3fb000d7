#include "compile/weight_source.h"

#include <gtest/gtest.h>

#include <numeric>

namespace tokenspeed::compile {
namespace {

constexpr int64_t kRows = 130;  // one block row and two rows more
constexpr int64_t kColumns = 129;

template <typename T>
WeightView view_of(const std::vector<T>& data, DType dtype, std::vector<int64_t> shape, const float* scale = nullptr) {
  return {reinterpret_cast<const std::byte*>(data.data()), dtype, std::move(shape), scale};
}

TEST(WeightSource, Fp8RowsAreScaledByTheirBlock) {
  std::vector<uint8_t> data(kRows * kColumns);
  for (size_t i = 0; i < data.size(); ++i) data[i] = float_to_float8_e4m3(static_cast<float>(i % 7));
  const std::vector<float> scale = {1, 10, 100, 1000};  // [2, 2]
  const WeightView view = view_of(data, DType::kFloat8E4M3, {kRows, kColumns}, scale.data());
  std::vector<float> out(3 * kColumns);
  std::vector<BFloat16> rounded(3 * kColumns);
  read_rows_as_float(view, 127, 3, out.data());
  read_rows_as_bfloat16(view, 127, 3, rounded.data());
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t column = 0; column < kColumns; ++column) {
      const float block = scale[(127 + row) / 128 * 2 + column / 128];
      const float expected = static_cast<float>(((127 + row) * kColumns + column) % 7) * block;
      ASSERT_EQ(out[row * kColumns + column], expected) << row << " " << column;
      ASSERT_EQ(to_float(rounded[row * kColumns + column]), round_to_bfloat16(expected)) << row << " " << column;
    }
  }
}

TEST(WeightSource, EveryElementTypeReadsAlike) {
  std::vector<float> expected(6);
  std::iota(expected.begin(), expected.end(), -2.0f);
  std::vector<BFloat16> bfloat16(6);
  for (size_t i = 0; i < 6; ++i) bfloat16[i] = to_bfloat16(expected[i]);
  const std::vector<uint16_t> float16 = {0xc000, 0xbc00, 0x0000, 0x3c00, 0x4000, 0x4200};
  for (const WeightView& view :
       {view_of(expected, DType::kFloat32, {3, 2}), view_of(bfloat16, DType::kBFloat16, {3, 2}),
        view_of(float16, DType::kFloat16, {3, 2}), view_of(float16, DType::kFloat16, {3, 1, 2})}) {
    std::vector<float> out(4);
    std::vector<BFloat16> rounded(4);
    read_rows_as_float(view, 1, 2, out.data());
    read_rows_as_bfloat16(view, 1, 2, rounded.data());
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(out[i], expected[2 + i]) << dtype_name(view.dtype);
      EXPECT_EQ(to_float(rounded[i]), expected[2 + i]) << dtype_name(view.dtype);
    }
  }
}

TEST(WeightSource, AVectorHasOneColumn) {
  const std::vector<float> data = {1, 2, 3, 4};
  std::vector<float> out(2);
  read_rows_as_float(view_of(data, DType::kFloat32, {4}), 1, 2, out.data());
  EXPECT_EQ(out, (std::vector<float>{2, 3}));
}

}  // namespace
}  // namespace tokenspeed::compile
