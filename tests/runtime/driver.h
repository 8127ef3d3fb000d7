// Plays the engine's part towards one Runner for a few sequences: gives them pages and state slots, runs whatever mix
// of chunks a test asks for, one step after the other or with a second one submitted ahead, and keeps every row's
// logits and the tokens.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "runtime/runner.h"

namespace tokenspeed::runtime {

struct Case {
  std::vector<int32_t> prompt;
  int32_t new_tokens = 0;
  SamplingParameters sampling = {.temperature = 0};
};

struct Output {
  std::vector<int32_t> tokens;
  std::vector<float> logits;  // [prompt + tokens - 1 (or the prompt alone), vocabulary]
  Status status;
  bool operator==(const Output& other) const { return tokens == other.tokens && logits == other.logits; }
};

// Rows of one sequence in a step.
struct Share {
  size_t sequence = 0;
  int32_t tokens = 1;
};

class Driver {
 public:
  // first_page and first_slot let several drivers share a Runner. Pages are dealt round robin, so that no sequence's
  // lie side by side.
  Driver(Runner* runner, std::vector<Case> cases, int32_t first_page = 0, int32_t first_slot = 0)
      : runner_(runner), cases_(std::move(cases)), outputs_(cases_.size()) {
    const Capacity& capacity = runner_->capacity();
    int32_t page = first_page;
    sequences_.resize(cases_.size());
    for (size_t s = 0; s < cases_.size(); ++s) {
      sequences_[s].ids = cases_[s].prompt;
      sequences_[s].slot = first_slot + static_cast<int32_t>(s);
      // Steps in flight write to it and refer to it.
      const size_t length = cases_[s].prompt.size() + static_cast<size_t>(cases_[s].new_tokens);
      outputs_[s].logits.reserve(length * static_cast<size_t>(capacity.vocabulary_size));
      outputs_[s].tokens.reserve(length);
      sequences_[s].ids.reserve(length);
    }
    for (bool dealt = true; dealt;) {
      dealt = false;
      for (size_t s = 0; s < cases_.size(); ++s) {
        const int64_t length = static_cast<int64_t>(cases_[s].prompt.size()) + cases_[s].new_tokens;
        if (static_cast<int64_t>(sequences_[s].pages.size()) * capacity.page_size >= length) continue;
        sequences_[s].pages.push_back(page++);
        dealt = true;
      }
    }
    EXPECT_LE(page, capacity.pages) << "the test needs more KV pages";
  }

  // Rows the sequence can still be given at once: the rest of its prompt, or one token; 0 when it is done.
  int32_t remaining(size_t s) const {
    const Sequence& sequence = sequences_[s];
    if (!outputs_[s].status.ok()) return 0;
    if (static_cast<size_t>(sequence.computed) < cases_[s].prompt.size()) {
      return static_cast<int32_t>(cases_[s].prompt.size()) - sequence.computed;
    }
    return static_cast<int32_t>(outputs_[s].tokens.size()) + sequence.expected < cases_[s].new_tokens ? 1 : 0;
  }
  bool done() const {
    for (size_t s = 0; s < cases_.size(); ++s) {
      if (remaining(s) > 0) return false;
    }
    return true;
  }

  // From now on no row's logits are asked for, so that a device can finish every row by itself.
  void keep_tokens_only() { keeps_logits_ = false; }

  void step(std::span<const Share> shares) {
    submit(shares);
    finish();
  }
  // Submits the step, which runs while the one before it is waited for.
  void step_ahead(std::span<const Share> shares) {
    submit(shares);
    if (in_flight_.size() > 1) finish();
  }
  // Waits for the oldest step in flight, if there is one.
  void finish() {
    if (in_flight_.empty()) return;
    const Status status = runner_->wait(&results_);
    ASSERT_TRUE(status.ok()) << status.message();
    const Submitted step = std::move(in_flight_.front());
    in_flight_.pop_front();
    for (size_t i = 0; i < step.shares.size(); ++i) take(step.shares[i], step.steps[i].sample, results_[i]);
  }

  // Every sequence in every step, prompts in chunks.
  void run_together(int32_t chunk) {
    while (!done() && !testing::Test::HasFatalFailure()) step(shares_of_all(chunk));
  }
  void run_together_ahead(int32_t chunk) {
    while (!done() && !testing::Test::HasFatalFailure()) step_ahead(shares_of_all(chunk));
    finish();
  }
  // One sequence after the other.
  void run_alone(int32_t chunk) {
    for (size_t s = 0; s < cases_.size(); ++s) {
      while (remaining(s) > 0 && !testing::Test::HasFatalFailure()) {
        const Share share{s, std::min({remaining(s), chunk, runner_->capacity().max_step_tokens})};
        step({&share, 1});
      }
    }
  }

  const std::vector<Output>& outputs() const { return outputs_; }
  std::span<const int32_t> pages(size_t s) const { return sequences_[s].pages; }
  int32_t slot(size_t s) const { return sequences_[s].slot; }

 private:
  struct Sequence {
    std::vector<int32_t> ids;  // prompt and output
    std::vector<int32_t> pages;
    int32_t slot = 0;
    int32_t computed = 0;
    int32_t expected = 0;     // tokens that steps in flight sample
    int32_t last_index = -1;  // in the last step submitted
  };
  struct Submitted {
    std::vector<Share> shares;
    std::vector<SequenceStep> steps;
  };

  std::vector<Share> shares_of_all(int32_t chunk) const {
    std::vector<Share> shares;
    int32_t room = runner_->capacity().max_step_tokens;
    for (size_t s = 0; s < cases_.size() && room > 0; ++s) {
      const int32_t tokens = std::min({remaining(s), chunk, room});
      if (tokens > 0) shares.push_back({s, tokens});
      room -= tokens;
    }
    return shares;
  }

  void submit(std::span<const Share> shares) {
    Submitted& submitted = in_flight_.emplace_back();
    submitted.shares.assign(shares.begin(), shares.end());
    for (const Share& share : shares) submitted.steps.push_back(next_step(share));
    for (Sequence& sequence : sequences_) sequence.last_index = -1;
    for (size_t i = 0; i < shares.size(); ++i) {
      Sequence& sequence = sequences_[shares[i].sequence];
      sequence.computed += shares[i].tokens;
      sequence.expected += submitted.steps[i].sample ? 1 : 0;
      sequence.last_index = static_cast<int32_t>(i);
    }
    const Status status = runner_->submit(submitted.steps);
    ASSERT_TRUE(status.ok()) << status.message();
  }

  SequenceStep next_step(const Share& share) {
    static constexpr int32_t kUnknown = 0;
    const int64_t vocabulary = runner_->capacity().vocabulary_size;
    const Sequence& sequence = sequences_[share.sequence];
    Output& output = outputs_[share.sequence];
    const Case& given = cases_[share.sequence];
    const size_t end = static_cast<size_t>(sequence.computed + share.tokens);
    if (keeps_logits_) output.logits.resize(end * static_cast<size_t>(vocabulary));
    SequenceStep step;
    if (sequence.expected > 0) {
      step.token_from = sequence.last_index;
      step.tokens = {&kUnknown, 1};
    } else {
      step.tokens = std::span<const int32_t>(sequence.ids).subspan(sequence.computed, share.tokens);
    }
    step.context = sequence.computed;
    step.pages = sequence.pages;
    step.state_in = sequence.computed == 0 ? -1 : sequence.slot;
    step.state_out = sequence.slot;
    step.sample = end >= given.prompt.size() && given.new_tokens > 0;
    step.sampling = &given.sampling;
    step.prompt = given.prompt;
    step.output = output.tokens;
    if (keeps_logits_) step.logits_out = output.logits.data() + sequence.computed * vocabulary;
    return step;
  }

  void take(const Share& share, bool sampled, const SequenceResult& result) {
    Sequence& sequence = sequences_[share.sequence];
    Output& output = outputs_[share.sequence];
    sequence.expected -= sampled ? 1 : 0;
    if (output.status.ok()) output.status = result.status;
    if (!sampled || !output.status.ok()) return;
    EXPECT_GE(result.token, 0);
    output.tokens.push_back(result.token);
    sequence.ids.push_back(result.token);
  }

  Runner* runner_;
  bool keeps_logits_ = true;
  std::vector<Case> cases_;
  std::vector<Sequence> sequences_;
  std::vector<Output> outputs_;
  std::deque<Submitted> in_flight_;
  std::vector<SequenceResult> results_;
};

// The logits after one token of the sequence.
inline std::span<const float> row_of(const Output& output, int64_t row, int64_t vocabulary) {
  return std::span<const float>(output.logits).subspan(row * vocabulary, vocabulary);
}

// One sequence alone, its prompt in chunks.
inline Output run_one(Runner* runner, const Case& given, int32_t chunk = 256) {
  Driver driver(runner, {given});
  driver.run_alone(chunk);
  return driver.outputs()[0];
}

}  // namespace tokenspeed::runtime
