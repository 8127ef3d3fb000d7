#include "kernels/norm.h"

#include "base/thread_pool.h"
#include "kernels/test_rows.h"

namespace tokenspeed::kernels {
namespace {

const DType kDTypes[] = {DType::kFloat32, DType::kBFloat16};

TEST(RmsNorm, EqualsTheReferenceWithAndWithoutAddition) {
  ThreadPool pool(3);
  uint32_t seed = 100;
  for (const DType dtype : kDTypes) {
    for (const int64_t columns : {1, 7, 16, 64, 100, 256, 1024, 5120}) {
      for (const int64_t rows : {0, 1, 3, 40}) {
        for (const bool with_add : {false, true}) {
          SCOPED_TRACE(testing::Message() << dtype_name(dtype) << " columns " << columns << " seed " << ++seed);
          std::mt19937 random(seed);
          TestRows x(dtype, rows, columns);
          x.fill(random, 3.0f);
          const TestRows add = TestRows(dtype, rows, columns).fill(random);
          const std::vector<float> weight = random_floats(random, columns);
          TestRows expected_x = x;
          TestRows expected(dtype, rows, columns);
          TestRows actual(dtype, rows, columns);
          const Rows added = with_add ? add.view() : Rows{};
          reference::rms_norm({rows, columns, expected_x.view(), added, weight.data(), 1e-6f, expected.view()});
          cpu::rms_norm({rows, columns, x.view(), added, weight.data(), 1e-6f, actual.view()}, pool);
          actual.expect_near(expected, tolerance_of(dtype));
          EXPECT_TRUE(x == expected_x);
          // Alone, and in place: the same bits.
          for (int64_t row = 0; row < rows; ++row) {
            cpu::rms_norm({1, columns, x.view(row), {}, weight.data(), 1e-6f, x.view(row)}, pool);
          }
          EXPECT_TRUE(x == actual);
        }
      }
    }
  }
}

TEST(GatedRmsNorm, EqualsTheReference) {
  ThreadPool pool(2);
  uint32_t seed = 200;
  for (const DType dtype : kDTypes) {
    for (const int64_t tokens : {1, 33}) {
      SCOPED_TRACE(testing::Message() << dtype_name(dtype) << " seed " << ++seed);
      std::mt19937 random(seed);
      const int64_t heads = 5;
      const int64_t columns = 128;
      TestRows x(dtype, tokens, heads * columns);
      x.fill(random);
      const TestRows z = TestRows(dtype, tokens, heads * columns).fill(random, 4.0f);
      const std::vector<float> weight = random_floats(random, columns);
      TestRows expected(dtype, tokens, heads * columns);
      reference::gated_rms_norm({tokens, heads, columns, x.view(), z.view(), weight.data(), 1e-6f, expected.view()});
      cpu::gated_rms_norm({tokens, heads, columns, x.view(), z.view(), weight.data(), 1e-6f, x.view()}, pool);
      x.expect_near(expected, tolerance_of(dtype));
    }
  }
}

TEST(HeadRmsNorm, TouchesOnlyItsHeads) {
  ThreadPool pool(2);
  for (const DType dtype : kDTypes) {
    std::mt19937 random(300);
    TestRows x(dtype, 9, 4 * 512);
    x.fill(random);
    TestRows expected = x;
    const std::vector<float> weight = random_floats(random, 256);
    reference::head_rms_norm({9, 4, 256, 512, expected.view(), weight.data(), 1e-6f});
    cpu::head_rms_norm({9, 4, 256, 512, x.view(), weight.data(), 1e-6f}, pool);
    x.expect_near(expected, tolerance_of(dtype));
  }
}

}  // namespace
}  // namespace tokenspeed::kernels
