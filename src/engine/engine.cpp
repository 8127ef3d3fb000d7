#include "engine/engine.h"

#include <algorithm>

#include "base/log.h"
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

void Engine::Impl::run() {
  while (true) {
    {
      std::unique_lock lock(mutex_);
      work_arrived_.wait(lock, [this] {
        return stopping_ || !incoming_.empty() || !cancelled_.empty() ||
               scheduler_.running() + scheduler_.waiting() > 0;
      });
      if (stopping_) break;
    }
    take_incoming();
    const std::vector<ScheduledChunk>& chunks = scheduler_.plan();
    if (!chunks.empty()) step(chunks);
    publish_statistics();
  }
  take_incoming();
  for (const EventSink& sink : scheduler_.remove_all()) sink({.finished = true, .reason = FinishReason::kCancelled});
  publish_statistics();
}

void Engine::Impl::take_incoming() {
  std::vector<Waiting> incoming;
  std::vector<uint64_t> cancelled;
  {
    std::lock_guard lock(mutex_);
    incoming.swap(incoming_);
    cancelled.swap(cancelled_);
    statistics_.waiting += static_cast<int64_t>(incoming.size());
  }
  for (Waiting& waiting : incoming) scheduler_.enqueue(std::move(waiting));
  for (const uint64_t id : cancelled) {
    // Unknown ids are requests that finished before the cancel arrived.
    if (const EventSink sink = scheduler_.remove(id)) sink({.finished = true, .reason = FinishReason::kCancelled});
  }
}

void Engine::Impl::assemble(const std::vector<ScheduledChunk>& chunks) {
  sequence_steps_.clear();
  for (const ScheduledChunk& chunk : chunks) {
    const Running& running = running_of(*chunk.state);
    const Request& request = running.request;
    const int64_t prompt_size = static_cast<int64_t>(request.prompt.size());
    const std::span<const int32_t> prompt(request.prompt);
    runtime::SequenceStep step;
    if (running.computed < prompt_size) {
      step.tokens = prompt.subspan(static_cast<size_t>(running.computed), static_cast<size_t>(chunk.tokens));
      if (request.sampling.prompt_logprobs >= 0) {
        const int64_t begin = running.computed + 1;
        const int64_t end = std::min(begin + chunk.tokens, prompt_size);
        step.next_tokens = prompt.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
      }
    } else {
      step.tokens = std::span<const int32_t>(running.output).last(1);
    }
    step.context = static_cast<int32_t>(running.computed);
    step.pages = running.pages.ids();
    step.state_out = running.slot.ids()[0];
    step.state_in = running.computed == 0 ? -1 : step.state_out;
    step.sample = chunk.completes_prompt && request.max_tokens > 0;
    step.sampling = &request.sampling;
    if (step.sample && request.constraint) step.allowed_tokens = request.constraint->allowed();
    step.prompt = prompt;
    step.output = running.output;
    sequence_steps_.push_back(step);
  }
}

void Engine::Impl::step(const std::vector<ScheduledChunk>& chunks) {
  assemble(chunks);
  Status status = runner_->submit(sequence_steps_);
  if (status.ok()) status = runner_->wait(&results_);
  if (!status.ok()) {
    spdlog::error("a step of {} sequences failed: {}", chunks.size(), status.message());
    fail_all(chunks, status);
    return;
  }
  for (size_t i = 0; i < chunks.size(); ++i) deliver(chunks[i], results_[i]);
}

void Engine::Impl::fail_all(const std::vector<ScheduledChunk>& chunks, const Status& error) {
  for (const ScheduledChunk& chunk : chunks) {
    const EventSink sink = std::move(running_of(*chunk.state).sink);
    scheduler_.erase(chunk.state);
    sink({.finished = true, .reason = FinishReason::kError, .error = error});
  }
}

void Engine::Impl::deliver(const ScheduledChunk& chunk, runtime::SequenceResult& result) {
  Running& running = running_of(*chunk.state);
  const bool prompt_chunk = running.computed < static_cast<int64_t>(running.request.prompt.size());
  running.computed += chunk.tokens;
  Event event;
  event.prompt_logprobs = std::move(result.prompt_logprobs);
  {
    std::lock_guard lock(mutex_);
    if (prompt_chunk) statistics_.prompt_tokens += chunk.tokens;
    if (result.token >= 0) ++statistics_.generation_tokens;
  }
  if (!result.status.ok()) {
    event.finished = true;
    event.reason = FinishReason::kError;
    event.error = std::move(result.status);
  } else if (chunk.completes_prompt) {
    const Request& request = running.request;
    if (result.token >= 0) {
      event.first = running.output.empty();
      running.output.push_back(result.token);
      if (request.constraint) request.constraint->push(result.token);
      event.tokens.push_back(result.token);
      event.logprobs = std::move(result.logprobs);
      const auto& stops = request.stop_token_ids;
      event.finished = !request.ignore_eos && std::find(stops.begin(), stops.end(), result.token) != stops.end();
    }
    if (!event.finished && static_cast<int64_t>(running.output.size()) >= request.max_tokens) {
      event.finished = true;
      event.reason = FinishReason::kLength;
    }
  }
  const bool worth_telling = event.finished || !event.tokens.empty() || !event.prompt_logprobs.empty();
  if (event.finished) {
    const EventSink sink = std::move(running.sink);
    scheduler_.erase(chunk.state);  // the leases are back before the client hears of the end
    sink(std::move(event));
    return;
  }
  if (worth_telling) running.sink(std::move(event));
  if (chunk.completes_prompt && std::holds_alternative<Prefilling>(*chunk.state)) {
    *chunk.state = start_decoding(std::get<Prefilling>(std::move(*chunk.state)));
  }
}

void Engine::Impl::publish_statistics() {
  std::lock_guard lock(mutex_);
  statistics_.running = scheduler_.running();
  statistics_.waiting = scheduler_.waiting();
  statistics_.kv_cache_usage = scheduler_.page_usage();
  ++statistics_.steps;
  last_progress_ = std::chrono::steady_clock::now();
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
