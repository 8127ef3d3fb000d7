// The CUDA runner against the stored answers of the reference implementation, and against itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "model/dummy_weights.h"
#include "model/presets.h"
#include "runtime/cuda/cuda_runner.h"
#include "runtime/cuda/fault_dump.h"
#include "runtime/driver.h"
#include "runtime/poisoned_source.h"
#include "runtime/test_model.h"

namespace tokenspeed::runtime {
namespace {

// |difference| / |row| of the median row, activations in bfloat16. Random experts are far apart: a row in which
// rounding turned a close choice of the router is off as a whole.
constexpr float kDenseTolerance = 0.03f;
constexpr float kMoeTolerance = 0.13f;
constexpr float kFp8KvTolerance = 0.06f;
constexpr float kDemoTolerance = 0.01f;  // as of the CPU with bfloat16 activations
constexpr float kDemoLead = 2.0f;        // of a token over the second, beyond what such an error turns
// Of nine rows in ten. The others may have met a close choice of experts: in float32 the second leads the third by as
// little as 0.002, rounding to bfloat16 moves them by 0.006 as a rule, and such a row's logits are off by up to 2.
constexpr float kDemoMostTolerance = 0.03f;

constexpr int64_t kLeakTolerance = int64_t{16} << 20;  // the driver keeps some of what graphs took

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

// Stored rows by their median error, as a close choice between two experts may turn; greedy tokens as long as the
// stored lead is beyond what the arithmetic can turn.
TEST(CudaDemoGolden, LogitsAndGreedyTokens) {
  const Golden golden(kRoot + "/tests/goldens/demo-model.safetensors");
  const auto runner = make_cuda_runner(test_model(demo_directory()), cuda_options());
  const int64_t vocabulary = runner->capacity().vocabulary_size;
  std::vector<float> errors;
  int compared = 0;
  for (int index = 0; index < 8; ++index) {
    SCOPED_TRACE(index);
    const std::string prefix = "p" + std::to_string(index) + ".";
    const std::vector<int32_t> greedy = golden.ints(prefix + "greedy");
    const std::vector<float> margin = golden.floats(prefix + "greedy_margin");
    const std::vector<int32_t> positions = golden.ints(prefix + "positions");
    const std::vector<float> stored = golden.floats(prefix + "logits_at");
    const Output output = run_one(runner.get(), {golden.ints(prefix + "ids"), static_cast<int32_t>(greedy.size())});
    for (size_t i = 0; i < positions.size(); ++i) {
      errors.push_back(relative_error(row_of(output, positions[i], vocabulary),
                                      std::span<const float>(stored).subspan(i * vocabulary, vocabulary)));
    }
    for (size_t i = 0; i < greedy.size() && margin[i] > kDemoLead; ++i, ++compared)
      EXPECT_EQ(output.tokens[i], greedy[i]) << i;
  }
  EXPECT_GT(compared, 8);
  for (float& error : errors) error = std::isnan(error) ? INFINITY : error;
  std::sort(errors.begin(), errors.end());
  EXPECT_LE(errors[errors.size() / 2], kDemoTolerance);
  EXPECT_LE(errors[errors.size() * 9 / 10], kDemoMostTolerance);
}

// Plays `prompts` to `new_tokens` tokens each without asking for logits: greedy ones are sampled on the device, and
// graphs are used where they can be.
std::vector<std::vector<int32_t>> play(Runner* runner, const std::vector<std::vector<int32_t>>& prompts,
                                       int32_t new_tokens, const SamplingParameters& sampling = {.temperature = 0}) {
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
      step.sampling = &sampling;
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

std::vector<std::vector<int32_t>> demo_prompts(int count, size_t length) {
  const Golden golden(kRoot + "/tests/goldens/demo-model.safetensors");
  std::vector<std::vector<int32_t>> prompts;
  for (int i = 0; i < count; ++i) {
    prompts.push_back(golden.ints("p" + std::to_string(i % 8) + ".ids"));
    prompts.back().resize(std::min(prompts.back().size(), length + static_cast<size_t>(i)));
  }
  return prompts;
}

// More rows than the fused kernels and one launch of the argmax take.
TEST(CudaRunner, SamplesManySequencesOnTheDevice) {
  CudaRunnerOptions options = cuda_options();
  options.max_sequences = 20;
  options.max_step_tokens = 512;
  const auto prompts = demo_prompts(20, 6);
  const auto with = play(make_cuda_runner(test_model(demo_directory()), options).get(), prompts, 12);
  options.graphs = false;
  EXPECT_EQ(with, play(make_cuda_runner(test_model(demo_directory()), options).get(), prompts, 12));
  for (const auto& tokens : with) EXPECT_EQ(tokens.size(), 12u);
}

// The same greedy tokens whether the device takes them or, because of log probabilities, the host.
TEST(CudaRunner, HostAndDeviceChooseTheSameTokens) {
  const auto prompts = demo_prompts(5, 40);
  const auto runner = make_cuda_runner(test_model(demo_directory()), cuda_options());
  const auto on_device = play(runner.get(), prompts, 24);
  EXPECT_EQ(on_device, play(runner.get(), prompts, 24, {.temperature = 0, .logprobs = 2}));
}

// Random draws are the CPU sampler's, which the host uses for rows with log probabilities.
TEST(CudaRunner, HostAndDeviceDrawTheSameTokens) {
  const auto prompts = demo_prompts(5, 40);
  const auto runner = make_cuda_runner(test_model(demo_directory()), cuda_options());
  const SamplingParameters kinds[] = {{.temperature = 1.3f, .seed = 3},
                                      {.temperature = 0.8f, .top_k = 20, .top_p = 0.9f, .seed = 1ull << 40},
                                      {.temperature = 1.1f, .min_p = 0.02f, .seed = 9}};
  for (SamplingParameters sampling : kinds) {
    const auto on_device = play(runner.get(), prompts, 24, sampling);
    sampling.logprobs = 0;
    EXPECT_EQ(on_device, play(runner.get(), prompts, 24, sampling)) << sampling.temperature;
  }
}

// Beside a greedy sequence, one with draws and logprobs and one that may answer with two tokens only.
TEST(CudaRunner, MixesGreedySequencesWithOthers) {
  const auto prompts = demo_prompts(3, 20);
  const auto runner = make_cuda_runner(test_model(demo_directory()), cuda_options());
  const auto greedy = play(runner.get(), prompts, 1);
  const SamplingParameters plain = {.temperature = 0};
  const SamplingParameters random = {.temperature = 0.7f, .seed = 5, .logprobs = 3};
  const std::vector<int32_t> allowed = {11, 17};
  std::vector<std::vector<int32_t>> pages(3);
  std::vector<SequenceStep> steps(3);
  for (int32_t s = 0; s < 3; ++s) {
    for (int32_t i = 0; i < 4; ++i) pages[s].push_back(4 * s + i);
    steps[s].tokens = prompts[s];
    steps[s].pages = pages[s];
    steps[s].state_out = s;
    steps[s].sample = true;
    steps[s].sampling = s == 1 ? &random : &plain;
    steps[s].prompt = prompts[s];
  }
  steps[2].allowed_tokens = allowed;
  std::vector<SequenceResult> results[2];
  for (auto& result : results) {
    ASSERT_TRUE(runner->submit(steps).ok());
    ASSERT_TRUE(runner->wait(&result).ok());
  }
  EXPECT_EQ(results[0][0].token, greedy[0][0]);
  EXPECT_TRUE(results[0][0].logprobs.empty());
  EXPECT_GE(results[0][1].token, 0);
  EXPECT_EQ(results[0][1].token, results[1][1].token);
  ASSERT_EQ(results[0][1].logprobs.size(), 1u);
  EXPECT_EQ(results[0][1].logprobs[0].top.size(), 3u);
  EXPECT_TRUE(results[0][2].token == allowed[0] || results[0][2].token == allowed[1]) << results[0][2].token;
}

// The shapes of the 35B model on four layers, used the moment it is made: what loading left to the device must be done.
TEST(CudaRunner, LargeShapesRightAfterLoading) {
  compile::ModelConfig config = must(model::find_preset("qwen3.5-35b-a3b"));
  config.layers.resize(4);
  config.fp8_blocks = true;
  const auto source = must(model::DummyWeights::create(config));
  const compile::ModelGraph graph = must(model::build_graph(config));
  CudaRunnerOptions options;
  options.weights = DType::kFloat8E4M3;
  options.kv_bytes = int64_t{16} << 30;  // takes the device a while to clear
  options.max_model_length = 1 << 20;
  options.max_sequences = 10;
  std::vector<std::vector<int32_t>> prompts(10);
  for (int32_t s = 0; s < 10; ++s) {
    for (int32_t i = 0; i < 64; ++i) prompts[s].push_back((i * 7919 + s * 104729) % 248000);
  }
  const auto runner = must(CudaRunner::create(graph, *source, options));
  EXPECT_TRUE(runner->decodes_fused());
  const auto first = play(runner.get(), prompts, 4);
  EXPECT_EQ(first, play(runner.get(), prompts, 4));
  EXPECT_EQ(first[0].size(), 4u);
}

// The fused kernels against the ones for any number of tokens, without experts: no close choice to turn. (With those of
// the 35B model's shapes a simulation of the roundings alone gives medians of eight rows from 0.04 to 0.18, by the
// draw, and from 0.02 to 0.04 when the choices are forced to be the same.) Eight rows of the wide projection take two
// launches.
TEST(CudaRunner, FusedStepsEqualOthersOnLargeShapes) {
  compile::ModelConfig config = must(model::find_preset("qwen3.5-4b"));
  config.layers.resize(4);
  const auto source = must(model::DummyWeights::create(config));
  const compile::ModelGraph graph = must(model::build_graph(config));
  const Case given = {{5, 7000, 140000, 248000, 99, 31337, 1, 77}, 3};
  for (const DType kv : {DType::kBFloat16, DType::kFloat8E4M3}) {
    SCOPED_TRACE(dtype_name(kv));
    Output outputs[2];
    for (const bool fused : {false, true}) {
      CudaRunnerOptions options = cuda_options();
      options.fused_decode = fused;
      options.kv = kv;
      const auto runner = must(CudaRunner::create(graph, *source, options));
      EXPECT_EQ(runner->decodes_fused(), fused);
      outputs[fused] = run_one(runner.get(), given, 8);
    }
    for (int64_t row = 0; row < 8; ++row) {
      EXPECT_LE(relative_error(row_of(outputs[1], row, config.vocabulary_size),
                               row_of(outputs[0], row, config.vocabulary_size)),
                kDenseTolerance)
          << row;
    }
  }
}

// Half the memory; the stored answers, which were computed with a cache in float32, to the precision of e4m3.
TEST(CudaRunner, Fp8KvCache) {
  const std::string directory = random_directory("dense-a");
  const TestModel& model = test_model(directory);
  const Golden golden(directory + "/golden.safetensors");
  CudaRunnerOptions options = cuda_options();
  const auto wide = make_cuda_runner(model, options);
  options.kv = DType::kFloat8E4M3;
  const auto runner = make_cuda_runner(model, options);
  EXPECT_EQ(2 * runner->program().kv.bytes_per_position(), wide->program().kv.bytes_per_position());
  EXPECT_LE(median_error(golden, runner.get()), kFp8KvTolerance);
}

// One rank of a layout whose collectives are left out: to measure it, or not at all.
TEST(CudaRunner, RunsOneRankAloneOnlyWhenAsked) {
  compile::ModelConfig config = must(model::find_preset("qwen3.5-35b-a3b"));
  config.layers.resize(4);
  config.fp8_blocks = true;
  const auto source = must(model::DummyWeights::create(config));
  const compile::ModelGraph graph = must(model::build_graph(config, {.tensor_parallel = 2}));
  CudaRunnerOptions options = cuda_options();
  options.weights = DType::kFloat8E4M3;
  options.rank = 1;
  const auto refused = CudaRunner::create(graph, *source, options);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kUnimplemented) << refused.status().message();
  options.rank_only = true;
  const auto runner = must(CudaRunner::create(graph, *source, options));
  EXPECT_TRUE(runner->decodes_fused());
  for (const auto& tokens : play(runner.get(), demo_prompts(2, 30), 5)) EXPECT_EQ(tokens.size(), 5u);
}

// The first step of a sequence of `count` tokens, at most ten.
SequenceStep greedy_step(size_t count) {
  static const SamplingParameters greedy = {.temperature = 0};
  static const std::vector<int32_t> tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, pages = {0};
  SequenceStep step;
  step.tokens = std::span(tokens).first(count);
  step.pages = pages;
  step.sample = true;
  step.sampling = &greedy;
  return step;
}

TEST(CudaRunner, ProfilesEveryWeightOfAStep) {
  const auto runner = make_cuda_runner(test_model(random_directory("moe-a")), cuda_options());
  for (const size_t count : {size_t{1}, size_t{10}}) {
    const SequenceStep step = greedy_step(count);
    std::vector<SequenceResult> results;
    const std::vector<LaunchTime> launches = must(runner->profile({&step, 1}, &results));
    EXPECT_GE(results[0].token, 0);
    std::vector<double> shares(runner->program().operations.size(), 0);
    for (const LaunchTime& launch : launches) {
      EXPECT_GT(launch.seconds, 0);
      for (const OperationPart& part : launch.parts) shares[part.operation] += part.share;
    }
    EXPECT_TRUE(launches.back().parts.empty());
    for (size_t i = 0; i < shares.size(); ++i) {
      const compile::Operation& op = runner->program().operations[i];
      if (op.kind != compile::OpKind::kLinear && op.kind != compile::OpKind::kExperts) continue;
      EXPECT_NEAR(shares[i], 1, 1e-9) << op.name;
    }
  }
}

TEST(CudaRunner, TimesEveryKindOfLaunchOfAStep) {
  const auto runner = make_cuda_runner(test_model(random_directory("moe-a")), cuda_options());
  for (const size_t count : {size_t{1}, size_t{10}}) {
    const SequenceStep step = greedy_step(count);
    std::vector<SequenceResult> before, profiled, after;
    ASSERT_TRUE(runner->submit({&step, 1}).ok() && runner->wait(&before).ok());
    const size_t launches = must(runner->profile({&step, 1}, &profiled)).size();
    const std::vector<LaunchTime> kinds = must(runner->time_kinds({&step, 1}, 3));
    size_t timed = 0;
    std::vector<double> shares(runner->program().operations.size(), 0);
    for (const LaunchTime& kind : kinds) {
      EXPECT_GT(kind.seconds, 0);
      timed += static_cast<size_t>(kind.launches);
      for (const OperationPart& part : kind.parts) shares[part.operation] += part.share;
    }
    EXPECT_EQ(timed, launches);
    EXPECT_LT(kinds.size(), launches) << "layers are alike";
    for (size_t i = 0; i < shares.size(); ++i) {
      const compile::Operation& op = runner->program().operations[i];
      if (op.kind != compile::OpKind::kLinear && op.kind != compile::OpKind::kExperts) continue;
      EXPECT_NEAR(shares[i], 1, 1e-9) << op.name;
    }
    ASSERT_TRUE(runner->submit({&step, 1}).ok() && runner->wait(&after).ok());
    EXPECT_EQ(after[0].token, before[0].token) << "from the zero state again";
  }
}

// A NaN or infinity ends its sequence alone, greedy on the device: with few rows and with many.
class CudaPoison : public testing::TestWithParam<float> {};

TEST_P(CudaPoison, EndsItsSequenceAlone) {
  constexpr int32_t kPoisoned = 7;
  const TestModel& model = test_model(random_directory("moe-a"));
  const PoisonedSource source(*model.source, kPoisoned, GetParam());
  const auto runner = must(CudaRunner::create(model.graph, source, cuda_options()));
  const SamplingParameters greedy = {.temperature = 0};
  for (const size_t length : {size_t{2}, size_t{30}}) {
    std::vector<int32_t> tokens[2];  // of the two runs
    for (const bool sick : {false, true}) {
      std::vector<std::vector<int32_t>> prompts(3), pages(3);
      std::vector<SequenceStep> steps(3);
      for (int32_t s = 0; s < 3; ++s) {
        for (size_t i = 0; i < length; ++i) prompts[s].push_back(20 + s * 40 + static_cast<int32_t>(i));
        if (s == 1 && sick) prompts[s][1] = kPoisoned;
        pages[s] = {2 * s, 2 * s + 1};
        steps[s].tokens = prompts[s];
        steps[s].pages = pages[s];
        steps[s].state_out = s;
        steps[s].sample = true;
        steps[s].sampling = &greedy;
      }
      std::vector<SequenceResult> results;
      ASSERT_TRUE(runner->submit(steps).ok());
      ASSERT_TRUE(runner->wait(&results).ok());
      EXPECT_EQ(results[1].status.ok(), !sick);
      if (sick) {
        EXPECT_EQ(results[1].status.code(), StatusCode::kInternal);
      }
      for (const int s : {0, 2}) {
        EXPECT_TRUE(results[s].status.ok()) << results[s].status.message();
        tokens[sick].push_back(results[s].token);
      }
    }
    EXPECT_EQ(tokens[0], tokens[1]) << length;
  }
}

INSTANTIATE_TEST_SUITE_P(Poison, CudaPoison,
                         testing::Values(std::numeric_limits<float>::quiet_NaN(),
                                         std::numeric_limits<float>::infinity()));

TEST(CudaRunner, EveryAllocationOfALoadMayFail) {
  const TestModel& model = test_model(random_directory("moe-a"));
  { const auto warm_up = make_cuda_runner(model, cuda_options()); }  // the context and the libraries stay allocated
  const int64_t free_before = free_device_memory();
  int32_t n = 0;
  for (bool loaded = false; !loaded && n < 100; ++n) {
    fail_allocation(n);
    const auto runner = CudaRunner::create(model.graph, *model.source, cuda_options());
    fail_allocation(-1);
    loaded = runner.ok();
    if (loaded) break;
    EXPECT_EQ(runner.status().code(), StatusCode::kResourceExhausted) << n << ": " << runner.status().message();
    EXPECT_NE(runner.status().message().find(" for "), std::string::npos) << runner.status().message();
  }
  EXPECT_GE(n, 10);
  EXPECT_LT(n, 100);
  EXPECT_GE(free_device_memory(), free_before - kLeakTolerance);
}

// What a message of a fault must hold, by the Program.
using Expected = std::string (*)(const compile::Program&);

std::string first_mixer(const compile::Program& program) {
  const auto& operations = program.operations;
  const auto found = std::find_if(operations.begin(), operations.end(),
                                  [](const auto& op) { return op.kind == compile::OpKind::kGdnMixer; });
  return "operation " + std::to_string(found - operations.begin()) + " '" + found->name + "' of layer 0";
}

// In a process of its own: a fault leaves the context unusable. The launch that fails is the first of step
// `failing_step` that reads a state. Steps have one token, from that one on failing_tokens; the first of a kind runs
// launch by launch, the second as a graph. A graph's other launches may still end and publish the step's token: the
// next step tells then.
constexpr uint64_t kStepsUntilTold = 2;
int run_into_fault(bool debug_sync, uint64_t failing_step, Expected expected, size_t failing_tokens = 1) {
  CudaRunnerOptions options = cuda_options();
  int told = 0;
  options.debug_sync = options.operations_apart = debug_sync;
  options.fault_in_step = failing_step;
  options.on_fault = [&](const Status&) { ++told; };
  const auto runner = make_cuda_runner(test_model(demo_directory()), options);
  const SamplingParameters greedy = {.temperature = 0};
  const std::vector<int32_t> token = {3}, tokens(failing_tokens, 3), pages = {0};
  SequenceStep step;
  step.pages = pages;
  step.sample = true;
  step.sampling = &greedy;
  std::vector<SequenceResult> results;
  Status status;
  for (uint64_t i = 1; i <= failing_step + kStepsUntilTold && status.ok(); ++i) {
    step.tokens = i < failing_step ? token : tokens;
    status = runner->submit({&step, 1});
    if (status.ok()) status = runner->wait(&results);
    if (i < failing_step && !status.ok()) return 9;
  }
  const Status again = runner->submit({&step, 1});
  const std::string place = expected(runner->program());
  fprintf(stderr, "%s\nexpected: '%s'\n", status.message().c_str(), place.c_str());
  const bool as_promised = status.code() == StatusCode::kInternal && again.message() == status.message() && told == 1 &&
                           status.message().find(place) != std::string::npos &&
                           (failing_tokens == 1 || status.message().find("come to") == std::string::npos);
  return as_promised ? 7 : 8;
}

TEST(CudaRunnerDeathTest, AFaultEndsEveryStepAndIsToldOnce) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(std::_Exit(run_into_fault(false, 1, first_mixer)), testing::ExitedWithCode(7),
              "a step of 1 sequences.*which had come to .* with --debug-sync the message names the operation.*"
              "The process must be started again");
}

// The driver reads its settings when it starts, so they must be there before the process that will fail is; every one
// of them would change how later processes fail.
void expect_fault_told(bool debug_sync, uint64_t failing_step, Expected expected) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  arm_fault_dump();
  EXPECT_EXIT(std::_Exit(run_into_fault(debug_sync, failing_step, expected)), testing::ExitedWithCode(7),
              "the GPU failed");
  for (const char* setting : {"CUDA_ENABLE_COREDUMP_ON_EXCEPTION", "CUDA_ENABLE_LIGHTWEIGHT_COREDUMP",
                              "CUDA_COREDUMP_GENERATION_FLAGS", "CUDA_COREDUMP_FILE"})
    unsetenv(setting);
}

// The first launch that reads a state holds four layers; its dump names all of them, if the driver finishes it
// (fault_dump.h). The message has the operation that the launch had come to in either case.
TEST(CudaRunnerDeathTest, AFaultInALaunchOfLayersTellsWhereItWas) { expect_fault_told(false, 1, first_mixer); }
TEST(CudaRunnerDeathTest, AFaultInAGraphTellsWhereItWas) { expect_fault_told(false, 2, first_mixer); }
TEST(CudaRunnerDeathTest, WithDebugSyncADumpNamesTheOperation) { expect_fault_told(true, 1, first_mixer); }

// Where a step of few tokens came to is no place of a prompt's.
std::string prompt_of_twelve(const compile::Program&) { return "a step of 1 sequences and 12 tokens"; }
TEST(CudaRunnerDeathTest, AFaultInAPromptDoesNotNameWhereAnEarlierStepEnded) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(std::_Exit(run_into_fault(false, 3, prompt_of_twelve, 12)), testing::ExitedWithCode(7), "the GPU failed");
}

TEST(CudaRunnerDeathTest, WithDebugSyncAFaultNamesItsOperation) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(std::_Exit(run_into_fault(true, 1, first_mixer)), testing::ExitedWithCode(7), "a step of 1 sequences");
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
