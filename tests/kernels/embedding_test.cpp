#include "kernels/embedding.h"

#include "base/thread_pool.h"
#include "kernels/linear.h"
#include "kernels/test_rows.h"

namespace tokenspeed::kernels {
namespace {

TEST(Embedding, ReadsEveryLayoutAndRowExactly) {
  ThreadPool pool(2);
  constexpr int64_t kVocabulary = 37;
  constexpr int64_t kColumns = 51;
  std::mt19937 random(400);
  const std::vector<int32_t> ids = {36, 0, 5, 5, 17, 31, 32};
  const int64_t rows = static_cast<int64_t>(ids.size());
  for (const DType table_dtype : {DType::kFloat32, DType::kBFloat16}) {
    const TestRows table = TestRows(table_dtype, kVocabulary, kColumns, 0).fill(random);
    std::vector<std::byte> panels(static_cast<size_t>(packed_bytes(kVocabulary, kColumns, table_dtype)));
    pack_panels(table.view().data, table_dtype, kColumns, kVocabulary, kColumns, table_dtype, 0, 3, panels.data());
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const MatrixLayout layout : {MatrixLayout::kRowMajor, MatrixLayout::kPanel16}) {
        const void* data = layout == MatrixLayout::kRowMajor ? table.view().data : panels.data();
        const Matrix matrix{data, table_dtype, layout, kVocabulary, kColumns};
        TestRows actual(dtype, rows, kColumns);
        TestRows expected(dtype, rows, kColumns);
        cpu::embedding({rows, ids.data(), matrix, actual.view()}, pool);
        reference::embedding({rows, ids.data(), matrix, expected.view()});
        EXPECT_TRUE(actual == expected);
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t i = 0; i < kColumns; ++i) {
            ASSERT_EQ(actual.at(row, i), round_to(dtype, table.at(ids[static_cast<size_t>(row)], i)));
          }
        }
      }
    }
  }
}

TEST(GatherRows, CopiesTheNamedRows) {
  ThreadPool pool(2);
  std::mt19937 random(401);
  const std::vector<int32_t> index = {4, 0, 4};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const TestRows x = TestRows(dtype, 6, 33).fill(random);
    TestRows actual(dtype, 3, 33);
    TestRows expected(dtype, 3, 33);
    cpu::gather_rows({3, 33, index.data(), x.view(), actual.view()}, pool);
    reference::gather_rows({3, 33, index.data(), x.view(), expected.view()});
    EXPECT_TRUE(actual == expected);
    EXPECT_EQ(actual.at(2, 32), x.at(4, 32));
  }
}

}  // namespace
}  // namespace tokenspeed::kernels
