// Timed runs of a Runner without engine or server: what `bench decode` and `bench prefill` measure.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "base/status.h"
#include "runtime/runner.h"

namespace tokenspeed::app {

// Random prompts of equal length for `sequences` sequences, each with pages and a slot of its own, advanced together.
class BenchBatch {
 public:
  // invalid_argument when the runner's pages, slots or step hold less than sequences * length tokens need.
  static Result<BenchBatch> create(runtime::Runner* runner, int32_t sequences, int32_t prompt_length,
                                   int32_t new_tokens);

  // Seconds from the first prompt token that is not computed yet to the first sampled token of every sequence, in
  // chunks of the greatest step. With `until` only that many tokens of each prompt are computed.
  Result<double> prefill(int32_t until = std::numeric_limits<int32_t>::max());
  // Seconds of one step that gives every sequence its next token.
  Result<double> decode();
  // What starts a step and what waits for the oldest one in flight.
  struct StepCalls {
    std::function<Status(std::span<const runtime::SequenceStep> steps)> submit;
    std::function<Status(std::vector<runtime::SequenceResult>* results)> wait;
  };
  static StepCalls calls_of(runtime::Runner* runner);
  // `count` such steps as the engine runs them, as many in flight as the runner takes: seconds from the end of one to
  // the end of the next.
  Result<std::vector<double>> decode(int32_t count, const StepCalls& calls);
  void set_temperature(float temperature) { sampling_.temperature = temperature; }
  void restart();  // forget the tokens; the next call is prefill()
  // What runs a step from now on in prefill() and decode(); at first submit() and wait() of the runner.
  using RunStep = std::function<Status(std::span<const runtime::SequenceStep> steps,
                                       std::vector<runtime::SequenceResult>* results)>;
  void run_steps_with(RunStep run) { run_ = std::move(run); }

 private:
  struct Sequence {
    std::vector<int32_t> prompt;
    std::vector<int32_t> output;
    std::vector<int32_t> pages;
    int32_t computed = 0;
  };
  explicit BenchBatch(runtime::Runner* runner);
  Result<double> step(const std::vector<runtime::SequenceStep>& steps);
  // With steps of one token for every sequence in flight.
  runtime::SequenceStep next_step(size_t index, int32_t tokens, int32_t in_flight = 0) const;
  Status take_results(const std::vector<runtime::SequenceStep>& steps);

  runtime::Runner* runner_;
  RunStep run_;
  std::vector<Sequence> sequences_;
  std::vector<runtime::SequenceResult> results_;
  runtime::SamplingParameters sampling_;
};

}  // namespace tokenspeed::app
