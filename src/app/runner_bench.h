// Timed runs of a Runner without engine or server: what `bench decode` and `bench prefill` measure.
#pragma once

#include <cstdint>
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

  // Seconds from the first prompt token to the first sampled token of every sequence, in chunks of the greatest step.
  Result<double> prefill();
  // Seconds of one step that gives every sequence its next token.
  Result<double> decode();
  void restart();  // forget the tokens; the next call is prefill()

 private:
  struct Sequence {
    std::vector<int32_t> prompt;
    std::vector<int32_t> output;
    std::vector<int32_t> pages;
    int32_t computed = 0;
  };
  explicit BenchBatch(runtime::Runner* runner) : runner_(runner) {}
  Result<double> step(const std::vector<runtime::SequenceStep>& steps);
  runtime::SequenceStep next_step(size_t index, int32_t tokens) const;

  runtime::Runner* runner_;
  std::vector<Sequence> sequences_;
  std::vector<runtime::SequenceResult> results_;
  runtime::SamplingParameters greedy_;
};

}  // namespace tokenspeed::app
