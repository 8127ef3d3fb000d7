#include "app/runner_bench.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <span>

#include "base/random.h"

namespace tokenspeed::app {

BenchBatch::BenchBatch(runtime::Runner* runner)
    : runner_(runner),
      run_([runner](std::span<const runtime::SequenceStep> steps, std::vector<runtime::SequenceResult>* results) {
        Status status = runner->submit(steps);
        return status.ok() ? runner->wait(results) : std::move(status);
      }) {}

Result<BenchBatch> BenchBatch::create(runtime::Runner* runner, int32_t sequences, int32_t prompt_length,
                                      int32_t new_tokens) {
  const runtime::Capacity& capacity = runner->capacity();
  const int64_t length = int64_t{prompt_length} + new_tokens;
  const int64_t pages = (length + capacity.page_size - 1) / capacity.page_size;
  if (length > capacity.max_model_length || sequences > std::min(capacity.max_sequences, capacity.state_slots) ||
      pages * sequences > capacity.pages) {
    return invalid_argument(std::to_string(sequences) + " sequences of " + std::to_string(length) +
                            " tokens do not fit: the runner holds " + std::to_string(capacity.max_sequences) +
                            " sequences of up to " + std::to_string(capacity.max_model_length) + " tokens and " +
                            std::to_string(int64_t{capacity.pages} * capacity.page_size) +
                            " tokens in all; lower --batch-size, --input-len or --output-len");
  }
  BenchBatch batch(runner);
  batch.sampling_.temperature = 0;
  for (int32_t s = 0; s < sequences; ++s) {
    Sequence sequence;
    for (int32_t i = 0; i < prompt_length; ++i) {
      const uint32_t random = philox(1, static_cast<uint64_t>(s), static_cast<uint64_t>(i))[0];
      sequence.prompt.push_back(static_cast<int32_t>(random % static_cast<uint32_t>(capacity.vocabulary_size)));
    }
    sequence.pages.resize(static_cast<size_t>(pages));
    std::iota(sequence.pages.begin(), sequence.pages.end(), static_cast<int32_t>(s * pages));
    batch.sequences_.push_back(std::move(sequence));
  }
  return batch;
}

void BenchBatch::restart() {
  for (Sequence& sequence : sequences_) {
    sequence.output.clear();
    sequence.computed = 0;
  }
}

runtime::SequenceStep BenchBatch::next_step(size_t index, int32_t tokens, int32_t in_flight) const {
  static constexpr int32_t kUnknownToken = 0;
  const Sequence& sequence = sequences_[index];
  const std::span<const int32_t> prompt(sequence.prompt);
  const auto prompt_size = static_cast<int32_t>(prompt.size());
  runtime::SequenceStep step;
  if (in_flight > 0) {
    step.token_from = static_cast<int32_t>(index);
    step.tokens = {&kUnknownToken, 1};
  } else if (sequence.computed < prompt_size) {
    step.tokens = prompt.subspan(static_cast<size_t>(sequence.computed), static_cast<size_t>(tokens));
  } else {
    step.tokens = std::span<const int32_t>(sequence.output).last(1);
  }
  step.context = sequence.computed + in_flight;
  step.pages = sequence.pages;
  step.state_out = static_cast<int32_t>(index);
  step.state_in = step.context == 0 ? -1 : step.state_out;
  step.sample = step.context + tokens >= prompt_size;
  step.sampling = &sampling_;
  step.prompt = prompt;
  step.output = sequence.output;
  return step;
}

Result<double> BenchBatch::step(const std::vector<runtime::SequenceStep>& steps) {
  const auto start = std::chrono::steady_clock::now();
  TS_RETURN_IF_ERROR(run_(steps, &results_));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  TS_RETURN_IF_ERROR(take_results(steps));
  return seconds.count();
}

Status BenchBatch::take_results(const std::vector<runtime::SequenceStep>& steps) {
  for (size_t i = 0; i < steps.size(); ++i) {
    TS_RETURN_IF_ERROR(results_[i].status);
    Sequence& sequence = sequences_[static_cast<size_t>(steps[i].state_out)];
    sequence.computed += static_cast<int32_t>(steps[i].tokens.size());
    if (steps[i].sample) sequence.output.push_back(results_[i].token);
  }
  return {};
}

Result<double> BenchBatch::prefill(int32_t until) {
  double seconds = 0;
  std::vector<runtime::SequenceStep> steps;
  while (true) {
    steps.clear();
    int32_t budget = runner_->capacity().max_step_tokens;
    for (size_t s = 0; s < sequences_.size() && budget > 0; ++s) {
      const auto end = std::min(until, static_cast<int32_t>(sequences_[s].prompt.size()));
      const int32_t left = end - sequences_[s].computed;
      if (left <= 0) continue;
      steps.push_back(next_step(s, std::min(left, budget)));
      budget -= static_cast<int32_t>(steps.back().tokens.size());
    }
    if (steps.empty()) return seconds;
    TS_ASSIGN_OR_RETURN(const double one, step(steps));
    seconds += one;
  }
}

Result<double> BenchBatch::decode() {
  std::vector<runtime::SequenceStep> steps;
  for (size_t s = 0; s < sequences_.size(); ++s) steps.push_back(next_step(s, 1));
  return step(steps);
}

BenchBatch::StepCalls BenchBatch::calls_of(runtime::Runner* runner) {
  return {[runner](std::span<const runtime::SequenceStep> steps) { return runner->submit(steps); },
          [runner](std::vector<runtime::SequenceResult>* results) { return runner->wait(results); }};
}

Result<std::vector<double>> BenchBatch::decode(int32_t count, const StepCalls& calls) {
  std::vector<runtime::SequenceStep> steps[runtime::kMostStepsInFlight];
  std::vector<double> seconds;
  auto last = std::chrono::steady_clock::now();
  for (int32_t waited = 0, submitted = 0; waited < count; ++waited) {
    for (; submitted < std::min(count, waited + runner_->capacity().steps_in_flight); ++submitted) {
      auto& next = steps[submitted % runtime::kMostStepsInFlight];
      next.clear();
      for (size_t s = 0; s < sequences_.size(); ++s) next.push_back(next_step(s, 1, submitted - waited));
      TS_RETURN_IF_ERROR(calls.submit(next));
    }
    TS_RETURN_IF_ERROR(calls.wait(&results_));
    const auto now = std::chrono::steady_clock::now();
    seconds.push_back(std::chrono::duration<double>(now - std::exchange(last, now)).count());
    TS_RETURN_IF_ERROR(take_results(steps[waited % runtime::kMostStepsInFlight]));
  }
  return seconds;
}

}  // namespace tokenspeed::app
