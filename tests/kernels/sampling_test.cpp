#include "kernels/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "kernels/sampling_noise.h"

namespace tokenspeed::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLogprobTolerance = 2e-5f;

// One of `values`, at random.
template <typename T>
T pick(std::mt19937& random, std::initializer_list<T> values) {
  return *(values.begin() + random() % values.size());
}

struct RandomRow {
  explicit RandomRow(uint32_t seed) {
    std::mt19937 random(seed);
    const int64_t vocabulary = pick<int64_t>(random, {1, 2, 15, 16, 17, 500, 5000, 20011});
    std::normal_distribution<float> normal(0.0f, pick(random, {0.0f, 0.1f, 3.0f, 100.0f}));
    const bool ties = random() % 3 == 0;
    for (int64_t i = 0; i < vocabulary; ++i) logits.push_back(ties ? std::round(normal(random)) : normal(random));
    if (random() % 4 == 0) {
      for (float& logit : logits) {
        if (random() % 2 == 0) logit = -kInfinity;
      }
    }
    const auto token = [&] { return static_cast<int32_t>(random() % static_cast<uint32_t>(vocabulary)); };
    if (random() % 3 == 0) {
      for (int i = 0; i < 20; ++i) prompt.push_back(token());
      for (int i = 0; i < 30; ++i) output.push_back(token());
      output.push_back(output.front());
      row.repetition_penalty = pick(random, {1.0f, 1.3f, 0.8f});
      row.presence_penalty = pick(random, {0.0f, 1.5f, -1.0f});
      row.frequency_penalty = pick(random, {0.0f, 0.5f, -0.3f});
    }
    if (random() % 4 == 0) {
      for (int i = 0; i < 10; ++i) bias.push_back({token(), pick(random, {-100.0f, -1.0f, 5.0f, 100.0f})});
      bias.push_back(bias.front());
    }
    row.logits = logits.data();
    row.vocabulary = vocabulary;
    row.temperature = pick(random, {0.0f, 1e-38f, 1e-3f, 0.6f, 1.0f, 1.0f, 2.0f, 1e6f});
    row.top_k = pick(random, {0, 0, 1, 5, 20, 1000, 1000000});
    row.top_p = pick(random, {1.0f, 1.0f, 0.95f, 0.5f, 0.1f, 0.9999f});
    row.min_p = pick(random, {0.0f, 0.0f, 0.05f, 0.5f, 1.0f});
    row.seed = random();
    row.position = random() % 100000;
    row.logit_bias = bias;
    row.prompt = prompt;
    row.output = output;
  }
  RandomRow(const RandomRow&) = delete;
  std::vector<float> logits;
  std::vector<int32_t> prompt, output;
  std::vector<std::pair<int32_t, float>> bias;
  SampleRow row;
};

TEST(Sample, ChoosesTheReferencesToken) {
  for (uint32_t seed = 0; seed < 3000; ++seed) {
    const RandomRow each(seed);
    ASSERT_EQ(cpu::sample(each.row).token, reference::sample(each.row).token)
        << "seed " << seed << " vocabulary " << each.row.vocabulary << " temperature " << each.row.temperature
        << " top_k " << each.row.top_k << " top_p " << each.row.top_p << " min_p " << each.row.min_p;
  }
}

TEST(Sample, ChoosesTheReferencesTokenFromAWholeVocabulary) {
  std::mt19937 random(800);
  std::normal_distribution<float> normal(0.0f, 2.5f);
  std::vector<float> logits(248320);
  for (float& logit : logits) logit = normal(random);
  SampleRow row{logits.data(), 248077};
  for (int64_t position = 0; position < 8; ++position) {
    row.position = position;
    row.top_k = position % 4 == 1 ? 20 : 0;
    row.top_p = position % 4 == 2 ? 0.9f : 1.0f;
    row.min_p = position % 4 == 3 ? 0.01f : 0.0f;
    EXPECT_EQ(cpu::sample(row).token, reference::sample(row).token) << position;
  }
}

TEST(Sample, RefusesNaNAndInfinityAndRowsWithoutAChoice) {
  for (const float temperature : {0.0f, 1.0f}) {
    for (const int64_t at : {0, 15, 16, 36}) {
      for (const float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity}) {
        std::vector<float> logits(37, 1.0f);
        logits[static_cast<size_t>(at)] = bad;
        SampleRow row{logits.data(), 37, temperature};
        EXPECT_EQ(cpu::sample(row).token, -1);
        EXPECT_EQ(reference::sample(row).token, -1);
        row.vocabulary = at;  // beyond the vocabulary it is never read
        if (at == 0) continue;
        EXPECT_GE(cpu::sample(row).token, 0);
      }
    }
    const std::vector<float> nothing(37, -kInfinity);
    EXPECT_EQ(cpu::sample({nothing.data(), 37, temperature}).token, -1);
    EXPECT_EQ(reference::sample({nothing.data(), 37, temperature}).token, -1);
  }
}

TEST(Sample, GreedyTakesTheLowestOfEqualIds) {
  std::vector<float> logits(1000, -2.0f);
  logits[700] = logits[999] = logits[133] = 4.0f;
  EXPECT_EQ(cpu::sample({logits.data(), 1000, 0.0f}).token, 133);
  EXPECT_EQ(reference::sample({logits.data(), 1000, 0.0f}).token, 133);
}

// Frequencies over many positions against the softmax, within five standard deviations.
TEST(Sample, FollowsTheDistribution) {
  const std::vector<float> logits = {1.0f, 0.0f, -1.0f, 2.0f, 0.5f};
  constexpr int kDraws = 20000;
  std::vector<int> counts(5, 0);
  for (int position = 0; position < kDraws; ++position) {
    SampleRow row{logits.data(), 5, 1.5f};
    row.seed = 801;
    row.position = position;
    ++counts[static_cast<size_t>(cpu::sample(row).token)];
  }
  double total = 0;
  for (const float logit : logits) total += std::exp(logit / 1.5);
  for (size_t i = 0; i < 5; ++i) {
    const double p = std::exp(logits[i] / 1.5) / total;
    EXPECT_NEAR(counts[i], kDraws * p, 5 * std::sqrt(kDraws * p * (1 - p))) << i;
  }
}

TEST(Logprobs, EqualADoubleComputationInOrder) {
  for (uint32_t seed = 900; seed < 960; ++seed) {
    SCOPED_TRACE(seed);
    const RandomRow each(seed);
    const std::vector<float>& logits = each.logits;
    const float greatest = *std::max_element(logits.begin(), logits.end());
    if (greatest == -kInfinity) continue;
    double total = 0;
    for (const float logit : logits) total += std::exp(static_cast<double>(logit) - greatest);
    std::vector<int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
    });
    const int32_t token = order[logits.size() / 2];
    const float logit = logits[static_cast<size_t>(token)];
    std::vector<TokenLogprob> best = {{7, 7.0f}};
    int32_t rank = 0;
    const float actual = cpu::logprobs(logits.data(), each.row.vocabulary, token, 20, &best, &rank);
    const double expected = static_cast<double>(logit) - greatest - std::log(total);
    if (logit == -kInfinity) {
      EXPECT_EQ(actual, -kInfinity);
    } else {
      EXPECT_NEAR(actual, expected, kLogprobTolerance);
    }
    EXPECT_EQ(rank, 1 + std::count_if(logits.begin(), logits.end(), [&](float other) { return other > logit; }));
    ASSERT_EQ(best.size(), std::min<size_t>(20, logits.size()));
    for (size_t i = 0; i < best.size(); ++i) EXPECT_EQ(best[i].token, order[i]);
  }
}

}  // namespace
}  // namespace tokenspeed::kernels
