// Requests in, tokens out. The engine batches all running requests into steps of a Runner: chunked prompts and decoding
// together, first come first served, with KV pages and state slots held by leases. Where the runner takes two steps,
// the next one is planned and submitted while one runs: what it computes for a request that turns out to have ended is
// dropped. A step with rows that the host finishes is waited for first.
//
// Threads: one step thread owns everything. submit() and cancel() may be called from any thread; they enqueue. Events
// reach the request's sink on the step thread, in order, and must not block (a sink posts to its own thread).
// Invariant: every submitted request gets exactly one kFinished event. Its leases are back by then, or, where the
// runner takes two steps, when the step that was submitted before the end was known has ended. Admission reserves the
// worst case (prompt + max_tokens) in pages, so a running request never runs out of memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/token_constraint.h"
#include "runtime/runner.h"

namespace tokenspeed::engine {

enum class FinishReason { kStop, kLength, kCancelled, kError };

struct Request {
  std::vector<int32_t> prompt;  // at least one token
  int64_t max_tokens = 0;       // new tokens, >= 1 (0 allowed with prompt logprobs: echo only)
  runtime::SamplingParameters sampling;
  std::unique_ptr<TokenConstraint> constraint = nullptr;  // none: any token may follow
  std::vector<int32_t> stop_token_ids;                    // end the request; the token is reported as the last one
  bool ignore_eos = false;                                // when set, stop_token_ids are not looked at
};

struct Event {
  // Tokens sampled since the last event (usually one), with logprobs when asked for (same length or empty).
  std::vector<int32_t> tokens;
  std::vector<runtime::TokenLogprobs> logprobs;
  std::vector<runtime::TokenLogprobs> prompt_logprobs;  // those that became known, in order of position
  bool first = false;                                   // holds the first token
  bool finished = false;
  FinishReason reason = FinishReason::kStop;  // when finished
  Status error;                               // when reason is kError
  int64_t cached_tokens = 0;                  // prompt tokens served from a cache (0 until the prefix cache exists)
};
using EventSink = std::function<void(Event&&)>;

// Handle of a submitted request; destroying it cancels the request if it still runs.
class RequestHandle;

struct Statistics {
  int64_t running = 0;
  int64_t waiting = 0;
  double kv_cache_usage = 0;  // share of pages held, 0..1
  int64_t prompt_tokens = 0;  // totals since start
  int64_t generation_tokens = 0;
  int64_t steps = 0;
  double seconds_since_progress = 0;  // with work pending: since tokens last advanced, else 0
};

struct EngineOptions {
  int32_t max_num_seqs = 0;            // sequences running at once; 0: the runner's limit
  int32_t max_num_batched_tokens = 0;  // rows of one step; 0: the runner's limit
  int32_t max_waiting = 1024;          // queue bound; beyond it submit answers resource_exhausted
};

class Engine {
 public:
  Engine(std::unique_ptr<runtime::Runner> runner, EngineOptions options);
  ~Engine();  // cancels what runs, then joins the step thread
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Errors: invalid_argument (empty prompt; prompt + max_tokens over the model length; a token id outside the
  // vocabulary), resource_exhausted (queue full). On an error the sink is never called.
  Result<RequestHandle> submit(Request request, EventSink sink);
  Statistics statistics() const;
  const runtime::Capacity& capacity() const;

 private:
  friend class RequestHandle;
  class Impl;
  std::shared_ptr<Impl> impl_;  // shared with handles, which may outlive the engine
};

class RequestHandle {
 public:
  RequestHandle() = default;
  RequestHandle(std::weak_ptr<Engine::Impl> engine, uint64_t id) : engine_(std::move(engine)), id_(id) {}
  ~RequestHandle() { cancel(); }
  RequestHandle(RequestHandle&& other) noexcept : engine_(std::move(other.engine_)), id_(std::exchange(other.id_, 0)) {}
  RequestHandle& operator=(RequestHandle&& other) noexcept {
    std::swap(engine_, other.engine_);
    std::swap(id_, other.id_);
    return *this;
  }
  // Ends the request within one step (kCancelled), unless it has finished. Idempotent.
  void cancel();
  uint64_t id() const { return id_; }

 private:
  std::weak_ptr<Engine::Impl> engine_;
  uint64_t id_ = 0;
};

}  // namespace tokenspeed::engine
