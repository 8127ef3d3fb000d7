// The engine's shared core: the queue between callers and the step thread, and the step thread itself.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "engine/engine.h"
#include "engine/scheduler.h"

namespace tokenspeed::engine {

class Engine::Impl {
 public:
  Impl(std::unique_ptr<runtime::Runner> runner, EngineOptions options);

  Status check(const Request& request) const;
  Result<uint64_t> submit(Request request, EventSink sink);
  void cancel(uint64_t id);
  Statistics statistics() const;
  const runtime::Capacity& capacity() const { return runner_->capacity(); }
  void start();
  void stop_and_join();

 private:
  // A step between submit() and wait() of the runner, which refers to `sequences`.
  struct Flight {
    std::vector<ScheduledChunk> chunks;
    std::vector<runtime::SequenceStep> sequences;
    bool may_be_followed = false;  // before it has ended
  };

  // On the step thread:
  void run();
  bool wait_for_work();
  void take_incoming();
  bool may_submit() const;
  bool submit_step();
  void finish_step();
  void assemble(const std::vector<ScheduledChunk>& chunks, Flight* flight) const;
  void deliver(const ScheduledChunk& chunk, runtime::SequenceResult& result);
  void fail(const ScheduledChunk& chunk, const Status& error);
  void publish_statistics();
  uint64_t in_flight() const { return submitted_ - finished_; }
  Flight& flight(uint64_t number) { return flights_[number % runtime::kMostStepsInFlight]; }
  const Flight& flight(uint64_t number) const { return flights_[number % runtime::kMostStepsInFlight]; }

  const std::unique_ptr<runtime::Runner> runner_;
  const int32_t max_waiting_;
  Scheduler scheduler_;
  Flight flights_[runtime::kMostStepsInFlight];  // in flight: those of the numbers [finished_, submitted_)
  uint64_t submitted_ = 0;
  uint64_t finished_ = 0;
  std::vector<runtime::SequenceResult> results_;

  mutable std::mutex mutex_;
  std::condition_variable work_arrived_;
  std::vector<Waiting> incoming_;
  std::vector<uint64_t> cancelled_;
  uint64_t next_id_ = 1;
  bool stopping_ = false;
  Statistics statistics_;
  std::chrono::steady_clock::time_point last_progress_ = std::chrono::steady_clock::now();

  std::thread thread_;
};

}  // namespace tokenspeed::engine
