// Steps submitted while another runs: the same tokens and ends as without, nothing computed that is known to be too
// much, and nobody waits longer for it. FakeRunner checks slots, pages and tokens of every such step.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/fake_runner.h"

namespace tokenspeed::engine {
namespace {

constexpr int32_t kVocabulary = 300;
constexpr int32_t kPoison = kVocabulary - 1;
constexpr auto kPatience = std::chrono::seconds(30);

using Random = std::mt19937_64;
int32_t between(Random& random, int32_t low, int32_t high) {
  return std::uniform_int_distribution<int32_t>(low, high)(random);
}

struct End {
  std::vector<int32_t> tokens;
  FinishReason reason = FinishReason::kStop;
  std::string error;
  bool operator==(const End&) const = default;
};

class Client {
 public:
  EventSink sink() {
    return [this](Event&& event) {
      const std::lock_guard lock(mutex_);
      end_.tokens.insert(end_.tokens.end(), event.tokens.begin(), event.tokens.end());
      EXPECT_FALSE(finished_);
      finished_ = event.finished;
      if (finished_) {
        end_.reason = event.reason;
        end_.error = event.error.message();
      }
      changed_.notify_all();
    };
  }
  End wait() { return wait_for(SIZE_MAX); }
  // Until it has as many tokens, or has ended.
  End wait_for(size_t tokens) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kPatience, [&] { return finished_ || end_.tokens.size() >= tokens; }));
    return end_;
  }
  RequestHandle handle;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  End end_;
  bool finished_ = false;
};

struct Harness {
  explicit Harness(runtime::Capacity capacity) {
    auto owned = std::make_unique<FakeRunner>(capacity);
    runner = owned.get();
    runner->poison_token = kPoison;
    engine = std::make_unique<Engine>(std::move(owned), EngineOptions{});
  }
  void submit(Request request, Client* client) {
    auto handle = engine->submit(std::move(request), client->sink());
    ASSERT_TRUE(handle.ok()) << handle.status().message();
    client->handle = std::move(*handle);
  }
  void rest() const {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (engine->statistics().running > 0 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    EXPECT_EQ(engine->statistics().running, 0);
    EXPECT_EQ(engine->statistics().kv_cache_usage, 0);
  }
  FakeRunner* runner = nullptr;
  std::unique_ptr<Engine> engine;
};

runtime::Capacity two_in_flight() {
  return {.pages = 40,
          .page_size = 4,
          .state_slots = 4,
          .max_step_tokens = 12,
          .max_sequences = 4,
          .max_model_length = 100,
          .vocabulary_size = kVocabulary,
          .steps_in_flight = 2};
}

std::vector<int32_t> alone(std::vector<int32_t> history, int32_t count) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < count; ++i) {
    tokens.push_back(FakeRunner::next_token(history, kVocabulary));
    history.push_back(tokens.back());
  }
  return tokens;
}

// Only tokens of the same parity as the last one may follow.
class SameParity : public TokenConstraint {
 public:
  SameParity() {
    for (int32_t token = 0; token < kVocabulary; ++token) tokens_[token % 2].push_back(token);
  }
  void push(int32_t token) override { last_ = token; }
  std::span<const int32_t> allowed() override { return tokens_[last_ % 2]; }

 private:
  std::vector<int32_t> tokens_[2];
  int32_t last_ = 0;
};

// Of every kind: some end at a stop token, some at a NaN that a prompt or an answer leads to, some need the host.
Request random_request(Random& random) {
  Request request;
  for (int32_t i = between(random, 1, 30); i > 0; --i) request.prompt.push_back(between(random, 0, kVocabulary - 2));
  if (between(random, 1, 12) == 1) request.prompt.back() = kPoison;
  request.max_tokens = between(random, 1, between(random, 0, 1) == 0 ? 3 : 60);
  for (int32_t i = between(random, 0, 12); i > 0; --i) request.stop_token_ids.push_back(between(random, 0, kPoison));
  request.ignore_eos = between(random, 1, 5) == 1;
  switch (between(random, 1, 16)) {
    case 1:
      request.sampling.logprobs = 2;
      break;
    case 2:
      request.sampling.presence_penalty = 0.5f;
      break;
    case 3:
      request.sampling.prompt_logprobs = 0;
      break;
    case 4:
      request.constraint = std::make_unique<SameParity>();
      break;
    case 5:
      request.max_tokens = 0;
      request.sampling.prompt_logprobs = 1;
      break;
    default:
      break;
  }
  return request;
}

// The ends of all requests; those of requests that are cancelled are prefixes of what they would have been.
struct Played {
  std::vector<End> ends;
  std::vector<bool> cancelled;
  int ahead = 0;
};

Played play(uint64_t seed, int32_t steps_in_flight) {
  constexpr int kRequests = 60;
  Random random(seed);
  runtime::Capacity capacity = two_in_flight();
  capacity.steps_in_flight = steps_in_flight;
  capacity.state_slots = between(random, 1, 4);
  capacity.pages = between(random, 25, 60);
  capacity.max_step_tokens = between(random, 4, 20);
  Harness harness(capacity);
  Played played;
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < kRequests; ++i) {
    clients.push_back(std::make_unique<Client>());
    harness.submit(random_request(random), clients.back().get());
    const int32_t action = between(random, 1, 6);
    const auto tokens = static_cast<size_t>(between(random, 0, 5));
    if (action <= 2) clients.back()->wait_for(tokens);
    played.cancelled.push_back(action == 1);
    if (action == 1) clients.back()->handle.cancel();
  }
  for (const auto& client : clients) played.ends.push_back(client->wait());
  harness.rest();
  played.ahead = harness.runner->submitted_ahead;
  return played;
}

TEST(EngineAhead, TheSameTokensAndEndsAsWithoutIt) {
  constexpr uint64_t kSeed = 20260214;
  constexpr int kRounds = 40;
  int ahead = 0;
  for (uint64_t seed = kSeed; seed < kSeed + kRounds && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Played one = play(seed, 1);
    const Played two = play(seed, 2);
    EXPECT_EQ(one.ahead, 0);
    ahead += two.ahead;
    for (size_t i = 0; i < one.ends.size(); ++i) {
      SCOPED_TRACE("request " + std::to_string(i));
      const std::vector<int32_t>&a = one.ends[i].tokens, &b = two.ends[i].tokens;
      if (one.cancelled[i]) {
        EXPECT_TRUE(std::equal(a.begin(), a.begin() + std::min(a.size(), b.size()), b.begin()));
      } else {
        EXPECT_EQ(one.ends[i], two.ends[i]);
      }
    }
  }
  EXPECT_GT(ahead, 100 * kRounds);
}

TEST(EngineAhead, NoStepBeyondTheLengthAskedFor) {
  Harness harness(two_in_flight());
  Client client;
  harness.submit({.prompt = {1, 2, 3}, .max_tokens = 5}, &client);
  EXPECT_EQ(client.wait().tokens, alone({1, 2, 3}, 5));
  harness.rest();
  EXPECT_EQ(harness.runner->steps, 5);
  EXPECT_EQ(harness.runner->submitted_ahead, 4);
}

TEST(EngineAhead, OneStepTooManyAfterAStopAndItsResultIsDropped) {
  Harness harness(two_in_flight());
  const std::vector<int32_t> expected = alone({7}, 4);
  ASSERT_EQ(std::find(expected.begin(), expected.end(), expected[3]), expected.begin() + 3);
  Client client;
  harness.submit({.prompt = {7}, .max_tokens = 50, .stop_token_ids = {expected[3]}}, &client);
  const End end = client.wait();
  EXPECT_EQ(end.reason, FinishReason::kStop);
  EXPECT_EQ(end.tokens, expected);
  harness.rest();
  EXPECT_EQ(harness.runner->steps, 5);
  EXPECT_EQ(harness.engine->statistics().generation_tokens, 4);
}

// The only slot is needed by the step too many when the next request could be admitted.
TEST(EngineAhead, ASlotWaitsForTheStepThatWritesIt) {
  runtime::Capacity capacity = two_in_flight();
  capacity.state_slots = 1;
  Harness harness(capacity);
  const std::vector<int32_t> first = alone({7}, 4);
  Client clients[2];
  harness.submit({.prompt = {7}, .max_tokens = 50, .stop_token_ids = {first[3]}}, &clients[0]);
  harness.submit({.prompt = {9}, .max_tokens = 6}, &clients[1]);
  EXPECT_EQ(clients[0].wait().tokens, first);
  EXPECT_EQ(clients[1].wait().tokens, alone({9}, 6));
  harness.rest();
}

TEST(EngineAhead, AStepWithRowsOfTheHostIsWaitedFor) {
  Harness harness(two_in_flight());
  Client client;
  Request request{.prompt = {1, 2}, .max_tokens = 8};
  request.sampling.logprobs = 0;
  harness.submit(std::move(request), &client);
  EXPECT_EQ(client.wait().tokens, alone({1, 2}, 8));
  harness.rest();
  EXPECT_EQ(harness.runner->steps, 8);
  EXPECT_EQ(harness.runner->submitted_ahead, 0);
}

// A request that arrives while a step is being submitted is in the next one.
TEST(EngineAhead, ARequestEntersWithTheNextPlannedStep) {
  Harness harness(two_in_flight());
  Client clients[2];
  harness.runner->before_step = [&] {
    if (harness.runner->steps == 3) harness.submit({.prompt = {9}, .max_tokens = 2}, &clients[1]);
  };
  harness.submit({.prompt = {7}, .max_tokens = 9}, &clients[0]);
  EXPECT_EQ(clients[0].wait().tokens, alone({7}, 9));
  EXPECT_EQ(clients[1].wait().tokens, alone({9}, 2));
  harness.rest();
  EXPECT_EQ(harness.runner->batches, (std::vector<size_t>{1, 1, 1, 2, 2, 1, 1, 1, 1}));
}

TEST(EngineAhead, AFailedStepEndsWhatItHeldAndTheEngineGoesOn) {
  for (const bool at_submit : {true, false}) {
    Harness harness(two_in_flight());
    harness.runner->before_step = [&] {
      const Status status = harness.runner->steps == 4 ? internal_error("step fault") : Status();
      (at_submit ? harness.runner->step_status : harness.runner->wait_status) = status;
    };
    Client clients[2];
    harness.submit({.prompt = {7}, .max_tokens = 9}, &clients[0]);
    const End failed = clients[0].wait();
    EXPECT_EQ(failed.reason, FinishReason::kError);
    EXPECT_EQ(failed.error, "step fault");
    harness.submit({.prompt = {9}, .max_tokens = 6}, &clients[1]);
    EXPECT_EQ(clients[1].wait().tokens, alone({9}, 6));
    harness.rest();
  }
}

}  // namespace
}  // namespace tokenspeed::engine
