#include "engine/engine.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "base/random.h"
#include "engine/fake_runner.h"

namespace tokenspeed::engine {
namespace {

constexpr runtime::Capacity kCapacity = {.pages = 16,
                                         .page_size = 8,
                                         .state_slots = 4,
                                         .max_step_tokens = 12,
                                         .max_sequences = 4,
                                         .max_model_length = 100,
                                         .vocabulary_size = 1000};

// Collects the events of one request.
class Collector {
 public:
  EventSink sink() {
    return [this](Event&& event) {
      std::lock_guard lock(mutex_);
      EXPECT_FALSE(finished_) << "an event after the last";
      EXPECT_EQ(event.first, !event.tokens.empty() && tokens_.empty());
      tokens_.insert(tokens_.end(), event.tokens.begin(), event.tokens.end());
      prompt_logprobs_ += event.prompt_logprobs.size();
      if (event.finished) {
        finished_ = true;
        reason_ = event.reason;
        error_ = event.error;
      }
      changed_.notify_all();
    };
  }
  FinishReason wait() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(30), [this] { return finished_; })) << "never finished";
    return reason_;
  }
  void wait_for_tokens(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(30), [&] { return tokens_.size() >= count || finished_; });
  }
  std::vector<int32_t> tokens() {
    std::lock_guard lock(mutex_);
    return tokens_;
  }
  Status error() {
    std::lock_guard lock(mutex_);
    return error_;
  }
  size_t prompt_logprobs() {
    std::lock_guard lock(mutex_);
    return prompt_logprobs_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int32_t> tokens_;
  size_t prompt_logprobs_ = 0;
  bool finished_ = false;
  FinishReason reason_ = FinishReason::kError;
  Status error_;
};

std::vector<int32_t> alone(std::vector<int32_t> history, int64_t count) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    tokens.push_back(FakeRunner::next_token(history, kCapacity.vocabulary_size));
    history.push_back(tokens.back());
  }
  return tokens;
}

struct Fixture {
  explicit Fixture(int32_t steps_in_flight, EngineOptions options = {}) {
    runtime::Capacity capacity = kCapacity;
    capacity.steps_in_flight = steps_in_flight;
    auto owned = std::make_unique<FakeRunner>(capacity);
    runner = owned.get();
    engine = std::make_unique<Engine>(std::move(owned), options);
  }
  // A client may hear of its end before the step that brought it is counted.
  Statistics statistics_at_rest() const {
    for (int i = 0; i < 1000 && engine->statistics().running > 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return engine->statistics();
  }
  // Blocks the step thread inside its next step until release() or the end.
  void hold_steps() {
    runner->before_step = [this] {
      std::unique_lock lock(mutex);
      released.wait(lock, [this] { return open; });
    };
  }
  void release() {
    std::lock_guard lock(mutex);
    open = true;
    released.notify_all();
  }
  std::mutex mutex;
  std::condition_variable released;
  bool open = false;
  FakeRunner* runner = nullptr;
  std::unique_ptr<Engine> engine;
};

// The parameter: steps in flight.
class EngineTest : public testing::TestWithParam<int32_t> {};
INSTANTIATE_TEST_SUITE_P(StepsInFlight, EngineTest, testing::Values(1, 2), testing::PrintToStringParamName());

TEST_P(EngineTest, GeneratesUpToMaxTokens) {
  Fixture fixture(GetParam());
  Collector collector;
  const auto handle = fixture.engine->submit({.prompt = {1, 2, 3}, .max_tokens = 5}, collector.sink());
  ASSERT_TRUE(handle.ok());
  EXPECT_EQ(collector.wait(), FinishReason::kLength);
  EXPECT_EQ(collector.tokens(), alone({1, 2, 3}, 5));
}

TEST_P(EngineTest, StopTokenEndsAndIsReported) {
  Fixture fixture(GetParam());
  const auto expected = alone({7}, 4);
  Collector stopped;
  Collector ignoring;
  const auto first =
      fixture.engine->submit({.prompt = {7}, .max_tokens = 20, .stop_token_ids = {expected[3]}}, stopped.sink());
  const auto second = fixture.engine->submit(
      {.prompt = {7}, .max_tokens = 9, .stop_token_ids = {expected[3]}, .ignore_eos = true}, ignoring.sink());
  EXPECT_EQ(stopped.wait(), FinishReason::kStop);
  EXPECT_EQ(stopped.tokens(), expected);
  EXPECT_EQ(ignoring.wait(), FinishReason::kLength);
  EXPECT_EQ(ignoring.tokens().size(), 9u);
}

TEST_P(EngineTest, PromptLogprobsOfEveryTokenButTheFirst) {
  Fixture fixture(GetParam());
  Collector collector;
  Request request{.prompt = std::vector<int32_t>(30, 4), .max_tokens = 0};
  request.sampling.prompt_logprobs = 0;
  const auto handle = fixture.engine->submit(std::move(request), collector.sink());
  EXPECT_EQ(collector.wait(), FinishReason::kLength);
  EXPECT_EQ(collector.prompt_logprobs(), 29u);
  EXPECT_TRUE(collector.tokens().empty());
}

TEST_P(EngineTest, RefusesWhatCannotRun) {
  Fixture fixture(GetParam());
  Collector collector;
  const auto refuse = [&](Request request) {
    return fixture.engine->submit(std::move(request), collector.sink()).status();
  };
  EXPECT_EQ(refuse({.prompt = {}, .max_tokens = 1}).param(), "prompt");
  EXPECT_EQ(refuse({.prompt = {1, 1000}, .max_tokens = 1}).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(refuse({.prompt = {-1}, .max_tokens = 1}).code(), StatusCode::kInvalidArgument);
  const Status too_long = refuse({.prompt = {1}, .max_tokens = 100});
  EXPECT_EQ(too_long.param(), "max_tokens");
  EXPECT_NE(too_long.message().find("100 tokens"), std::string::npos) << too_long.message();
}

TEST_P(EngineTest, FullQueueAnswersResourceExhausted) {
  Fixture fixture(GetParam(), {.max_waiting = 2});
  fixture.hold_steps();
  std::vector<std::unique_ptr<Collector>> collectors;
  std::vector<RequestHandle> handles;
  Status refused;
  for (int i = 0; i < 16 && refused.ok(); ++i) {
    collectors.push_back(std::make_unique<Collector>());
    auto handle = fixture.engine->submit({.prompt = {i + 1}, .max_tokens = 2}, collectors.back()->sink());
    if (handle.ok()) {
      handles.push_back(std::move(*handle));
    } else {
      refused = handle.status();
      collectors.pop_back();
    }
  }
  EXPECT_EQ(refused.code(), StatusCode::kResourceExhausted);
  fixture.release();
  for (auto& collector : collectors) EXPECT_EQ(collector->wait(), FinishReason::kLength);
}

TEST_P(EngineTest, CancelEndsWithinAStepAndReturnsLeases) {
  Fixture fixture(GetParam());
  Collector collector;
  auto handle = fixture.engine->submit({.prompt = {5}, .max_tokens = 90}, collector.sink());
  collector.wait_for_tokens(1);
  handle->cancel();
  const auto reason = collector.wait();
  EXPECT_TRUE(reason == FinishReason::kCancelled || collector.tokens().size() == 90);
  Collector next;
  const auto large = fixture.engine->submit({.prompt = {6}, .max_tokens = 99}, next.sink());
  EXPECT_EQ(next.wait(), FinishReason::kLength);
  EXPECT_EQ(fixture.statistics_at_rest().kv_cache_usage, 0);
}

// Lets only 3 follow an odd token, and anything an even one.
class ThreeAfterOdd : public TokenConstraint {
 public:
  void push(int32_t token) override { last_ = token; }
  std::span<const int32_t> allowed() override { return std::span(&kThree, last_ % 2 == 0 ? size_t{0} : size_t{1}); }

 private:
  static constexpr int32_t kThree = 3;
  int32_t last_ = 0;
};

TEST_P(EngineTest, AConstraintSeesEveryTokenAndBindsItsRequestOnly) {
  Fixture fixture(GetParam());
  Collector bound;
  Collector unbound;
  Request request{.prompt = {8}, .max_tokens = 20};
  request.constraint = std::make_unique<ThreeAfterOdd>();
  const auto first = fixture.engine->submit(std::move(request), bound.sink());
  const auto second = fixture.engine->submit({.prompt = {8}, .max_tokens = 20}, unbound.sink());
  EXPECT_EQ(bound.wait(), FinishReason::kLength);
  std::vector<int32_t> expected = {8};
  while (expected.size() < 21) {
    expected.push_back(expected.back() % 2 == 0 ? alone(expected, 1)[0] : 3);
  }
  expected.erase(expected.begin());
  EXPECT_EQ(bound.tokens(), expected);
  EXPECT_EQ(unbound.wait(), FinishReason::kLength);
  EXPECT_EQ(unbound.tokens(), alone({8}, 20));
}

TEST_P(EngineTest, OneBadSequenceEndsAlone) {
  Fixture fixture(GetParam());
  fixture.runner->poison_token = 13;
  Collector bad;
  Collector good;
  const auto first = fixture.engine->submit({.prompt = {12, 13}, .max_tokens = 5}, bad.sink());
  const auto second = fixture.engine->submit({.prompt = {1, 2}, .max_tokens = 5}, good.sink());
  EXPECT_EQ(bad.wait(), FinishReason::kError);
  EXPECT_EQ(bad.error().message(), "NaN");
  EXPECT_EQ(good.wait(), FinishReason::kLength);
  EXPECT_EQ(good.tokens(), alone({1, 2}, 5));
}

TEST_P(EngineTest, AFailedStepFailsItsRequestsAndTheEngineGoesOn) {
  Fixture fixture(GetParam());
  fixture.runner->step_status = internal_error("device fault in layers.0.mixer");
  Collector failed;
  const auto first = fixture.engine->submit({.prompt = {1}, .max_tokens = 5}, failed.sink());
  EXPECT_EQ(failed.wait(), FinishReason::kError);
  EXPECT_EQ(failed.error().message(), "device fault in layers.0.mixer");
  EXPECT_EQ(fixture.statistics_at_rest().kv_cache_usage, 0);
}

TEST_P(EngineTest, DestructionCancelsWhatRuns) {
  Collector collector;
  RequestHandle handle;
  {
    Fixture fixture(GetParam());
    fixture.runner->before_step = [] { std::this_thread::sleep_for(std::chrono::milliseconds(1)); };
    handle = std::move(*fixture.engine->submit({.prompt = {5}, .max_tokens = 99}, collector.sink()));
  }
  EXPECT_EQ(collector.wait(), FinishReason::kCancelled);
  handle.cancel();  // the engine is gone; nothing to do
}

// Random requests, arrivals and cancels: every request that is left to finish gets the tokens it would get alone, and
// at the end every lease is back.
TEST_P(EngineTest, RandomLoadKeepsEveryRequestsTokens) {
  constexpr uint64_t kSeed = 7;
  constexpr uint64_t kRequests = 400;
  SCOPED_TRACE(kSeed);
  Fixture fixture(GetParam());
  struct Case {
    Request request;
    Collector collector;
    RequestHandle handle;
    bool cancelled = false;
  };
  std::vector<std::unique_ptr<Case>> cases;
  for (uint64_t i = 0; i < kRequests; ++i) {
    const auto random = philox(kSeed, 1, i);
    auto one = std::make_unique<Case>();
    for (uint32_t t = 0; t < 1 + random[0] % 40; ++t)
      one->request.prompt.push_back(static_cast<int32_t>((random[1] + t) % 1000));
    one->request.max_tokens = 1 + random[2] % 40;
    one->handle = std::move(*fixture.engine->submit(
        {.prompt = one->request.prompt, .max_tokens = one->request.max_tokens}, one->collector.sink()));
    if (random[3] % 5 == 0) {
      one->collector.wait_for_tokens(random[3] % 7);
      one->handle.cancel();
      one->cancelled = true;
    }
    cases.push_back(std::move(one));
  }
  for (auto& one : cases) {
    const FinishReason reason = one->collector.wait();
    const auto expected = alone(one->request.prompt, one->request.max_tokens);
    auto tokens = one->collector.tokens();
    if (one->cancelled && reason == FinishReason::kCancelled) {
      ASSERT_TRUE(std::equal(tokens.begin(), tokens.end(), expected.begin()));
    } else {
      ASSERT_EQ(reason, FinishReason::kLength);
      ASSERT_EQ(tokens, expected);
    }
  }
  EXPECT_GT(fixture.runner->greatest_batch, 1);
  const Statistics statistics = fixture.statistics_at_rest();
  EXPECT_EQ(statistics.kv_cache_usage, 0);
  EXPECT_EQ(statistics.waiting, 0);
}

}  // namespace
}  // namespace tokenspeed::engine
