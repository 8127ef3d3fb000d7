// Twenty thousand steps of sequences that come, go and are given up: nothing leaks, slows down or changes.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <random>
#include <vector>

#include "runtime/cuda/cuda_runner.h"
#include "runtime/test_model.h"

namespace tokenspeed::runtime {
namespace {

constexpr int kSteps = 20000;
constexpr int32_t kSequences = 12;
constexpr int32_t kPagesEach = 16;  // of 16 positions
constexpr unsigned kSeed = 20251125;
constexpr int64_t kLeakTolerance = int64_t{64} << 20;  // graphs of new shapes take some of the device's memory
constexpr double kDriftTolerance = 1.3;                // of the median step of one shape, last against first quarter

struct Sequence {
  std::vector<int32_t> tokens;  // prompt and output
  int32_t prompt = 0;
  int32_t computed = 0;
  int32_t end = 0;    // total length at which it is done
  int32_t slot = -1;  // and its pages; -1: not running
};

class Soak {
 public:
  explicit Soak(Runner* runner) : runner_(runner), sequences_(kSequences), random_(kSeed) {
    for (int32_t s = 0; s < kSequences; ++s) {
      pages_.emplace_back();
      for (int32_t i = 0; i < kPagesEach; ++i) pages_[s].push_back(s + i * kSequences);
    }
  }

  // Seconds of the step, and its shape as (sequences, rows).
  std::pair<double, std::pair<int32_t, int32_t>> step() {
    come_and_go();
    std::vector<SequenceStep> steps;
    std::vector<int32_t> chosen;
    int32_t rows = 0;
    for (int32_t s = 0; s < kSequences; ++s) {
      Sequence& sequence = sequences_[s];
      if (sequence.slot < 0) continue;
      const int32_t left = static_cast<int32_t>(sequence.tokens.size()) - sequence.computed;
      const int32_t count = std::min(left, 40);
      SequenceStep step;
      step.tokens = std::span<const int32_t>(sequence.tokens).subspan(sequence.computed, count);
      step.context = sequence.computed;
      step.pages = pages_[s];
      step.state_out = s;
      step.state_in = sequence.computed == 0 ? -1 : s;
      step.sample = count == left;
      step.sampling = &greedy_;
      steps.push_back(step);
      chosen.push_back(s);
      rows += count;
    }
    const auto begin = std::chrono::steady_clock::now();
    Status status = runner_->submit(steps);
    if (status.ok()) status = runner_->wait(&results_);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    EXPECT_TRUE(status.ok()) << status.message();
    for (size_t i = 0; i < chosen.size() && status.ok(); ++i) {
      Sequence& sequence = sequences_[chosen[i]];
      sequence.computed += static_cast<int32_t>(steps[i].tokens.size());
      if (!steps[i].sample) continue;
      EXPECT_GE(results_[i].token, 0);
      sequence.tokens.push_back(results_[i].token);
    }
    return {seconds.count(), {static_cast<int32_t>(steps.size()), rows}};
  }

 private:
  void come_and_go() {
    int running = 0;
    for (Sequence& sequence : sequences_) {
      const bool done = static_cast<int32_t>(sequence.tokens.size()) >= sequence.end;
      if (sequence.slot >= 0 && (done || random_() % 400 == 0)) sequence = {};  // ended, or its client left
      running += sequence.slot >= 0;
    }
    for (int32_t s = 0; s < kSequences; ++s) {
      Sequence& sequence = sequences_[s];
      if (sequence.slot >= 0 || (running > 0 && random_() % 60 != 0)) continue;
      sequence.slot = s;
      sequence.prompt = 1 + static_cast<int32_t>(random_() % 90);
      for (int32_t i = 0; i < sequence.prompt; ++i) {
        sequence.tokens.push_back(static_cast<int32_t>(random_() % runner_->capacity().vocabulary_size));
      }
      sequence.end = sequence.prompt + 1 + static_cast<int32_t>(random_() % 120);
      ++running;
    }
  }

  Runner* runner_;
  const SamplingParameters greedy_ = {.temperature = 0};
  std::vector<Sequence> sequences_;
  std::vector<std::vector<int32_t>> pages_;
  std::vector<SequenceResult> results_;
  std::mt19937 random_;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// Greedy tokens after a fixed prompt, alone.
std::vector<int32_t> fixed_answer(Runner* runner) {
  const SamplingParameters greedy = {.temperature = 0};
  std::vector<int32_t> tokens = {3, 1, 4, 1, 5, 9, 2, 6}, pages = {0, 1, 2};
  int32_t computed = 0;
  for (int i = 0; i < 30; ++i) {
    SequenceStep step;
    step.tokens = std::span<const int32_t>(tokens).subspan(computed);
    step.context = computed;
    step.pages = pages;
    step.state_in = computed == 0 ? -1 : 0;
    step.sample = true;
    step.sampling = &greedy;
    std::vector<SequenceResult> results;
    EXPECT_TRUE(runner->submit({&step, 1}).ok());
    EXPECT_TRUE(runner->wait(&results).ok());
    computed = static_cast<int32_t>(tokens.size());
    tokens.push_back(results[0].token);
  }
  return tokens;
}

TEST(CudaSoak, ManyStepsOfChangingBatches) {
  SCOPED_TRACE(kSeed);
  const TestModel& model = test_model(demo_directory());
  CudaRunnerOptions options;
  options.max_step_tokens = 512;
  options.max_sequences = kSequences;
  options.page_size = 16;
  options.max_model_length = 16 * kPagesEach;
  options.pages = kSequences * kPagesEach;
  const auto runner = must(CudaRunner::create(model.graph, *model.source, options));
  const std::vector<int32_t> answer = fixed_answer(runner.get());
  Soak soak(runner.get());
  std::map<std::pair<int32_t, int32_t>, std::vector<double>> quarters[4];
  int64_t free_bytes = 0;
  for (int i = 0; i < kSteps && !HasFailure(); ++i) {
    const auto [seconds, shape] = soak.step();
    quarters[i * 4 / kSteps][shape].push_back(seconds);
    if (i == kSteps / 4) free_bytes = free_device_memory();
  }
  EXPECT_GE(free_device_memory(), free_bytes - kLeakTolerance);
  EXPECT_EQ(answer, fixed_answer(runner.get()));
  for (const auto& [shape, first] : quarters[0]) {
    const auto last = quarters[3].find(shape);
    if (first.size() < 100 || last == quarters[3].end() || last->second.size() < 100) continue;
    EXPECT_LE(median(last->second), kDriftTolerance * median(first)) << shape.first << " sequences";
  }
}

}  // namespace
}  // namespace tokenspeed::runtime
