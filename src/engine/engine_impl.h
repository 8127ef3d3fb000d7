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
  // On the step thread:
  void run();
  void take_incoming();
  void step(const std::vector<ScheduledChunk>& chunks);
  void assemble(const std::vector<ScheduledChunk>& chunks);
  void deliver(const ScheduledChunk& chunk, runtime::SequenceResult& result);
  void fail_all(const std::vector<ScheduledChunk>& chunks, const Status& error);
  void publish_statistics();

  const std::unique_ptr<runtime::Runner> runner_;
  const int32_t max_waiting_;
  Scheduler scheduler_;
  std::vector<runtime::SequenceStep> sequence_steps_;
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
