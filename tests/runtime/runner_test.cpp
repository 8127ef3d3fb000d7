// What a Runner owes its caller besides the right logits: failures that stay with their sequence, clear refusals, log
// probabilities that belong to the logits.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "driver.h"
#include "poisoned_source.h"
#include "test_model.h"

namespace tokenspeed::runtime {
namespace {

// Log probabilities are sums over the vocabulary in another order than the test's.
constexpr double kLogprobTolerance = 1e-4;

constexpr int32_t kPoisoned = 7;
const std::vector<Case> kHealthy = {{{1, 2, 3, 4, 5}, 6}, {{20, 21, 22, 23, 24, 25, 26, 27, 28}, 6}};
const Case kSick = {{30, 31, kPoisoned, 33}, 6};

class Fault : public testing::TestWithParam<float> {};

TEST_P(Fault, EndsItsSequenceAlone) {
  // Not tied: the embedding's row must not reach everybody's logits through the head.
  const TestModel& model = test_model(random_directory("moe-a"));
  ASSERT_FALSE(model.config.tie_word_embeddings);
  const PoisonedSource source(*model.source, kPoisoned, GetParam());
  const auto runner = must(CpuRunner::create(model.graph, source, test_options()));
  Driver expected(runner.get(), kHealthy);
  expected.run_together(4);

  Driver driver(runner.get(), {kHealthy[0], kSick, kHealthy[1]});
  driver.run_together(4);
  EXPECT_EQ(driver.outputs()[0], expected.outputs()[0]);
  EXPECT_EQ(driver.outputs()[2], expected.outputs()[1]);
  EXPECT_TRUE(driver.outputs()[1].tokens.empty());
  const Status& status = driver.outputs()[1].status;
  EXPECT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_NE(status.message().find("position"), std::string::npos) << status.message();

  // Its pages and state slot serve the next request.
  Driver after(runner.get(), {kHealthy[1], kHealthy[0]});
  after.run_together(4);
  EXPECT_EQ(after.outputs()[0], expected.outputs()[1]);
  EXPECT_EQ(after.outputs()[1], expected.outputs()[0]);
}

INSTANTIATE_TEST_SUITE_P(Poison, Fault,
                         testing::Values(std::numeric_limits<float>::quiet_NaN(),
                                         std::numeric_limits<float>::infinity()));

TEST(Profile, ListsEveryOperationOnceAndGivesTheSameToken) {
  const TestModel& model = test_model(random_directory("moe-a"));
  const auto runner = make_runner(model, test_options());
  const SamplingParameters greedy = {.temperature = 0};
  const std::vector<int32_t> tokens = {3, 1, 4, 1, 5}, pages = {0};
  const SequenceStep step = {.tokens = tokens, .pages = pages, .sample = true, .sampling = &greedy};
  std::vector<SequenceResult> plain, profiled, again;
  ASSERT_TRUE(runner->submit({&step, 1}).ok() && runner->wait(&plain).ok());
  const std::vector<LaunchTime> launches = must(runner->profile({&step, 1}, &profiled));
  ASSERT_EQ(launches.size(), runner->program().operations.size() + 1);
  for (size_t i = 0; i + 1 < launches.size(); ++i) {
    ASSERT_EQ(launches[i].parts.size(), 1u);
    EXPECT_EQ(launches[i].parts[0].operation, static_cast<int32_t>(i));
    EXPECT_GT(launches[i].seconds, 0) << runner->program().operations[i].name;
  }
  EXPECT_TRUE(launches.back().parts.empty());
  ASSERT_TRUE(runner->submit({&step, 1}).ok() && runner->wait(&again).ok());
  EXPECT_EQ(profiled[0].token, plain[0].token);
  EXPECT_EQ(again[0].token, plain[0].token);
}

class RunnerTest : public testing::Test {
 protected:
  const TestModel& model_ = test_model(random_directory("dense-a"));
  std::unique_ptr<CpuRunner> runner_ = make_runner(model_, test_options());
  const SamplingParameters sampling_ = {.temperature = 0, .logprobs = 3, .prompt_logprobs = 2};
  const std::vector<int32_t> ids_ = {5, 6, 7, 8, 9, 10};
  const std::vector<int32_t> pages_ = {9, 4};

  SequenceStep step() const {
    SequenceStep step;
    step.tokens = ids_;
    step.pages = pages_;
    step.sampling = &sampling_;
    step.prompt = ids_;
    step.sample = true;
    return step;
  }
  void expect_refused(const SequenceStep& step, const std::string& words) {
    const Status status = runner_->submit({&step, 1});
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(words), std::string::npos) << status.message();
  }
};

double log_softmax(std::span<const float> row, int32_t token) {
  const double greatest = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const float logit : row) sum += std::exp(logit - greatest);
  return row[token] - greatest - std::log(sum);
}

void expect_logprobs(const TokenLogprobs& computed, std::span<const float> row, int32_t token, size_t top) {
  EXPECT_EQ(computed.token, token);
  EXPECT_NEAR(computed.logprob, log_softmax(row, token), kLogprobTolerance);
  const auto greater = std::count_if(row.begin(), row.end(), [&](float logit) { return logit > row[token]; });
  EXPECT_EQ(computed.rank, greater + 1);
  ASSERT_EQ(computed.top.size(), top);
  std::vector<int32_t> order(row.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
  for (size_t i = 0; i < top; ++i) {
    EXPECT_EQ(computed.top[i].first, order[i]);
    EXPECT_NEAR(computed.top[i].second, log_softmax(row, order[i]), kLogprobTolerance);
  }
}

TEST_F(RunnerTest, LogprobsBelongToTheLogits) {
  const int64_t vocabulary = runner_->capacity().vocabulary_size;
  std::vector<float> logits(ids_.size() * vocabulary);
  SequenceStep given = step();
  given.logits_out = logits.data();
  given.next_tokens = std::span<const int32_t>(ids_).subspan(1);
  ASSERT_TRUE(runner_->submit({&given, 1}).ok());
  std::vector<SequenceResult> results;
  ASSERT_TRUE(runner_->wait(&results).ok());
  ASSERT_EQ(results.size(), 1u);
  const auto row = [&](size_t i) { return std::span<const float>(logits).subspan(i * vocabulary, vocabulary); };
  ASSERT_EQ(results[0].prompt_logprobs.size(), ids_.size() - 1);
  for (size_t i = 0; i + 1 < ids_.size(); ++i) expect_logprobs(results[0].prompt_logprobs[i], row(i), ids_[i + 1], 2);
  ASSERT_EQ(results[0].logprobs.size(), 1u);
  EXPECT_EQ(results[0].logprobs[0].rank, 1);
  expect_logprobs(results[0].logprobs[0], row(ids_.size() - 1), results[0].token, 3);
}

TEST_F(RunnerTest, SamplesAllowedTokensOnly) {
  std::vector<float> logits(ids_.size() * static_cast<size_t>(runner_->capacity().vocabulary_size));
  const std::vector<int32_t> allowed = {31, 7, 190};
  SequenceStep given = step();
  given.allowed_tokens = allowed;
  given.logits_out = logits.data();
  ASSERT_TRUE(runner_->submit({&given, 1}).ok());
  std::vector<SequenceResult> results;
  ASSERT_TRUE(runner_->wait(&results).ok());
  const float* last = logits.data() + logits.size() - runner_->capacity().vocabulary_size;
  EXPECT_EQ(results[0].token,
            *std::max_element(allowed.begin(), allowed.end(), [&](int32_t a, int32_t b) { return last[a] < last[b]; }));
  ASSERT_EQ(results[0].logprobs.size(), 1u);  // the model's own, not of the allowed tokens alone
  expect_logprobs(results[0].logprobs[0], {last, static_cast<size_t>(runner_->capacity().vocabulary_size)},
                  results[0].token, 3);
}

// More rows of logits than the head computes at once.
TEST_F(RunnerTest, PromptLogprobsOfALongChunk) {
  std::vector<int32_t> ids(200);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 37 % 500);
  std::vector<int32_t> pages(16);
  std::iota(pages.begin(), pages.end(), 0);
  SequenceStep given = step();
  given.tokens = ids;
  given.pages = pages;
  given.next_tokens = std::span<const int32_t>(ids).subspan(1);
  std::vector<SequenceResult> whole, part;
  ASSERT_TRUE(runner_->submit({&given, 1}).ok());
  ASSERT_TRUE(runner_->wait(&whole).ok());
  ASSERT_EQ(whole[0].prompt_logprobs.size(), ids.size() - 1);
  given.tokens = given.tokens.first(10);
  given.next_tokens = given.next_tokens.first(10);
  ASSERT_TRUE(runner_->submit({&given, 1}).ok());
  ASSERT_TRUE(runner_->wait(&part).ok());
  for (size_t i = 0; i < 10; ++i) {
    EXPECT_EQ(part[0].prompt_logprobs[i].logprob, whole[0].prompt_logprobs[i].logprob) << i;
    EXPECT_EQ(whole[0].prompt_logprobs[i].token, ids[i + 1]);
  }
}

TEST_F(RunnerTest, RefusesWhatItCannotRun) {
  const std::vector<int32_t> bad_ids = {5, 512};
  const std::vector<int32_t> bad_pages = {9, 256};
  SequenceStep given = step();
  given.tokens = bad_ids;
  expect_refused(given, "512");
  given = step();
  given.pages = bad_pages;
  expect_refused(given, "256");
  given = step();
  given.context = 30;
  expect_refused(given, "36");
  given = step();
  given.tokens = {};
  expect_refused(given, "tokens");
  given = step();
  given.state_out = 8;
  expect_refused(given, "state slot 8");
  given = step();
  given.sampling = nullptr;
  expect_refused(given, "sampling");
  const std::vector<SequenceStep> many(9, step());
  EXPECT_NE(runner_->submit(many).message().find("1 to 8"), std::string::npos);
  std::vector<SequenceResult> results;
  EXPECT_FALSE(runner_->wait(&results).ok());
  // Nothing of this disturbed it.
  given = step();
  EXPECT_TRUE(runner_->submit({&given, 1}).ok());
  EXPECT_FALSE(runner_->submit({&given, 1}).ok());
  EXPECT_TRUE(runner_->wait(&results).ok());
}

CpuRunnerOptions two_in_flight() {
  CpuRunnerOptions options = test_options();
  options.steps_in_flight = 2;
  return options;
}

// Two sequences decode; each step after the first is submitted while the one before it is in flight. Sequences change
// their places in the step, one comes late.
TEST(StepsInFlight, TokensGoFromStepToStep) {
  const TestModel& model = test_model(random_directory("dense-a"));
  const std::vector<Case> cases = {{{1, 2, 3}, 9}, {{40, 41}, 9}, {{7, 8, 9, 10}, 4}};
  const auto runner = make_runner(model, two_in_flight());
  Driver driver(runner.get(), cases);
  const Share steps[][3] = {{{0, 3}, {1, 2}, {2, 2}}, {{1, 1}, {2, 2}, {0, 1}}, {{2, 1}, {0, 1}, {1, 1}}};
  for (const auto& step : steps) driver.step_ahead(step);
  driver.run_together_ahead(1);
  Driver expected(runner.get(), cases);
  expected.run_alone(256);
  EXPECT_EQ(driver.outputs(), expected.outputs());
}

TEST(StepsInFlight, AFailedSequenceEndsAloneThoughItsNextStepRuns) {
  const TestModel& model = test_model(random_directory("moe-a"));
  const PoisonedSource source(*model.source, kPoisoned, std::numeric_limits<float>::quiet_NaN());
  const auto runner = must(CpuRunner::create(model.graph, source, two_in_flight()));
  Driver expected(runner.get(), kHealthy);
  expected.run_together(4);
  Driver driver(runner.get(), {kHealthy[0], kSick, kHealthy[1]});
  driver.run_together_ahead(4);
  EXPECT_EQ(driver.outputs()[0], expected.outputs()[0]);
  EXPECT_EQ(driver.outputs()[2], expected.outputs()[1]);
  EXPECT_TRUE(driver.outputs()[1].tokens.empty());
  EXPECT_EQ(driver.outputs()[1].status.code(), StatusCode::kInternal);
}

TEST(StepsInFlight, RefusesATokenThatIsNotThereAndAStepTooMany) {
  const auto runner = make_runner(test_model(random_directory("dense-a")), two_in_flight());
  const SamplingParameters greedy = {.temperature = 0};
  const std::vector<int32_t> tokens = {3, 4}, pages = {0};
  const SequenceStep first = {.tokens = tokens, .pages = pages, .sample = true, .sampling = &greedy};
  SequenceStep next = first;
  next.token_from = 0;
  next.tokens = std::span(tokens).first(1);
  next.context = 2;
  next.state_in = 0;
  const auto refused = [&](const SequenceStep& step, const std::string& words) {
    const Status status = runner->submit({&step, 1});
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(status.message().find(words), std::string::npos) << status.message();
  };
  refused(next, "the token of sequence 0");
  ASSERT_TRUE(runner->submit({&first, 1}).ok());
  SequenceStep wrong = next;
  wrong.token_from = 1;
  refused(wrong, "the token of sequence 1");
  wrong = next;
  wrong.tokens = tokens;
  refused(wrong, "new tokens");
  ASSERT_TRUE(runner->submit({&next, 1}).ok());
  EXPECT_EQ(runner->submit({&next, 1}).code(), StatusCode::kInternal);
  std::vector<SequenceResult> results;
  EXPECT_TRUE(runner->wait(&results).ok());
  EXPECT_TRUE(runner->wait(&results).ok());
  EXPECT_EQ(runner->wait(&results).code(), StatusCode::kInternal);
  refused(next, "the token of sequence 0");
}

void expect_no_runner(const CpuRunnerOptions& options, StatusCode code, const std::string& words) {
  const TestModel& model = test_model(random_directory("dense-a"));
  const auto runner = CpuRunner::create(model.graph, *model.source, options);
  ASSERT_FALSE(runner.ok());
  EXPECT_EQ(runner.status().code(), code);
  EXPECT_NE(runner.status().message().find(words), std::string::npos) << runner.status().message();
}

TEST(RunnerOptions, AreChecked) {
  CpuRunnerOptions options = test_options();
  options.weights = DType::kFloat8E4M3;
  expect_no_runner(options, StatusCode::kInvalidArgument, "float8_e4m3 weights");
  options = test_options();
  options.activation = DType::kBFloat16;
  expect_no_runner(options, StatusCode::kInvalidArgument, "bfloat16 activations need bfloat16 weights");
  options = test_options();
  options.max_sequences = 0;
  expect_no_runner(options, StatusCode::kInvalidArgument, "sequences of a step must be at least 1");
  options = test_options();
  options.pages = 3;
  expect_no_runner(options, StatusCode::kResourceExhausted, "--max-model-len 1024");
  options = test_options();
  options.steps_in_flight = 3;
  expect_no_runner(options, StatusCode::kInvalidArgument, "1 or 2 steps in flight");
  options = test_options();
  options.passes.disabled = {"fuse_everything"};
  expect_no_runner(options, StatusCode::kInvalidArgument, "fuse_everything");
}

TEST(RunnerOptions, MemoryOfTheKvCacheGivesThePages) {
  CpuRunnerOptions options = test_options();
  const TestModel& model = test_model(random_directory("dense-a"));
  options.pages = 0;
  const int64_t page_bytes = make_runner(model, options)->program().kv.bytes_per_position() * options.page_size;
  options.kv_bytes = 100 * page_bytes + 1;
  EXPECT_EQ(make_runner(model, options)->capacity().pages, 100);
  options.kv_bytes = 0;  // free memory is enough for all sequences of the small model
  EXPECT_EQ(make_runner(model, options)->capacity().pages, 8 * 1024 / 16);
}

TEST(RunnerOptions, SeveralRanksAreRefused) {
  const TestModel& model = test_model(random_directory("moe-a"));
  const compile::ModelGraph graph = must(model::build_graph(model.config, {.tensor_parallel = 2}));
  const auto runner = CpuRunner::create(graph, *model.source, test_options());
  ASSERT_FALSE(runner.ok());
  EXPECT_EQ(runner.status().code(), StatusCode::kUnimplemented);
}

TEST(RunnerMtp, ModelsWithoutTheLayerSaySo) {
  const auto runner = make_runner(test_model(random_directory("dense-a")), test_options());
  EXPECT_EQ(runner->run_mtp({}).code(), StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace tokenspeed::runtime
