#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "kernels/cpu/linear_with.h"
#include "kernels/elements.h"
#include "kernels/linear.h"
#include "kernels/mlp.h"

namespace tokenspeed::kernels {
namespace {

using cpu::InstructionSet;

// Outputs have magnitude about 1. Vector exponentials and fp32 sums against the scalar reference.
constexpr float kFloat32Tolerance = 2e-5f;
// The rounded activation may differ by one unit (2^-8) in a few of its elements, and y is rounded once more.
constexpr float kBFloat16Tolerance = 2e-2f;

std::vector<InstructionSet> available_sets() {
  std::vector<InstructionSet> sets;
  for (InstructionSet set : {InstructionSet::kAvx2, InstructionSet::kAvx512, InstructionSet::kAvx512Bf16}) {
    if (set <= cpu::instruction_set()) sets.push_back(set);
  }
  return sets;
}

using Bytes = std::vector<std::byte>;

struct Shape {
  int64_t rows, experts, top_k, hidden, width;
};

// Experts' matrices in both layouts, with a gap between experts.
struct Experts {
  Bytes row_major, panels;
  int64_t row_major_stride, panels_stride;

  Experts(DType dtype, int64_t experts, int64_t n, int64_t k, std::mt19937& generator) {
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    const float scale = 1.7f / std::sqrt(static_cast<float>(k));  // unit variance in, unit variance out
    row_major_stride = n * k * static_cast<int64_t>(dtype_size(dtype)) + 64;
    panels_stride = packed_bytes(n, k, dtype) + 64;
    row_major.resize(static_cast<size_t>(experts * row_major_stride));
    panels.resize(static_cast<size_t>(experts * panels_stride));
    for (int64_t expert = 0; expert < experts; ++expert) {
      std::byte* matrix = row_major.data() + expert * row_major_stride;
      for (int64_t i = 0; i < n * k; ++i) store_element(dtype, matrix, i, scale * uniform(generator));
      pack_panels(matrix, dtype, k, n, k, dtype, 0, (n + 15) / 16, panels.data() + expert * panels_stride);
    }
  }
};

struct Problem {
  Shape shape;
  DType x_dtype, weight_dtype;
  int64_t x_stride, y_stride;
  std::mt19937 generator;
  Experts gate_up, down;
  Bytes x;
  std::vector<int32_t> ids;
  std::vector<float> weights;

  Problem(const Shape& shape, DType x_dtype, DType weight_dtype, uint32_t seed)
      : shape(shape),
        x_dtype(x_dtype),
        weight_dtype(weight_dtype),
        x_stride(shape.hidden + 7),
        y_stride(shape.hidden + 3),
        generator(seed),
        gate_up(weight_dtype, shape.experts, 2 * shape.width, shape.hidden, generator),
        down(weight_dtype, shape.experts, shape.hidden, shape.width, generator) {
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    x.resize(static_cast<size_t>(shape.rows * x_stride) * dtype_size(x_dtype));
    for (int64_t i = 0; i < shape.rows * x_stride; ++i) store_element(x_dtype, x.data(), i, uniform(generator));
    // Distinct experts of a row, some of them not here: an id past the end and a negative one.
    for (int64_t row = 0; row < shape.rows; ++row) {
      const int32_t first = static_cast<int32_t>(generator() % static_cast<uint32_t>(shape.experts));
      for (int64_t i = 0; i < shape.top_k; ++i) {
        const bool elsewhere = generator() % 8 == 0;
        const int32_t id = static_cast<int32_t>((first + 3 * i) % shape.experts);
        ids.push_back(!elsewhere ? id : generator() % 2 ? -1 : static_cast<int32_t>(shape.experts) + id);
        weights.push_back(0.5f + 0.5f * uniform(generator));
      }
    }
  }

  // The product of rows [first, first + rows) with y in rows of y_stride.
  MoeExperts args(MatrixLayout layout, int64_t first, int64_t rows, Bytes& y, Bytes& workspace) {
    const bool panels = layout == MatrixLayout::kPanel16;
    y.assign(static_cast<size_t>(rows * y_stride) * dtype_size(x_dtype), std::byte{0x55});
    workspace.assign(
        static_cast<size_t>(moe_experts_workspace_bytes(rows, shape.experts, shape.top_k, shape.hidden, shape.width)),
        std::byte{0xff});
    return {.rows = rows,
            .experts = shape.experts,
            .top_k = shape.top_k,
            .hidden = shape.hidden,
            .width = shape.width,
            .x = {x.data() + first * x_stride * static_cast<int64_t>(dtype_size(x_dtype)), x_dtype, x_stride},
            .gate_up = {.data = panels ? gate_up.panels.data() : gate_up.row_major.data(),
                        .dtype = weight_dtype,
                        .layout = layout,
                        .n = 2 * shape.width,
                        .k = shape.hidden},
            .gate_up_stride = panels ? gate_up.panels_stride : gate_up.row_major_stride,
            .down = {.data = panels ? down.panels.data() : down.row_major.data(),
                     .dtype = weight_dtype,
                     .layout = layout,
                     .n = shape.hidden,
                     .k = shape.width},
            .down_stride = panels ? down.panels_stride : down.row_major_stride,
            .expert_ids = ids.data() + first * shape.top_k,
            .expert_weights = weights.data() + first * shape.top_k,
            .y = {y.data(), x_dtype, y_stride},
            .workspace = workspace.data()};
  }
};

struct DTypes {
  DType x, weight;
};
constexpr DTypes kDTypes[] = {
    {DType::kFloat32, DType::kFloat32}, {DType::kFloat32, DType::kBFloat16}, {DType::kBFloat16, DType::kBFloat16}};

constexpr Shape kShapes[] = {{1, 16, 4, 128, 32}, {1, 5, 5, 33, 17},   {3, 8, 2, 50, 24},
                             {40, 4, 2, 66, 40},  {300, 2, 2, 40, 16}, {9, 64, 8, 600, 32}};

TEST(MoeExperts, MatchesTheReferenceOnEveryInstructionSet) {
  ThreadPool pool(3);
  uint32_t seed = 40;
  Bytes workspace;
  for (const DTypes& dtypes : kDTypes) {
    const float tolerance = dtypes.x == DType::kFloat32 ? kFloat32Tolerance : kBFloat16Tolerance;
    for (const Shape& shape : kShapes) {
      Problem problem(shape, dtypes.x, dtypes.weight, ++seed);
      Bytes expected;
      reference::moe_experts(problem.args(MatrixLayout::kRowMajor, 0, shape.rows, expected, workspace));
      for (InstructionSet set : available_sets()) {
        SCOPED_TRACE(std::string(cpu::instruction_set_name(set)) + " seed " + std::to_string(seed));
        Bytes actual;
        cpu::moe_experts(problem.args(MatrixLayout::kPanel16, 0, shape.rows, actual, workspace), pool, set);
        for (int64_t row = 0; row < shape.rows; ++row) {
          for (int64_t column = 0; column < problem.y_stride; ++column) {
            const float a = load_element(dtypes.x, actual.data(), row * problem.y_stride + column);
            const float e = load_element(dtypes.x, expected.data(), row * problem.y_stride + column);
            ASSERT_NEAR(a, e, column < shape.hidden ? tolerance : 0.0f) << "row " << row << " column " << column;
          }
        }
      }
    }
  }
}

TEST(MoeExperts, RowsDoNotDependOnOtherRowsOrThreads) {
  ThreadPool one(1);
  ThreadPool four(4);
  constexpr Shape kShape{150, 6, 3, 70, 48};
  for (const DTypes& dtypes : kDTypes) {
    for (InstructionSet set : available_sets()) {
      Problem problem(kShape, dtypes.x, dtypes.weight, 77);
      Bytes workspace;
      Bytes expected;
      cpu::moe_experts(problem.args(MatrixLayout::kPanel16, 0, kShape.rows, expected, workspace), one, set);
      for (int64_t rows : {1, 2, 5, 17, 64, 150}) {
        const int64_t first = (kShape.rows - rows) / 2;
        Bytes actual;
        cpu::moe_experts(problem.args(MatrixLayout::kPanel16, first, rows, actual, workspace), four, set);
        const std::byte* from = expected.data() + first * problem.y_stride * static_cast<int64_t>(dtype_size(dtypes.x));
        ASSERT_EQ(std::memcmp(actual.data(), from, actual.size()), 0)
            << rows << " rows on " << cpu::instruction_set_name(set);
      }
    }
  }
}

TEST(MoeExperts, ARowWithoutExpertsHereIsZero) {
  ThreadPool pool(2);
  Problem problem({2, 4, 2, 20, 16}, DType::kFloat32, DType::kFloat32, 3);
  problem.ids = {-1, 4, 9, -7};
  Bytes workspace;
  Bytes y;
  cpu::moe_experts(problem.args(MatrixLayout::kPanel16, 0, 2, y, workspace), pool);
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t i = 0; i < 20; ++i)
      EXPECT_EQ(load_element(DType::kFloat32, y.data(), row * problem.y_stride + i), 0.0f);
  }
}

}  // namespace
}  // namespace tokenspeed::kernels
