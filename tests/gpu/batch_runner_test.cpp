// Steps of 9 to 64 sequences of one token each against steps of at most eight, on layers of real sizes.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "model/dummy_weights.h"
#include "model/presets.h"
#include "runtime/cuda/cuda_runner.h"
#include "runtime/driver.h"
#include "runtime/test_model.h"

namespace tokenspeed::runtime {
namespace {

// |difference| / |row| of the median row: both kinds of kernels see bfloat16 activations exactly. A row in which
// rounding turned a close choice of the router is off as a whole.
constexpr float kMedianTolerance = 0.03f;
constexpr int32_t kSequences = 20;
constexpr int32_t kTokens = 3;

// Logits of the sequences' tokens, `together` sequences in a step.
std::vector<Output> logits_of(CudaRunner* runner, const std::vector<Case>& cases, size_t together) {
  Driver driver(runner, cases);
  for (size_t begin = 0; begin < cases.size(); begin += together) {
    for (int32_t token = 0; token < kTokens; ++token) {
      std::vector<Share> shares;
      for (size_t s = begin; s < std::min(begin + together, cases.size()); ++s) shares.push_back({s, 1});
      driver.step(shares);
    }
  }
  return driver.outputs();
}

void compare(const char* preset, bool fp8) {
  SCOPED_TRACE(preset);
  compile::ModelConfig config = must(model::find_preset(preset));
  config.layers.resize(4);
  config.fp8_blocks = fp8;
  const auto source = must(model::DummyWeights::create(config));
  const compile::ModelGraph graph = must(model::build_graph(config));
  CudaRunnerOptions options;
  options.max_step_tokens = 256;
  options.max_sequences = kSequences;
  options.page_size = 16;
  options.max_model_length = 1024;
  options.pages = 64;
  if (fp8) options.weights = DType::kFloat8E4M3;
  const auto runner = must(CudaRunner::create(graph, *source, options));
  std::vector<Case> cases(kSequences);
  for (int32_t s = 0; s < kSequences; ++s) {
    for (int32_t i = 0; i < kTokens; ++i) cases[s].prompt.push_back((i * 7919 + s * 104729) % 248000);
  }
  const auto many = logits_of(runner.get(), cases, kSequences);
  const auto few = logits_of(runner.get(), cases, 8);
  std::vector<float> errors;
  for (int32_t s = 0; s < kSequences; ++s) {
    for (int64_t row = 0; row < kTokens; ++row) {
      const float error =
          relative_error(row_of(many[s], row, config.vocabulary_size), row_of(few[s], row, config.vocabulary_size));
      errors.push_back(std::isnan(error) ? INFINITY : error);
    }
  }
  std::nth_element(errors.begin(), errors.begin() + errors.size() / 2, errors.end());
  EXPECT_LE(errors[errors.size() / 2], kMedianTolerance);
}

TEST(CudaBatch, StepsEqualThoseOfFewSequences) {
  compare("qwen3.5-35b-a3b", true);
  compare("qwen3.5-35b-a3b", false);
  compare("qwen3.5-4b", false);
}

}  // namespace
}  // namespace tokenspeed::runtime
