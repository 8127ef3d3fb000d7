#include "kernels/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "kernels/cpu/linear_with.h"
#include "kernels/elements.h"
#include "kernels/norm.h"

namespace tokenspeed::kernels {
namespace {

using cpu::InstructionSet;

// An fp32 sum of k products of magnitude below 1, added one by one, against double: the errors of a random walk grow as
// k (steps times its width), a twelfth of this.
constexpr float kSumTolerancePerK = 0x1.0p-22f;
// One rounding to bfloat16 may fall to the other side: one unit in the last place.
constexpr float kBFloat16Tolerance = 0x1.0p-7f;

struct DTypes {
  DType x;
  DType weight;
  DType y;
};

constexpr DTypes kDTypes[] = {
    {DType::kFloat32, DType::kFloat32, DType::kFloat32},    {DType::kFloat32, DType::kBFloat16, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kBFloat16, DType::kFloat32},
    {DType::kBFloat16, DType::kFloat32, DType::kBFloat16},
};

std::vector<InstructionSet> available_sets() {
  std::vector<InstructionSet> sets;
  for (InstructionSet set : {InstructionSet::kAvx2, InstructionSet::kAvx512, InstructionSet::kAvx512Bf16}) {
    if (set <= cpu::instruction_set()) sets.push_back(set);
  }
  return sets;
}

using Bytes = std::vector<std::byte>;

Bytes random_values(DType dtype, int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  Bytes bytes(static_cast<size_t>(count) * dtype_size(dtype));
  for (int64_t i = 0; i < count; ++i) store_element(dtype, bytes.data(), i, uniform(generator));
  return bytes;
}

Bytes packed(const Bytes& row_major, DType dtype, int64_t n, int64_t k) {
  Bytes out(static_cast<size_t>(packed_bytes(n, k, dtype)), std::byte{0xff});
  pack_panels(row_major.data(), dtype, k, n, k, dtype, 0, (n + 15) / 16, out.data());
  return out;
}

// One product with its buffers. Rows of x and y are longer than k and n; y starts as random values.
struct Problem {
  DTypes dtypes;
  int64_t rows, n, k;
  int64_t x_stride, y_stride;
  Bytes x, weight, panels, y;
  std::vector<float> norm_weight;
  Bytes workspace;

  Problem(DTypes dtypes, int64_t rows, int64_t n, int64_t k, uint32_t seed)
      : dtypes(dtypes), rows(rows), n(n), k(k), x_stride(k + 3), y_stride(n + 5) {
    x = random_values(dtypes.x, (rows - 1) * x_stride + k, seed);
    weight = random_values(dtypes.weight, n * k, seed + 1);
    panels = packed(weight, dtypes.weight, n, k);
    y = random_values(dtypes.y, rows * y_stride, seed + 2);
    const Bytes norm = random_values(DType::kFloat32, k, seed + 3);
    norm_weight.resize(static_cast<size_t>(k));
    std::memcpy(norm_weight.data(), norm.data(), norm.size());
    workspace.resize(static_cast<size_t>(linear_workspace_bytes(rows, k, dtypes.x, true)));
  }

  Linear args(MatrixLayout layout, Bytes& out, bool accumulate) {
    const Bytes& data = layout == MatrixLayout::kPanel16 ? panels : weight;
    return {.rows = rows,
            .x = {x.data(), dtypes.x, x_stride},
            .weight = {.data = data.data(), .dtype = dtypes.weight, .layout = layout, .n = n, .k = k},
            .y = {out.data(), dtypes.y, y_stride},
            .accumulate = accumulate};
  }

  std::string name() const {
    return std::string(dtype_name(dtypes.x)) + " x " + std::string(dtype_name(dtypes.weight)) + " -> " +
           std::string(dtype_name(dtypes.y)) + " rows " + std::to_string(rows) + " n " + std::to_string(n) + " k " +
           std::to_string(k);
  }
};

// Every cell of y, the gaps between rows bit for bit.
void expect_near(const Problem& problem, const Bytes& actual, const Bytes& expected) {
  const float relative = problem.dtypes.y == DType::kBFloat16 ? kBFloat16Tolerance : 0.0f;
  for (int64_t row = 0; row < problem.rows; ++row) {
    for (int64_t column = 0; column < problem.y_stride; ++column) {
      const float a = load_element(problem.dtypes.y, actual.data(), row * problem.y_stride + column);
      const float e = load_element(problem.dtypes.y, expected.data(), row * problem.y_stride + column);
      const float tolerance =
          column < problem.n ? kSumTolerancePerK * static_cast<float>(problem.k) + relative * std::fabs(e) : 0.0f;
      ASSERT_NEAR(a, e, tolerance) << problem.name() << " at row " << row << " column " << column;
    }
  }
}

struct Shape {
  int64_t rows, n, k;
};

// Rows through every tile height and over a row block, n and k off every multiple, k over one and two packed blocks.
constexpr Shape kShapes[] = {{1, 1, 1},    {1, 16, 32},  {1, 200, 301}, {2, 33, 64},   {3, 70, 127},   {4, 64, 33},
                             {5, 50, 65},  {6, 49, 16},  {7, 100, 17},  {8, 48, 48},   {9, 31, 100},   {13, 65, 255},
                             {17, 80, 96}, {64, 96, 40}, {70, 37, 129}, {129, 40, 67}, {130, 35, 2301}};

TEST(Linear, MatchesTheReferenceOnEveryInstructionSet) {
  ThreadPool pool(3);
  uint32_t seed = 1;
  for (const DTypes& dtypes : kDTypes) {
    for (const Shape& shape : kShapes) {
      Problem problem(dtypes, shape.rows, shape.n, shape.k, seed += 10);
      for (const bool accumulate : {false, true}) {
        Bytes expected = problem.y;
        reference::linear(problem.args(MatrixLayout::kRowMajor, expected, accumulate));
        for (InstructionSet set : available_sets()) {
          SCOPED_TRACE(std::string(cpu::instruction_set_name(set)) + " seed " + std::to_string(seed));
          Bytes actual = problem.y;
          cpu::linear(problem.args(MatrixLayout::kPanel16, actual, accumulate), pool, set);
          expect_near(problem, actual, expected);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(Linear, ReferenceReadsPanelsAsRowMajor) {
  for (const DTypes& dtypes : kDTypes) {
    Problem problem(dtypes, 3, 37, 51, 99);
    Bytes row_major = problem.y;
    Bytes panels = problem.y;
    reference::linear(problem.args(MatrixLayout::kRowMajor, row_major, false));
    reference::linear(problem.args(MatrixLayout::kPanel16, panels, false));
    EXPECT_EQ(row_major, panels) << problem.name();
  }
}

TEST(Linear, ReferenceAppliesFloat8BlockScales) {
  constexpr int64_t kN = 130;
  constexpr int64_t kK = 257;
  std::vector<uint8_t> weight(kN * kK);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = float_to_float8_e4m3(static_cast<float>(i % 13) - 6.0f);
  const std::vector<float> scale = {0.5f, 2.0f, 4.0f, 8.0f, 16.0f, 32.0f};  // [2, 3] blocks of 128 x 128
  std::vector<float> x(kK, 0.0f);
  std::vector<float> y(kN);
  for (const int64_t column : {int64_t{0}, int64_t{128}, int64_t{256}}) {
    x.assign(kK, 0.0f);
    x[static_cast<size_t>(column)] = 1.0f;
    reference::linear(
        {.rows = 1,
         .x = {x.data(), DType::kFloat32, kK},
         .weight = {.data = weight.data(), .dtype = DType::kFloat8E4M3, .n = kN, .k = kK, .scale = scale.data()},
         .y = {y.data(), DType::kFloat32, kN}});
    for (int64_t n = 0; n < kN; ++n) {
      const float value = static_cast<float>((n * kK + column) % 13) - 6.0f;
      ASSERT_EQ(y[static_cast<size_t>(n)], value * scale[static_cast<size_t>(n / 128 * 3 + column / 128)]) << n;
    }
  }
}

TEST(Linear, RowsDoNotDependOnOtherRowsOrThreads) {
  constexpr int64_t kRows = 140;
  ThreadPool one(1);
  ThreadPool four(4);
  for (const DTypes& dtypes : kDTypes) {
    for (InstructionSet set : available_sets()) {
      Problem all(dtypes, kRows, 83, 1301, 7);
      Bytes expected = all.y;
      cpu::linear(all.args(MatrixLayout::kPanel16, expected, true), one, set);
      const size_t y_bytes = static_cast<size_t>(all.y_stride) * dtype_size(dtypes.y);
      const size_t x_bytes = static_cast<size_t>(all.x_stride) * dtype_size(dtypes.x);
      for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 23, 127, 129, 140}) {
        const int64_t first = (kRows - rows) / 2;
        Bytes actual(all.y.begin() + static_cast<int64_t>(first * y_bytes),
                     all.y.begin() + static_cast<int64_t>((first + rows) * y_bytes));
        Linear args = all.args(MatrixLayout::kPanel16, actual, true);
        args.rows = rows;
        args.x.data = all.x.data() + first * x_bytes;
        cpu::linear(args, four, set);
        ASSERT_EQ(std::memcmp(actual.data(), expected.data() + first * y_bytes, actual.size()), 0)
            << all.name() << " computed as " << rows << " rows on " << cpu::instruction_set_name(set);
      }
    }
  }
}

TEST(Linear, NoRowsLeaveYAlone) {
  ThreadPool pool(2);
  Problem problem(kDTypes[0], 1, 20, 30, 11);
  Bytes y = problem.y;
  Linear args = problem.args(MatrixLayout::kPanel16, y, false);
  args.rows = 0;
  cpu::linear(args, pool);
  EXPECT_EQ(y, problem.y);
}

TEST(Linear, FusedNormIsTheNormThenTheProduct) {
  ThreadPool pool(2);
  for (const DTypes& dtypes : kDTypes) {
    for (int64_t rows : {1, 6, 70}) {
      Problem problem(dtypes, rows, 45, 192, 21);
      Bytes normed(problem.workspace.size());
      const Rows normed_rows{normed.data(), dtypes.x, problem.k};
      Linear args = problem.args(MatrixLayout::kPanel16, problem.y, false);
      cpu::rms_norm({.rows = rows,
                     .columns = problem.k,
                     .x = args.x,
                     .weight = problem.norm_weight.data(),
                     .epsilon = 1e-5f,
                     .out = normed_rows},
                    pool);
      for (InstructionSet set : available_sets()) {
        Bytes expected = problem.y;
        Bytes actual = problem.y;
        Linear unfused = problem.args(MatrixLayout::kPanel16, expected, true);
        unfused.x = normed_rows;
        cpu::linear(unfused, pool, set);
        Linear fused = problem.args(MatrixLayout::kPanel16, actual, true);
        fused.norm_weight = problem.norm_weight.data();
        fused.norm_epsilon = 1e-5f;
        fused.workspace = problem.workspace.data();
        cpu::linear(fused, pool, set);
        EXPECT_EQ(actual, expected) << problem.name();
      }
    }
  }
}

TEST(PackPanels, FillsDisjointRangesAndConverts) {
  constexpr int64_t kN = 37;
  constexpr int64_t kK = 29;
  constexpr int64_t kStride = 31;
  for (const DType source : {DType::kFloat32, DType::kBFloat16}) {
    const Bytes data = random_values(source, kN * kStride, 5);
    for (const DType target : {DType::kFloat32, DType::kBFloat16}) {
      Bytes out(static_cast<size_t>(packed_bytes(kN, kK, target)), std::byte{0xff});
      for (int64_t panel : {2, 0, 1}) {
        pack_panels(data.data(), source, kStride, kN, kK, target, panel, panel + 1, out.data());
      }
      const int64_t pair = target == DType::kBFloat16 ? 2 : 1;
      const int64_t padded_k = (kK + pair - 1) / pair * pair;
      ASSERT_EQ(packed_bytes(kN, kK, target), 48 * padded_k * static_cast<int64_t>(dtype_size(target)));
      for (int64_t n = 0; n < 48; ++n) {
        for (int64_t k = 0; k < padded_k; ++k) {
          const float value = n < kN && k < kK ? load_element(source, data.data(), n * kStride + k) : 0.0f;
          const int64_t index = ((n / 16 * (padded_k / pair) + k / pair) * 16 + n % 16) * pair + k % pair;
          ASSERT_EQ(load_element(target, out.data(), index), round_to(target, value)) << n << ", " << k;
        }
      }
    }
  }
}

}  // namespace
}  // namespace tokenspeed::kernels
