// A Runner without a model: the next token is a function of the tokens before it, kept in its "slots" and checked
// against what the engine claims, so that a wrong slot, page or context shows at once. With two steps in flight it
// checks that what the first one uses is not given to another request in the second, and that all that a step refers to
// stays as it was until the step is waited for.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <set>
#include <vector>

#include "runtime/runner.h"

namespace tokenspeed::engine {

class FakeRunner : public runtime::Runner {
 public:
  explicit FakeRunner(const runtime::Capacity& capacity)
      : capacity_(capacity), slots_(static_cast<size_t>(capacity.state_slots)) {}

  // What follows `history`: a hash of it, so that one wrong token changes all that follow.
  static int32_t next_token(const std::vector<int32_t>& history, int32_t vocabulary) {
    uint64_t hash = 1469598103934665603u;
    for (const int32_t token : history) hash = (hash ^ static_cast<uint64_t>(token)) * 1099511628211u;
    return static_cast<int32_t>((hash >> 20) % static_cast<uint64_t>(vocabulary));
  }

  const runtime::Capacity& capacity() const override { return capacity_; }

  Status submit(std::span<const runtime::SequenceStep> sequences) override {
    ++steps;
    if (before_step) before_step();
    EXPECT_LT(static_cast<int32_t>(in_flight_.size()), capacity_.steps_in_flight);
    check_sizes(sequences);
    std::vector<int32_t> sampled;
    Step step;
    for (const auto& sequence : sequences) {
      if (!in_flight_.empty()) check_follows(sequence);
      step.results.push_back(run(sequence));
      sampled.push_back(std::max(step.results.back().token, 0));
    }
    sampled_ = std::move(sampled);
    submitted_ahead += in_flight_.empty() ? 0 : 1;
    batches.push_back(sequences.size());
    if (!step_status.ok()) return step_status;
    step.sequences = sequences;
    step.checksum = checksum(sequences);
    in_flight_.push_back(std::move(step));
    return {};
  }

  Status wait(std::vector<runtime::SequenceResult>* results) override {
    Step step = std::move(in_flight_.front());
    in_flight_.pop_front();
    EXPECT_EQ(checksum(step.sequences), step.checksum) << "what the step refers to has changed";
    *results = std::move(step.results);
    return wait_status;
  }

  std::function<void()> before_step;
  Status step_status;         // of submit()
  Status wait_status;         // of wait()
  int32_t poison_token = -1;  // a sequence that holds it fails
  std::atomic<int> steps{0};
  std::atomic<int> submitted_ahead{0};  // steps, while another was in flight
  std::atomic<int> greatest_batch{0};
  std::vector<size_t> batches;  // sequences of each step; to be read when the engine rests

 private:
  struct Step {
    std::span<const runtime::SequenceStep> sequences;
    uint64_t checksum = 0;
    std::vector<runtime::SequenceResult> results;
  };

  static uint64_t checksum(std::span<const runtime::SequenceStep> sequences) {
    uint64_t sum = 0;
    const auto add = [&sum](auto number) { sum = sum * 1099511628211u + static_cast<uint64_t>(number); };
    for (const runtime::SequenceStep& step : sequences) {
      for (const auto& numbers : {step.tokens, step.pages, step.prompt, step.output, step.allowed_tokens}) {
        for (const int32_t number : numbers) add(number);
      }
      add(step.context);
      add(step.sampling->seed);
    }
    return sum;
  }

  void check_sizes(std::span<const runtime::SequenceStep> sequences) {
    std::set<int32_t> slots;
    std::set<int32_t> pages;
    size_t page_count = 0;
    int64_t rows = 0;
    for (const auto& step : sequences) {
      rows += static_cast<int64_t>(step.tokens.size());
      page_count += step.pages.size();
      slots.insert(step.state_out);
      pages.insert(step.pages.begin(), step.pages.end());
    }
    EXPECT_EQ(slots.size(), sequences.size()) << "two sequences share a slot";
    EXPECT_EQ(pages.size(), page_count) << "two sequences share a page";
    EXPECT_LE(rows, capacity_.max_step_tokens);
    EXPECT_LE(static_cast<int32_t>(sequences.size()), capacity_.max_sequences);
    greatest_batch = std::max<int>(greatest_batch, static_cast<int>(sequences.size()));
  }

  // Behind the step in flight.
  void check_follows(const runtime::SequenceStep& step) const {
    for (size_t i = 0; i < in_flight_.back().sequences.size(); ++i) {
      const runtime::SequenceStep& before = in_flight_.back().sequences[i];
      EXPECT_TRUE(runtime::finishes_on_device(before)) << "the host's part of the step in flight is not done";
      if (before.state_out == step.state_out && step.state_in >= 0) {
        EXPECT_EQ(step.token_from, before.sample ? static_cast<int>(i) : -1);
        EXPECT_EQ(step.context, before.context + static_cast<int32_t>(before.tokens.size()));
        continue;
      }
      EXPECT_NE(before.state_out, step.state_out) << "the slot is another request's in the step in flight";
      const auto shared =
          std::find_first_of(step.pages.begin(), step.pages.end(), before.pages.begin(), before.pages.end());
      EXPECT_EQ(shared, step.pages.end()) << "a page is another request's in the step in flight";
    }
  }

  runtime::SequenceResult run(const runtime::SequenceStep& step) {
    auto& history = slots_[static_cast<size_t>(step.state_out)];
    if (step.state_in < 0) history.clear();
    EXPECT_EQ(static_cast<int32_t>(history.size()), step.context);
    if (step.token_from >= 0) {
      EXPECT_EQ(step.tokens.size(), 1u);
      history.push_back(sampled_.at(static_cast<size_t>(step.token_from)));
    } else {
      history.insert(history.end(), step.tokens.begin(), step.tokens.end());
    }
    EXPECT_GE(static_cast<int64_t>(step.pages.size()) * capacity_.page_size, static_cast<int64_t>(history.size()));
    runtime::SequenceResult result;
    for (size_t i = 0; i < step.next_tokens.size(); ++i) {
      result.prompt_logprobs.push_back({.token = step.next_tokens[i], .logprob = -1});
    }
    if (std::find(history.begin(), history.end(), poison_token) != history.end()) {
      result.status = internal_error("NaN");
    } else if (step.sample) {
      result.token = next_token(history, capacity_.vocabulary_size);
      const auto allowed = step.allowed_tokens;
      if (!allowed.empty()) result.token = allowed[static_cast<size_t>(result.token) % allowed.size()];
    }
    return result;
  }

  const runtime::Capacity capacity_;
  std::vector<std::vector<int32_t>> slots_;
  std::vector<int32_t> sampled_;  // by the last step
  std::deque<Step> in_flight_;
};

}  // namespace tokenspeed::engine
