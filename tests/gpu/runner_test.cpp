// The CUDA runner against the stored answers of the reference implementation, and against itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "runtime/cuda/cuda_runner.h"
#include "runtime/driver.h"
#include "runtime/test_model.h"

namespace tokenspeed::runtime {
namespace {

// |difference| / |row| of the median row, activations in bfloat16. Random experts are far apart: a row in which
// rounding turned a close choice of the router is off as a whole.
constexpr float kDenseTolerance = 0.03f;
constexpr float kMoeTolerance = 0.13f;
constexpr float kDemoLogitTolerance = 1.0f;  // the demo model's logits reach some 30

constexpr int kLengths[] = {1, 2, 5, 63, 64, 65, 130, 300};

CudaRunnerOptions cuda_options() {
  CudaRunnerOptions options;
  options.max_step_tokens = 256;
  options.max_sequences = 8;
  options.page_size = 16;
  options.max_model_length = 1024;
  options.pages = 256;
  return options;
}

std::unique_ptr<CudaRunner> make_cuda_runner(const TestModel& model, const CudaRunnerOptions& options) {
  return must(CudaRunner::create(model.graph, *model.source, options));
}

std::span<const float> row_of(const Output& output, int64_t row, int64_t vocabulary) {
  return std::span<const float>(output.logits).subspan(row * vocabulary, vocabulary);
}

float relative_error(std::span<const float> computed, std::span<const float> expected) {
  double difference = 0;
  double size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += std::pow(static_cast<double>(computed[i]) - expected[i], 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  return static_cast<float>(std::sqrt(difference / size));
}

Output run_one(Runner* runner, const Case& given, int32_t chunk = 256) {
  Driver driver(runner, {given});
  driver.run_alone(chunk);
  return driver.outputs()[0];
}

float median_error(const Golden& golden, CudaRunner* runner) {
  const int64_t vocabulary = runner->capacity().vocabulary_size;
  std::vector<float> errors;
  for (const int length : kLengths) {
    const std::string suffix = "." + std::to_string(length);
    if (!golden.has("logits" + suffix)) continue;
    const Output output = run_one(runner, {golden.ints("ids" + suffix)});
    const std::vector<float> stored = golden.floats("logits" + suffix);
    for (int row = 0; row < length; ++row) {
      errors.push_back(relative_error(row_of(output, row, vocabulary),
                                      std::span<const float>(stored).subspan(row * vocabulary, vocabulary)));
    }
  }
  for (float& error : errors) error = std::isnan(error) ? INFINITY : error;
  std::nth_element(errors.begin(), errors.begin() + errors.size() / 2, errors.end());
  return errors[errors.size() / 2];
}

class CudaRandomGolden : public testing::TestWithParam<const char*> {};

TEST_P(CudaRandomGolden, Logits) {
  const std::string directory = random_directory(GetParam());
  const TestModel& model = test_model(directory);
  const Golden golden(directory + "/golden.safetensors");
  const auto runner = make_cuda_runner(model, cuda_options());
  EXPECT_LE(median_error(golden, runner.get()), model.config.is_moe() ? kMoeTolerance : kDenseTolerance);
}

TEST_P(CudaRandomGolden, LogitsWithEveryPassOff) {
  const std::string directory = random_directory(GetParam());
  const TestModel& model = test_model(directory);
  const Golden golden(directory + "/golden.safetensors");
  CudaRunnerOptions options = cuda_options();
  for (const std::string_view pass : compile::pass_names()) options.passes.disabled.emplace_back(pass);
  const auto runner = make_cuda_runner(model, options);
  EXPECT_LE(median_error(golden, runner.get()), model.config.is_moe() ? kMoeTolerance : kDenseTolerance);
}

INSTANTIATE_TEST_SUITE_P(Models, CudaRandomGolden, testing::Values("dense-a", "moe-a", "moe-b"), [](const auto& info) {
  std::string name = info.param;
  name[name.find('-')] = '_';
  return name;
});

// Greedy tokens are compared as long as the stored margin is beyond what the arithmetic can turn.
TEST(CudaDemoGolden, LogitsAndGreedyTokens) {
  const Golden golden(kRoot + "/tests/goldens/demo-model.safetensors");
  const auto runner = make_cuda_runner(test_model(demo_directory()), cuda_options());
  const int64_t vocabulary = runner->capacity().vocabulary_size;
  for (int index = 0; index < 8; ++index) {
    SCOPED_TRACE(index);
    const std::string prefix = "p" + std::to_string(index) + ".";
    const std::vector<int32_t> greedy = golden.ints(prefix + "greedy");
    const std::vector<float> margin = golden.floats(prefix + "greedy_margin");
    const std::vector<int32_t> positions = golden.ints(prefix + "positions");
    const std::vector<float> stored = golden.floats(prefix + "logits_at");
    const Output output = run_one(runner.get(), {golden.ints(prefix + "ids"), static_cast<int32_t>(greedy.size())});
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto expected = std::span<const float>(stored).subspan(i * vocabulary, vocabulary);
      EXPECT_LE(greatest_difference(row_of(output, positions[i], vocabulary), expected), kDemoLogitTolerance);
    }
    for (size_t i = 0; i < greedy.size() && margin[i] > 2 * kDemoLogitTolerance; ++i)
      EXPECT_EQ(output.tokens[i], greedy[i]) << i;
  }
}

// Plays `prompts` to `new_tokens` greedy tokens each without asking for logits: device sampling, and graphs where used.
std::vector<std::vector<int32_t>> play(Runner* runner, const std::vector<std::vector<int32_t>>& prompts,
                                       int32_t new_tokens) {
  const SamplingParameters greedy = {.temperature = 0};
  const int32_t pages_each = runner->capacity().pages / static_cast<int32_t>(prompts.size());
  std::vector<std::vector<int32_t>> outputs(prompts.size()), pages(prompts.size());
  for (size_t s = 0; s < prompts.size(); ++s) {
    for (int32_t i = 0; i < pages_each; ++i)
      pages[s].push_back(static_cast<int32_t>(s) + i * static_cast<int32_t>(prompts.size()));
  }
  for (int32_t round = 0; round < new_tokens; ++round) {
    std::vector<SequenceStep> steps;
    for (size_t s = 0; s < prompts.size(); ++s) {
      SequenceStep step;
      step.tokens = round == 0 ? std::span<const int32_t>(prompts[s]) : std::span<const int32_t>(outputs[s]).last(1);
      step.context = round == 0 ? 0 : static_cast<int32_t>(prompts[s].size()) + round - 1;
      step.pages = pages[s];
      step.state_out = static_cast<int32_t>(s);
      step.state_in = round == 0 ? -1 : step.state_out;
      step.sample = true;
      step.sampling = &greedy;
      steps.push_back(step);
    }
    std::vector<SequenceResult> results;
    const Status submitted = runner->submit(steps);
    EXPECT_TRUE(submitted.ok()) << submitted.message();
    if (!submitted.ok()) return outputs;
    const Status waited = runner->wait(&results);
    EXPECT_TRUE(waited.ok()) << waited.message();
    if (!waited.ok()) return outputs;
    for (size_t s = 0; s < prompts.size(); ++s) {
      EXPECT_TRUE(results[s].status.ok()) << results[s].status.message();
      outputs[s].push_back(results[s].token);
    }
  }
  return outputs;
}

TEST(CudaRunner, GraphsGiveTheTokensOfSingleLaunches) {
  const Golden golden(kRoot + "/tests/goldens/demo-model.safetensors");
  std::vector<std::vector<int32_t>> prompts;
  for (int index = 0; index < 3; ++index) {
    prompts.push_back(golden.ints("p" + std::to_string(index) + ".ids"));
    if (prompts.back().size() > 80) prompts.back().resize(80);
  }
  CudaRunnerOptions options = cuda_options();
  const auto with = play(make_cuda_runner(test_model(demo_directory()), options).get(), prompts, 40);
  options.graphs = false;
  ASSERT_EQ(with[0].size(), 40u);
  EXPECT_EQ(with, play(make_cuda_runner(test_model(demo_directory()), options).get(), prompts, 40));
}

// Steps of at most eight rows: a sequence's tokens are the same alone and beside others, to the last one.
TEST(CudaRunner, FusedDecodingDoesNotDependOnTheBatch) {
  const Golden golden(kRoot + "/tests/goldens/demo-model.safetensors");
  std::vector<std::vector<int32_t>> prompts;
  for (int index = 0; index < 3; ++index) {
    prompts.push_back(golden.ints("p" + std::to_string(index) + ".ids"));
    prompts.back().resize(std::min<size_t>(prompts.back().size(), index == 0 ? 1 : 2 + static_cast<size_t>(index)));
  }
  prompts.resize(2);
  const auto runner = make_cuda_runner(test_model(demo_directory()), cuda_options());
  EXPECT_TRUE(runner->decodes_fused());
  const auto together = play(runner.get(), prompts, 40);
  for (size_t s = 0; s < prompts.size(); ++s) EXPECT_EQ(play(runner.get(), {prompts[s]}, 40)[0], together[s]) << s;
}

TEST(CudaRunner, RefusesWhatDoesNotFit) {
  const TestModel& model = test_model(demo_directory());
  CudaRunnerOptions options = cuda_options();
  options.pages = 3;
  const auto pages = CudaRunner::create(model.graph, *model.source, options);
  ASSERT_FALSE(pages.ok());
  EXPECT_EQ(pages.status().code(), StatusCode::kResourceExhausted) << pages.status().message();
  options = cuda_options();
  options.device = 99;
  const auto device = CudaRunner::create(model.graph, *model.source, options);
  ASSERT_FALSE(device.ok());
  EXPECT_EQ(device.status().code(), StatusCode::kNotFound) << device.status().message();
  options = cuda_options();
  options.memory_fraction = 1e-6;
  const auto memory = CudaRunner::create(model.graph, *model.source, options);
  ASSERT_FALSE(memory.ok());
  EXPECT_EQ(memory.status().code(), StatusCode::kResourceExhausted) << memory.status().message();
}

}  // namespace
}  // namespace tokenspeed::runtime
