// Launches that start before their predecessor ends (programmatic dependent launch) against the same launches each
// waited for: every logit must have the same bits. gpu_delay_tests runs this with random pauses in the kernels around
// the places where a kernel waits for its predecessor and lets its successor start.
#include <gtest/gtest.h>

#include <vector>

#include "model/dummy_weights.h"
#include "model/presets.h"
#include "runtime/cuda/cuda_runner.h"
#include "runtime/driver.h"
#include "runtime/test_model.h"

namespace tokenspeed::runtime {
namespace {

constexpr int kRounds = 6;
constexpr int32_t kNewTokens = 12;

CudaRunnerOptions small_options(bool one_by_one) {
  CudaRunnerOptions options;
  options.max_step_tokens = 64;
  options.max_sequences = 8;
  options.page_size = 16;
  options.max_model_length = 2048;
  options.pages = 512;
  options.debug_sync = one_by_one;
  return options;
}

// Prompts in steps of up to eight rows, then tokens one by one: alone, and three at a time.
std::vector<Output> play(CudaRunner* runner) {
  EXPECT_TRUE(runner->decodes_fused());
  std::vector<Case> cases(3);
  for (int32_t s = 0; s < 3; ++s) {
    for (int32_t i = 0; i < 19 + 2 * s; ++i)
      cases[s].prompt.push_back((i * 7919 + s * 104729 + 5) % runner->capacity().vocabulary_size);
    cases[s].new_tokens = kNewTokens;
  }
  Driver alone(runner, {cases[0]}, 0, 0), together(runner, cases, 100, 1);
  alone.run_alone(8);
  together.run_together(2);
  std::vector<Output> outputs = together.outputs();
  outputs.push_back(alone.outputs()[0]);
  return outputs;
}

void expect_same_bits(const compile::ModelGraph& graph, const compile::WeightSource& source, DType weights) {
  CudaRunnerOptions options = small_options(true);
  options.weights = weights;
  const std::vector<Output> expected = play(must(CudaRunner::create(graph, source, options)).get());
  options.debug_sync = false;
  const auto runner = must(CudaRunner::create(graph, source, options));
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<Output> outputs = play(runner.get());
    for (size_t s = 0; s < outputs.size(); ++s) EXPECT_TRUE(outputs[s] == expected[s]) << s << " in round " << round;
  }
}

TEST(DependentLaunch, DemoModel) {
  const TestModel& model = test_model(demo_directory());
  expect_same_bits(model.graph, *model.source, DType::kBFloat16);
}

void expect_same_bits_of_large_shapes(const char* preset, DType weights) {
  compile::ModelConfig config = must(model::find_preset(preset));
  config.layers.resize(4);
  config.fp8_blocks = weights == DType::kFloat8E4M3;
  const auto source = must(model::DummyWeights::create(config));
  expect_same_bits(must(model::build_graph(config)), *source, weights);
}

TEST(DependentLaunch, ExpertsInFp8) { expect_same_bits_of_large_shapes("qwen3.5-35b-a3b", DType::kFloat8E4M3); }
TEST(DependentLaunch, ExpertsInBFloat16) { expect_same_bits_of_large_shapes("qwen3.5-35b-a3b", DType::kBFloat16); }
TEST(DependentLaunch, DenseInFp8) { expect_same_bits_of_large_shapes("qwen3.5-27b", DType::kFloat8E4M3); }

}  // namespace
}  // namespace tokenspeed::runtime
