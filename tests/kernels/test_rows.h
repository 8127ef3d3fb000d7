// Rows of random values and batches of sequences for the kernel tests. Outputs start as NaN, rows have gaps.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/elements.h"

namespace tokenspeed::kernels {

// Between fp32 with sums in another order and sums in double.
inline constexpr float kFloat32Tolerance = 1e-5f;
// Two values that differ by that little may round to neighbours: one unit in the last place.
inline constexpr float kBFloat16Tolerance = 0x1.0p-7f;

inline constexpr float kFloat8Tolerance = 0x1.0p-3f;

inline float tolerance_of(DType dtype) {
  if (dtype == DType::kFloat8E4M3) return kFloat8Tolerance;
  return dtype == DType::kBFloat16 ? kBFloat16Tolerance : kFloat32Tolerance;
}

class TestRows {
 public:
  TestRows(DType dtype, int64_t rows, int64_t columns, int64_t gap = 5)
      : dtype_(dtype),
        rows_(rows),
        columns_(columns),
        stride_(columns + gap),
        bytes_(static_cast<size_t>(rows * stride_) * dtype_size(dtype), std::byte{0xff}) {}

  TestRows& fill(std::mt19937& random, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t i = 0; i < columns_; ++i) store_element(view(), row, i, normal(random));
    }
    return *this;
  }

  Rows view(int64_t first_row = 0) const {
    std::byte* begin = const_cast<std::byte*>(bytes_.data());
    return {begin + first_row * stride_ * static_cast<int64_t>(dtype_size(dtype_)), dtype_, stride_};
  }
  float at(int64_t row, int64_t column) const { return load_element(view(), row, column); }
  bool operator==(const TestRows& other) const { return bytes_ == other.bytes_; }

  // Every element within tolerance of the expected one, relative to the greatest of its row; gaps untouched.
  void expect_near(const TestRows& expected, float tolerance) const {
    for (int64_t row = 0; row < rows_; ++row) {
      float greatest = 0;
      for (int64_t i = 0; i < columns_; ++i) greatest = std::max(greatest, std::fabs(expected.at(row, i)));
      for (int64_t i = 0; i < columns_; ++i) {
        ASSERT_NEAR(at(row, i), expected.at(row, i), tolerance * greatest) << "row " << row << " column " << i;
      }
      for (int64_t i = columns_; i < stride_; ++i) ASSERT_TRUE(std::isnan(at(row, i))) << "gap of row " << row;
    }
  }

 private:
  DType dtype_;
  int64_t rows_;
  int64_t columns_;
  int64_t stride_;
  std::vector<std::byte> bytes_;
};

inline std::vector<float> random_floats(std::mt19937& random, int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// Sequences with given new tokens and contexts; pages are dealt in a shuffled order.
struct TestBatch {
  TestBatch(const std::vector<int32_t>& counts, const std::vector<int32_t>& contexts, int32_t page_size,
            uint32_t seed = 1)
      : context(contexts) {
    token_begin.push_back(0);
    int32_t pages = 0;
    for (size_t s = 0; s < counts.size(); ++s) {
      for (int32_t t = 0; t < counts[s]; ++t) {
        position.push_back(contexts[s] + t);
        sequence.push_back(static_cast<int32_t>(s));
      }
      token_begin.push_back(token_begin.back() + counts[s]);
      const int32_t needed = (contexts[s] + counts[s] + page_size - 1) / page_size;
      pages_per_sequence = std::max(pages_per_sequence, needed);
    }
    pages = pages_per_sequence * static_cast<int32_t>(counts.size());
    for (int32_t i = 0; i < pages; ++i) page_table.push_back(i);
    std::mt19937 random(seed);
    std::shuffle(page_table.begin(), page_table.end(), random);
  }

  int64_t pages() const { return static_cast<int64_t>(page_table.size()); }
  SequenceBatch view() const {
    return {static_cast<int32_t>(context.size()),
            token_begin.back(),
            token_begin.data(),
            context.data(),
            position.data(),
            sequence.data(),
            page_table.data(),
            pages_per_sequence,
            state_in.data(),
            state_out.data()};
  }

  std::vector<int32_t> token_begin, context, position, sequence, page_table, state_in, state_out;
  int32_t pages_per_sequence = 1;
};

}  // namespace tokenspeed::kernels
