#include "kernels/mlp.h"

#include "base/thread_pool.h"
#include "kernels/test_rows.h"

namespace tokenspeed::kernels {
namespace {

const DType kDTypes[] = {DType::kFloat32, DType::kBFloat16};

TEST(SwiGlu, EqualsTheReferenceAndSaturates) {
  ThreadPool pool(2);
  for (const DType dtype : kDTypes) {
    for (const int64_t width : {1, 40, 3584}) {
      std::mt19937 random(500);
      TestRows gate_up(dtype, 9, 2 * width);
      gate_up.fill(random, 4.0f);
      store_element(gate_up.view(), 0, 0, 200.0f);  // silu(x) is x, and 0 far below
      store_element(gate_up.view(), 1, 0, -200.0f);
      TestRows actual(dtype, 9, width);
      TestRows expected(dtype, 9, width);
      cpu::swiglu({9, width, gate_up.view(), actual.view()}, pool);
      reference::swiglu({9, width, gate_up.view(), expected.view()});
      actual.expect_near(expected, tolerance_of(dtype));
      EXPECT_NEAR(actual.at(1, 0), 0.0f, 1e-30f);
    }
  }
}

TEST(Add, IsExactAndMayAlias) {
  ThreadPool pool(2);
  for (const DType dtype : kDTypes) {
    std::mt19937 random(501);
    TestRows a(dtype, 20, 1000);
    a.fill(random);
    const TestRows b = TestRows(dtype, 20, 1000).fill(random);
    TestRows expected(dtype, 20, 1000);
    reference::add({20, 1000, a.view(), b.view(), expected.view()});
    cpu::add({20, 1000, a.view(), b.view(), a.view()}, pool);
    EXPECT_TRUE(a == expected);
  }
}

TEST(MoeRouter, ChoosesTheSameExpertsWithTies) {
  ThreadPool pool(2);
  for (uint32_t seed = 510; seed < 560; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const int64_t experts = 1 + random() % 300;
    const int64_t top_k = 1 + random() % std::min<int64_t>(experts, 12);
    const int64_t rows = 1 + random() % 20;
    const bool normalize = random() % 2 == 0;
    std::vector<float> logits = random_floats(random, rows * experts, 3.0f);
    if (seed % 2 == 0) {
      for (float& logit : logits) logit = std::round(logit);  // many ties
    }
    const size_t size = static_cast<size_t>(rows * top_k);
    std::vector<int32_t> ids(size, -1);
    std::vector<int32_t> expected_ids(size, -1);
    std::vector<float> weights(size, NAN);
    std::vector<float> expected_weights(size, NAN);
    cpu::moe_router({rows, experts, top_k, normalize, logits.data(), ids.data(), weights.data()}, pool);
    reference::moe_router(
        {rows, experts, top_k, normalize, logits.data(), expected_ids.data(), expected_weights.data()});
    EXPECT_EQ(ids, expected_ids);
    for (size_t i = 0; i < size; ++i) ASSERT_NEAR(weights[i], expected_weights[i], kFloat32Tolerance);
  }
}

TEST(SharedExpertCombine, EqualsTheReferenceWithAndWithoutResidual) {
  ThreadPool pool(2);
  for (const DType dtype : kDTypes) {
    for (const bool with_residual : {false, true}) {
      std::mt19937 random(570);
      const int64_t hidden = 515;
      const TestRows x = TestRows(dtype, 40, hidden).fill(random);
      const TestRows shared = TestRows(dtype, 40, hidden).fill(random);
      const TestRows routed = TestRows(dtype, 40, hidden).fill(random);
      TestRows residual(dtype, 40, hidden);
      residual.fill(random);
      const std::vector<float> weight = random_floats(random, hidden, 0.1f);
      TestRows expected(dtype, 40, hidden);
      const Rows added = with_residual ? residual.view() : Rows{};
      reference::shared_expert_combine(
          {40, hidden, x.view(), weight.data(), shared.view(), routed.view(), added, expected.view()});
      cpu::shared_expert_combine(
          {40, hidden, x.view(), weight.data(), shared.view(), routed.view(), added, residual.view()}, pool);
      residual.expect_near(expected, tolerance_of(dtype));
    }
  }
}

TEST(ScaleRowsBySigmoid, EqualsTheReference) {
  ThreadPool pool(2);
  for (const DType dtype : kDTypes) {
    std::mt19937 random(580);
    const TestRows logit = TestRows(dtype, 12, 1).fill(random, 3.0f);
    TestRows x(dtype, 12, 300);
    x.fill(random);
    TestRows expected = x;
    reference::scale_rows_by_sigmoid({12, 300, logit.view(), expected.view()});
    cpu::scale_rows_by_sigmoid({12, 300, logit.view(), x.view()}, pool);
    x.expect_near(expected, tolerance_of(dtype));
  }
}

}  // namespace
}  // namespace tokenspeed::kernels
