// Two steps of the CUDA runner in flight against one after the other.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "model/dummy_weights.h"
#include "model/presets.h"
#include "runtime/cuda/cuda_runner.h"
#include "runtime/driver.h"
#include "runtime/poisoned_source.h"
#include "runtime/test_model.h"

namespace tokenspeed::runtime {
namespace {

constexpr unsigned kSeed = 20260214;
constexpr int kSequences = 12;
constexpr int kLeastSteps = 200;
constexpr int kStepsBetweenArrivals = 16;

CudaRunnerOptions options_of(bool graphs) {
  CudaRunnerOptions options;
  options.max_step_tokens = 8 * 200;
  options.max_sequences = 8;
  options.state_slots = kSequences;
  options.page_size = 16;
  options.max_model_length = 1024;
  options.pages = 512;
  options.graphs = graphs;
  return options;
}

// Prompts of 1 to 220 tokens, so that some change more pages of the table than are listed; greedy and drawn.
std::vector<Case> cases_of(int32_t vocabulary) {
  std::mt19937 random(kSeed);
  std::vector<Case> cases(kSequences);
  for (Case& one : cases) {
    const unsigned longest = random() % 3 == 0 ? 220 : 20;
    for (unsigned i = random() % longest + 1; i > 0; --i) {
      one.prompt.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(vocabulary)));
    }
    one.new_tokens = 30 + static_cast<int32_t>(random() % 60);
    if (random() % 3 == 0) one.sampling = {.temperature = 0.9f, .top_k = 40, .seed = random()};
  }
  return cases;
}

// Steps that depend on the seed alone: sequences arrive one by one, change their places, sit steps out, and end.
int drive(Driver* driver, void (Driver::*step)(std::span<const Share>)) {
  std::mt19937 random(kSeed + 1);
  int steps = 0;
  while (!driver->done() && !testing::Test::HasFailure()) {
    std::vector<Share> shares;
    const int arrived = std::min(kSequences, 1 + steps / kStepsBetweenArrivals);
    for (int s = 0; s < arrived; ++s) {
      const int32_t left = driver->remaining(static_cast<size_t>(s));
      if (left == 0 || random() % 8 == 0) continue;
      const int32_t most = random() % 4 == 0 ? 200 : 40;
      shares.push_back({static_cast<size_t>(s), std::min(left, most)});
    }
    if (random() % 4 == 0) std::shuffle(shares.begin(), shares.end(), random);
    if (shares.size() > 8) shares.resize(8);
    ++steps;
    if (!shares.empty()) (driver->*step)(shares);
  }
  driver->finish();
  return steps;
}

std::vector<std::vector<int32_t>> tokens_of(const TestModel& model, const CudaRunnerOptions& options, bool ahead) {
  const auto runner = must(CudaRunner::create(model.graph, *model.source, options));
  EXPECT_EQ(runner->capacity().steps_in_flight, 2);
  Driver driver(runner.get(), cases_of(runner->capacity().vocabulary_size));
  driver.keep_tokens_only();
  EXPECT_GE(drive(&driver, ahead ? &Driver::step_ahead : &Driver::step), kLeastSteps);
  std::vector<std::vector<int32_t>> tokens;
  for (const Output& output : driver.outputs()) {
    EXPECT_TRUE(output.status.ok()) << output.status.message();
    tokens.push_back(output.tokens);
  }
  return tokens;
}

class CudaAhead : public testing::TestWithParam<const char*> {};

TEST_P(CudaAhead, TheTokensOfOneStepAfterTheOther) {
  SCOPED_TRACE(kSeed);
  const std::string name = GetParam();
  const TestModel& model = test_model(name == "demo" ? demo_directory() : random_directory(name));
  const auto expected = tokens_of(model, options_of(true), false);
  EXPECT_EQ(tokens_of(model, options_of(true), true), expected);
  EXPECT_EQ(tokens_of(model, options_of(false), true), expected);
}

INSTANTIATE_TEST_SUITE_P(Models, CudaAhead, testing::Values("demo", "dense-a", "moe-a"), [](const auto& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

// The kernels for few rows and for up to 64 on real sizes, each step right behind the other.
TEST(CudaStepsInFlight, TheTokensOfOneStepAfterTheOtherOnLargeShapes) {
  compile::ModelConfig config = must(model::find_preset("qwen3.5-35b-a3b"));
  config.layers.resize(4);
  config.fp8_blocks = true;
  const auto source = must(model::DummyWeights::create(config));
  const compile::ModelGraph graph = must(model::build_graph(config));
  CudaRunnerOptions options = options_of(true);
  options.weights = DType::kFloat8E4M3;
  options.max_sequences = options.state_slots = 20;
  const auto runner = must(CudaRunner::create(graph, *source, options));
  for (const size_t count : {size_t{1}, size_t{8}, size_t{20}}) {
    SCOPED_TRACE(count);
    std::vector<Case> cases(count);
    for (size_t s = 0; s < count; ++s) {
      for (size_t i = 0; i <= s % 5; ++i)
        cases[s].prompt.push_back(static_cast<int32_t>((i * 7919 + s * 104729) % 248000));
      cases[s].new_tokens = 40;
      if (s % 4 == 3) cases[s].sampling = {.temperature = 1.0f, .seed = s};
    }
    Driver expected(runner.get(), cases), ahead(runner.get(), cases);
    expected.keep_tokens_only();
    ahead.keep_tokens_only();
    expected.run_together(64);
    ahead.run_together_ahead(64);
    EXPECT_EQ(ahead.outputs(), expected.outputs());
  }
}

// Sequences of prompts of `length` tokens, of which the second may be one that leads to a NaN.
struct Batch {
  Batch(size_t length, int32_t second_token) {
    for (int32_t s = 0; s < 3; ++s) {
      for (size_t i = 0; i < length; ++i) prompts[s].push_back(20 + s * 40 + static_cast<int32_t>(i));
      pages[s] = {2 * s, 2 * s + 1};
    }
    prompts[1][1] = second_token;
  }
  // The `round`-th step of the sequences from `first` on, every `stride`-th: the prompts, or tokens of the step before.
  std::vector<SequenceStep> steps(int32_t round, int32_t stride = 1) const {
    static const SamplingParameters greedy = {.temperature = 0};
    static constexpr int32_t kUnknown = 0;
    std::vector<SequenceStep> steps;
    for (int32_t s = 0; s < 3; s += stride) {
      SequenceStep step;
      step.tokens = round == 0 ? std::span<const int32_t>(prompts[s]) : std::span(&kUnknown, 1);
      step.token_from = round == 0 ? -1 : s;
      step.context = round == 0 ? 0 : static_cast<int32_t>(prompts[s].size()) + round - 1;
      step.pages = pages[s];
      step.state_in = round == 0 ? -1 : s;
      step.state_out = s;
      step.sample = true;
      step.sampling = &greedy;
      steps.push_back(step);
    }
    return steps;
  }
  std::vector<int32_t> prompts[3], pages[3];
};

// Its next step is in flight by the time its NaN is known; that of the third round leaves it out.
TEST(CudaStepsInFlight, ANaNEndsItsSequenceAloneThoughItsNextStepRuns) {
  constexpr int32_t kPoisoned = 7;
  const TestModel& model = test_model(random_directory("moe-a"));
  const PoisonedSource source(*model.source, kPoisoned, std::numeric_limits<float>::quiet_NaN());
  const auto runner = must(CudaRunner::create(model.graph, source, options_of(true)));
  for (const size_t length : {size_t{2}, size_t{30}}) {
    std::vector<int32_t> tokens[2];  // of the two healthy sequences, without and with the sick one
    for (const bool sick : {false, true}) {
      const Batch batch(length, sick ? kPoisoned : 61);
      const auto first = batch.steps(0), second = batch.steps(1), third = batch.steps(2, 2);
      std::vector<SequenceResult> results;
      ASSERT_TRUE(runner->submit(first).ok());
      ASSERT_TRUE(runner->submit(second).ok());
      ASSERT_TRUE(runner->wait(&results).ok());
      EXPECT_EQ(results[1].status.ok(), !sick);
      for (const size_t s : {0, 2}) tokens[sick].push_back(results[s].token);
      ASSERT_TRUE(runner->submit(third).ok());
      ASSERT_TRUE(runner->wait(&results).ok());
      for (const size_t s : {0, 2}) tokens[sick].push_back(results[s].token);
      ASSERT_TRUE(runner->wait(&results).ok());
      for (const size_t s : {0, 1}) {
        EXPECT_TRUE(results[s].status.ok()) << results[s].status.message();
        tokens[sick].push_back(results[s].token);
      }
    }
    EXPECT_EQ(tokens[0], tokens[1]) << length;
    EXPECT_TRUE(std::all_of(tokens[1].begin(), tokens[1].end(), [](int32_t token) { return token >= 0; }));
  }
}

TEST(CudaStepsInFlight, RefusesWhatCannotFollow) {
  const TestModel& model = test_model(random_directory("dense-a"));
  const auto runner = must(CudaRunner::create(model.graph, *model.source, options_of(true)));
  const Batch batch(3, 61);
  auto first = batch.steps(0);
  const auto second = batch.steps(1), third = batch.steps(2);
  std::vector<SequenceResult> results;
  EXPECT_EQ(runner->submit(second).code(), StatusCode::kInvalidArgument) << "no step in flight has the tokens";
  ASSERT_TRUE(runner->submit(first).ok());
  ASSERT_TRUE(runner->submit(second).ok());
  EXPECT_EQ(runner->submit(third).code(), StatusCode::kInternal) << "a third step";
  ASSERT_TRUE(runner->wait(&results).ok());
  ASSERT_TRUE(runner->wait(&results).ok());

  const SamplingParameters with_logprobs = {.temperature = 0, .logprobs = 1};
  first[1].sampling = &with_logprobs;
  ASSERT_TRUE(runner->submit(first).ok());
  EXPECT_EQ(runner->submit(second).code(), StatusCode::kInternal) << "the host has not sampled yet";
  EXPECT_FALSE(runner->profile(first, &results).ok());
  ASSERT_TRUE(runner->wait(&results).ok());
  EXPECT_EQ(results[1].logprobs.size(), 1u);
}

// Rows that the host finishes may be in the second of two steps.
TEST(CudaStepsInFlight, TheHostsRowsMayComeSecond) {
  const TestModel& model = test_model(random_directory("dense-a"));
  const auto runner = must(CudaRunner::create(model.graph, *model.source, options_of(true)));
  const Batch batch(3, 61);
  const SamplingParameters with_logprobs = {.temperature = 0, .logprobs = 1};
  const auto first = batch.steps(0);
  std::vector<std::vector<int32_t>> tokens;
  for (const bool host : {false, true}) {
    auto second = batch.steps(1);
    if (host) second[1].sampling = &with_logprobs;
    std::vector<SequenceResult> results[2];
    ASSERT_TRUE(runner->submit(first).ok());
    ASSERT_TRUE(runner->submit(second).ok());
    for (auto& result : results) ASSERT_TRUE(runner->wait(&result).ok());
    EXPECT_EQ(results[1][1].logprobs.size(), host ? 1u : 0u);
    tokens.emplace_back();
    for (const auto& result : results) {
      for (const SequenceResult& one : result) tokens.back().push_back(one.token);
    }
  }
  EXPECT_EQ(tokens[0], tokens[1]);
}

}  // namespace
}  // namespace tokenspeed::runtime
