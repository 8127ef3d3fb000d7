// A million random events against engines with small random pools: arrivals of every length, cancels, dropped handles,
// requests that cannot run, sequences and steps that fail. Whatever happens around it, a request gets the tokens it
// would get alone and exactly one end, and at the end of a round every page and slot is back. Pools are so small that
// one lost lease per thousand events would stop a round.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <random>
#include <thread>

#include "base/log.h"
#include "engine/engine.h"
#include "engine/fake_runner.h"

namespace tokenspeed::engine {
namespace {

constexpr uint64_t kSeed = 20261125;
constexpr int kRounds = 40;
constexpr int kThreads = 2;
constexpr int kEventsPerThread = 12'500;  // 40 * 2 * 12,500 = a million
constexpr int32_t kVocabulary = 500;
constexpr int32_t kPoison = kVocabulary - 1;
constexpr uint32_t kStepsPerFault = 2000;
constexpr auto kPatience = std::chrono::seconds(60);

using Random = std::mt19937_64;
int32_t between(Random& random, int32_t low, int32_t high) {
  return std::uniform_int_distribution<int32_t>(low, high)(random);
}
bool one_in(Random& random, int32_t n) { return between(random, 1, n) == 1; }

std::atomic<int64_t> cut_short{0};  // requests cancelled between their first and their last token

// What a request must see, checked event by event on the step thread.
class Expectation {
 public:
  Expectation(Random& random, const runtime::Capacity& capacity) {
    const int32_t longest = std::min(capacity.max_model_length, capacity.pages * capacity.page_size);
    const int32_t prompt = between(random, 1, longest - 1);
    for (int32_t i = 0; i < prompt; ++i) history_.push_back(between(random, 0, kVocabulary - 2));
    if (one_in(random, 50)) history_[static_cast<size_t>(between(random, 0, prompt - 1))] = kPoison;
    max_tokens_ = between(random, 1, longest - prompt);
    if (one_in(random, 3)) max_tokens_ = std::min(max_tokens_, 3);
    for (int32_t i = between(random, 0, 30); i > 0; --i) stops_.push_back(between(random, 0, kVocabulary - 1));
    ignore_eos_ = one_in(random, 4);
  }

  Request request() const {
    return {.prompt = history_, .max_tokens = max_tokens_, .stop_token_ids = stops_, .ignore_eos = ignore_eos_};
  }
  void cancelling() { cancelled_ = true; }
  bool finished() const { return finished_; }
  bool has_tokens(int32_t count) const { return count_ >= count; }

  void take(const Event& event) {
    EXPECT_FALSE(finished_) << "an event after the last";
    EXPECT_EQ(event.first, !event.tokens.empty() && count_ == 0);
    for (const int32_t token : event.tokens) {
      EXPECT_FALSE(stopped_) << "a token after a stop token";
      EXPECT_EQ(token, FakeRunner::next_token(history_, kVocabulary)) << "not the token it would get alone";
      history_.push_back(token);
      ++count_;
      stopped_ = !ignore_eos_ && std::find(stops_.begin(), stops_.end(), token) != stops_.end();
    }
    if (event.finished) check_end(event);
  }

 private:
  void check_end(const Event& event) {
    switch (event.reason) {
      case FinishReason::kStop:
        EXPECT_TRUE(stopped_);
        break;
      case FinishReason::kLength:
        EXPECT_EQ(count_, max_tokens_);
        EXPECT_FALSE(stopped_);
        break;
      case FinishReason::kCancelled:
        EXPECT_TRUE(cancelled_) << "nobody cancelled it";
        cut_short += count_ > 0 ? 1 : 0;
        break;
      case FinishReason::kError:
        if (event.error.message() != "step fault") {
          EXPECT_EQ(event.error.message(), "NaN");
          EXPECT_NE(std::find(history_.begin(), history_.end(), kPoison), history_.end())
              << "the failure was another's";
        }
        break;
    }
    finished_ = true;
  }

  std::vector<int32_t> history_;
  int32_t max_tokens_ = 0;
  std::vector<int32_t> stops_;
  bool ignore_eos_ = false;
  bool stopped_ = false;
  std::atomic<int32_t> count_ = 0;
  std::atomic<bool> cancelled_ = false;
  std::atomic<bool> finished_ = false;
};

struct Client {
  std::shared_ptr<Expectation> expected;
  RequestHandle handle;
};

runtime::Capacity random_capacity(Random& random) {
  runtime::Capacity capacity;
  capacity.pages = between(random, 2, 40);
  capacity.page_size = between(random, 1, 16);
  capacity.state_slots = between(random, 1, 8);
  capacity.max_sequences = between(random, 1, 8);
  capacity.max_step_tokens = capacity.max_sequences + between(random, 0, 12);
  capacity.max_model_length = between(random, 2, 120);
  capacity.vocabulary_size = kVocabulary;
  capacity.steps_in_flight = between(random, 1, 2);
  return capacity;
}

class Round {
 public:
  explicit Round(uint64_t seed) : seed_(seed) {
    Random random(seed);
    capacity_ = random_capacity(random);
    auto runner = std::make_unique<FakeRunner>(capacity_);
    runner->poison_token = kPoison;
    runner->before_step = [runner = runner.get(), faults = Random(seed + 1)]() mutable {
      runner->step_status = faults() % kStepsPerFault == 0 ? internal_error("step fault") : Status();
      runner->wait_status = faults() % kStepsPerFault == 0 ? internal_error("step fault") : Status();
      std::this_thread::yield();  // so that clients can act between steps however few CPUs there are
    };
    engine_ = std::make_unique<Engine>(std::move(runner), EngineOptions{.max_waiting = between(random, 1, 64)});
  }

  void play() {
    std::vector<std::thread> threads;
    for (uint64_t i = 0; i < kThreads; ++i) threads.emplace_back([this, i] { drive(Random(seed_ * kThreads + i)); });
    for (std::thread& thread : threads) thread.join();
    const auto end = std::chrono::steady_clock::now() + kPatience;
    Statistics statistics = engine_->statistics();
    while (statistics.running + statistics.waiting > 0 && std::chrono::steady_clock::now() < end) {
      std::this_thread::yield();
      statistics = engine_->statistics();
    }
    EXPECT_EQ(statistics.running + statistics.waiting, 0);
    EXPECT_EQ(statistics.kv_cache_usage, 0);
  }
  int64_t submitted() const { return submitted_; }
  int64_t refused() const { return refused_; }

 private:
  void drive(Random random) {
    std::deque<Client> clients;
    const int32_t crowd = between(random, 1, 40);
    for (int i = 0; i < kEventsPerThread && !testing::Test::HasFailure(); ++i) {
      switch (between(random, 0, 9)) {
        default:
          if (static_cast<int32_t>(clients.size()) < crowd) {
            arrive(random, &clients);
            break;
          }
          [[fallthrough]];
        case 0:
          leave(random, &clients);
          break;
        case 1:
          ask_the_impossible(random);
          break;
      }
    }
    while (!clients.empty()) {
      if (one_in(random, 2)) wait_for(*clients.front().expected);
      drop(&clients, 0);
    }
  }

  void arrive(Random& random, std::deque<Client>* clients) {
    Client client{std::make_shared<Expectation>(random, capacity_), {}};
    auto handle = engine_->submit(client.expected->request(),
                                  [expected = client.expected](Event&& event) { expected->take(event); });
    if (!handle.ok()) {
      EXPECT_EQ(handle.status().code(), StatusCode::kResourceExhausted) << handle.status().message();
      ++refused_;
      std::this_thread::yield();
      return;
    }
    ++submitted_;
    client.handle = std::move(*handle);
    clients->push_back(std::move(client));
  }

  // One client waits for its end, or for some tokens and then cancels or drops its handle.
  void leave(Random& random, std::deque<Client>* clients) {
    if (clients->empty()) return;
    const auto last = static_cast<int32_t>(clients->size()) - 1;
    const auto index = static_cast<size_t>(one_in(random, 2) ? last : between(random, 0, last));
    Client& client = (*clients)[index];
    if (one_in(random, 2)) {
      wait_for(*client.expected);
    } else {
      wait_for(*client.expected, between(random, 0, 10));
      client.expected->cancelling();
      client.handle.cancel();
      if (one_in(random, 2)) return;  // and stays to see what comes
    }
    drop(clients, index);
  }

  void drop(std::deque<Client>* clients, size_t index) {
    (*clients)[index].expected->cancelling();
    const std::shared_ptr<Expectation> expected = (*clients)[index].expected;
    clients->erase(clients->begin() + static_cast<ptrdiff_t>(index));
    if (clients->empty()) wait_for(*expected);
  }

  void ask_the_impossible(Random& random) {
    Request request{.prompt = {1}, .max_tokens = capacity_.max_model_length};
    if (one_in(random, 2)) request = {.prompt = {kVocabulary}, .max_tokens = 1};
    const auto refused = engine_->submit(std::move(request), [](Event&&) { ADD_FAILURE() << "a refused request ran"; });
    EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  }

  // Until its end, or until it has `tokens`.
  static void wait_for(const Expectation& expected, int32_t tokens = INT32_MAX) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    const auto reached = [&] { return expected.finished() || expected.has_tokens(tokens); };
    while (!reached() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    EXPECT_TRUE(reached()) << "never finished";
  }

  const uint64_t seed_;
  runtime::Capacity capacity_;
  std::unique_ptr<Engine> engine_;
  std::atomic<int64_t> submitted_ = 0;
  std::atomic<int64_t> refused_ = 0;
};

TEST(EngineSoak, AMillionRandomEvents) {
  spdlog::set_level(spdlog::level::off);  // every failed step is an error line
  int64_t submitted = 0;
  int64_t refused = 0;
  for (uint64_t i = 0; i < kRounds && !HasFailure(); ++i) {
    SCOPED_TRACE("seed " + std::to_string(kSeed + i));
    Round round(kSeed + i);
    round.play();
    submitted += round.submitted();
    refused += round.refused();
  }
  EXPECT_GT(submitted, kRounds * 1000) << "the pools were busy";
  EXPECT_GT(refused, 0) << "queues were full at times";
  EXPECT_GT(cut_short, kRounds * 100) << "cancels came in time";
  RecordProperty("submitted", std::to_string(submitted));
  RecordProperty("refused", std::to_string(refused));
  RecordProperty("cut_short", std::to_string(cut_short));
}

}  // namespace
}  // namespace tokenspeed::engine
