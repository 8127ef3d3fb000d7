#include "engine/engine.h"

#include <algorithm>

#include "engine/engine_impl.h"

namespace tokenspeed::engine {
namespace {

SchedulerLimits limits_of(const runtime::Capacity& capacity, const EngineOptions& options) {
  const auto at_most = [](int32_t wanted, int32_t limit) { return wanted > 0 ? std::min(wanted, limit) : limit; };
  const int32_t max_step_tokens = at_most(options.max_num_batched_tokens, capacity.max_step_tokens);
  // Every decoding request gets its row in every step.
  return {.max_sequences = std::min(at_most(options.max_num_seqs, capacity.max_sequences), max_step_tokens),
          .max_step_tokens = max_step_tokens,
          .pages = capacity.pages,
          .page_size = capacity.page_size,
          .state_slots = capacity.state_slots};
}

}  // namespace

Engine::Impl::Impl(std::unique_ptr<runtime::Runner> runner, EngineOptions options)
    : runner_(std::move(runner)),
      max_waiting_(options.max_waiting),
      scheduler_(limits_of(runner_->capacity(), options)) {}

Status Engine::Impl::check(const Request& request) const {
  const runtime::Capacity& capacity = runner_->capacity();
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  if (prompt == 0) return invalid_argument("the prompt is empty; give at least one token").with_param("prompt");
  if (request.max_tokens < 0) return invalid_argument("max_tokens must not be negative").with_param("max_tokens");
  if (prompt + request.max_tokens > capacity.max_model_length) {
    return invalid_argument("the prompt has " + std::to_string(prompt) + " tokens and " +
                            std::to_string(request.max_tokens) + " more are asked for; the model's context is " +
                            std::to_string(capacity.max_model_length) + " tokens. Shorten the prompt or max_tokens")
        .with_param("max_tokens");
  }
  if (scheduler_.pages_for(prompt + request.max_tokens) > capacity.pages) {
    return invalid_argument("prompt and max_tokens need room for " + std::to_string(prompt + request.max_tokens) +
                            " tokens; the KV cache holds " +
                            std::to_string(int64_t{capacity.pages} * capacity.page_size) +
                            ". Shorten them, or start the server with a larger KV cache")
        .with_param("max_tokens");
  }
  for (const int32_t token : request.prompt) {
    if (token < 0 || token >= capacity.vocabulary_size) {
      return invalid_argument("token id " + std::to_string(token) + " in the prompt is outside the vocabulary of " +
                              std::to_string(capacity.vocabulary_size))
          .with_param("prompt");
    }
  }
  return {};
}

Result<uint64_t> Engine::Impl::submit(Request request, EventSink sink) {
  TS_RETURN_IF_ERROR(check(request));
  uint64_t id = 0;
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return unavailable("the server is shutting down; send the request again later");
    if (statistics_.waiting + static_cast<int64_t>(incoming_.size()) >= max_waiting_) {
      return resource_exhausted("the queue is full (" + std::to_string(max_waiting_) +
                                " requests wait); send the request again in a few seconds");
    }
    id = next_id_++;
    if (incoming_.empty() && statistics_.running + statistics_.waiting == 0) {
      last_progress_ = std::chrono::steady_clock::now();
    }
    incoming_.push_back({id, std::move(request), std::move(sink)});
  }
  work_arrived_.notify_one();
  return id;
}

void Engine::Impl::cancel(uint64_t id) {
  {
    std::lock_guard lock(mutex_);
    cancelled_.push_back(id);
  }
  work_arrived_.notify_one();
}

Statistics Engine::Impl::statistics() const {
  std::lock_guard lock(mutex_);
  Statistics statistics = statistics_;
  statistics.waiting += static_cast<int64_t>(incoming_.size());
  if (statistics.running + statistics.waiting > 0) {
    statistics.seconds_since_progress =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - last_progress_).count();
  }
  return statistics;
}

void Engine::Impl::start() {
  thread_ = std::thread([this] { run(); });
}

void Engine::Impl::stop_and_join() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_arrived_.notify_one();
  thread_.join();
}

Engine::Engine(std::unique_ptr<runtime::Runner> runner, EngineOptions options)
    : impl_(std::make_shared<Impl>(std::move(runner), options)) {
  impl_->start();
}

Engine::~Engine() { impl_->stop_and_join(); }

Result<RequestHandle> Engine::submit(Request request, EventSink sink) {
  TS_ASSIGN_OR_RETURN(const uint64_t id, impl_->submit(std::move(request), std::move(sink)));
  return RequestHandle(impl_, id);
}

Statistics Engine::statistics() const { return impl_->statistics(); }
const runtime::Capacity& Engine::capacity() const { return impl_->capacity(); }

void RequestHandle::cancel() {
  if (id_ == 0) return;
  if (const auto engine = engine_.lock()) engine->cancel(id_);
  id_ = 0;
}

}  // namespace tokenspeed::engine
