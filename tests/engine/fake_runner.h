// A Runner without a model: the next token is a function of the tokens before it, kept in its "slots" and checked
// against what the engine claims, so that a wrong slot, page or context shows at once.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
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
    results_.clear();
    std::set<int32_t> slots;
    std::set<int32_t> pages;
    size_t page_count = 0;
    int64_t rows = 0;
    for (const auto& step : sequences) {
      rows += static_cast<int64_t>(step.tokens.size());
      page_count += step.pages.size();
      slots.insert(step.state_out);
      pages.insert(step.pages.begin(), step.pages.end());
      results_.push_back(run(step));
    }
    EXPECT_EQ(slots.size(), sequences.size()) << "two sequences share a slot";
    EXPECT_EQ(pages.size(), page_count) << "two sequences share a page";
    EXPECT_LE(rows, capacity_.max_step_tokens);
    EXPECT_LE(static_cast<int32_t>(sequences.size()), capacity_.max_sequences);
    greatest_batch = std::max<int>(greatest_batch, static_cast<int>(sequences.size()));
    return step_status;
  }

  Status wait(std::vector<runtime::SequenceResult>* results) override {
    *results = std::move(results_);
    return {};
  }

  std::function<void()> before_step;
  Status step_status;
  int32_t poison_token = -1;  // a sequence that holds it fails
  std::atomic<int> steps{0};
  std::atomic<int> greatest_batch{0};

 private:
  runtime::SequenceResult run(const runtime::SequenceStep& step) {
    auto& history = slots_[static_cast<size_t>(step.state_out)];
    if (step.state_in < 0) history.clear();
    EXPECT_EQ(static_cast<int32_t>(history.size()), step.context);
    history.insert(history.end(), step.tokens.begin(), step.tokens.end());
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
  std::vector<runtime::SequenceResult> results_;
};

}  // namespace tokenspeed::engine
