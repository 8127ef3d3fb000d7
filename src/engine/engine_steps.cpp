// The step thread: plans steps, keeps as many in flight as the runner takes, and hands out their results.
#include <algorithm>

#include "base/log.h"
#include "engine/engine_impl.h"

namespace tokenspeed::engine {
namespace {

// Of a step behind which another is submitted before it has ended. The moment in which the device waits after a longer
// one is nothing beside it, and a request that arrives while it runs would have to wait for two steps.
constexpr int32_t kMostTokensFollowed = 256;

// Whether nothing can be submitted behind the step before the host has seen what it gives the request.
bool must_be_waited_for(const Request& request, const runtime::SequenceStep& step) {
  return (step.sample && request.constraint) || !runtime::finishes_on_device(step);
}

void give_prompt_tokens(const Request& request, const ScheduledChunk& chunk, runtime::SequenceStep* step) {
  const std::span<const int32_t> prompt(request.prompt);
  step->tokens = prompt.subspan(static_cast<size_t>(chunk.begin), static_cast<size_t>(chunk.tokens));
  if (request.sampling.prompt_logprobs < 0) return;
  const int64_t begin = chunk.begin + 1;
  const int64_t end = std::min(begin + chunk.tokens, static_cast<int64_t>(prompt.size()));
  step->next_tokens = prompt.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
}

runtime::SequenceStep sequence_step(const Running& running, const ScheduledChunk& chunk) {
  static constexpr int32_t kUnknownToken = 0;
  const Request& request = running.request;
  runtime::SequenceStep step;
  if (chunk.begin < static_cast<int64_t>(request.prompt.size())) {
    give_prompt_tokens(request, chunk, &step);
  } else if (running.expected > 0) {
    step.token_from = running.last_index;
    step.tokens = {&kUnknownToken, 1};
  } else {
    step.tokens = std::span<const int32_t>(running.output).last(1);
  }
  step.context = static_cast<int32_t>(chunk.begin);
  step.pages = running.pages.ids();
  step.state_out = running.slot.ids()[0];
  step.state_in = chunk.begin == 0 ? -1 : step.state_out;
  step.sample = chunk.samples;
  step.sampling = &request.sampling;
  if (step.sample && request.constraint) step.allowed_tokens = request.constraint->allowed();
  step.prompt = request.prompt;
  step.output = running.output;
  return step;
}

}  // namespace

// False: the engine stops.
bool Engine::Impl::wait_for_work() {
  std::unique_lock lock(mutex_);
  work_arrived_.wait(lock, [this] {
    return stopping_ || !incoming_.empty() || !cancelled_.empty() || scheduler_.running() + scheduler_.waiting() > 0;
  });
  return !stopping_;
}

// Where the runner takes two steps, the next one is submitted as soon as the last one has ended, while one runs: the
// device never waits for the host.
void Engine::Impl::run() {
  const auto most = static_cast<uint64_t>(capacity().steps_in_flight);
  while (wait_for_work()) {
    take_incoming();
    const bool submitted = may_submit() && submit_step();
    if (in_flight() == most || (in_flight() > 0 && !submitted)) finish_step();
    publish_statistics();
  }
  while (in_flight() > 0) finish_step();
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

void Engine::Impl::assemble(const std::vector<ScheduledChunk>& chunks, Flight* flight) const {
  flight->chunks.assign(chunks.begin(), chunks.end());
  flight->sequences.clear();
  int64_t tokens = 0;
  bool alone = false;
  for (const ScheduledChunk& chunk : chunks) {
    const Running& running = running_of(*chunk.state);
    flight->sequences.push_back(sequence_step(running, chunk));
    tokens += chunk.tokens;
    alone = alone || must_be_waited_for(running.request, flight->sequences.back());
  }
  flight->may_be_followed = !alone && tokens <= kMostTokensFollowed;
}

bool Engine::Impl::may_submit() const {
  if (in_flight() == 0) return true;
  return in_flight() < static_cast<uint64_t>(capacity().steps_in_flight) && flight(submitted_ - 1).may_be_followed;
}

// Whether there was a step to submit and the runner took it.
bool Engine::Impl::submit_step() {
  const std::vector<ScheduledChunk>& chunks = scheduler_.plan();
  if (chunks.empty()) return false;
  Flight& next = flight(submitted_);
  assemble(chunks, &next);
  const Status status = runner_->submit(next.sequences);
  if (status.ok()) {
    scheduler_.enter_step();
    ++submitted_;
    return true;
  }
  spdlog::error("a step of {} sequences was not started: {}", next.chunks.size(), status.message());
  for (const ScheduledChunk& chunk : next.chunks) fail(chunk, status);
  return false;
}

void Engine::Impl::finish_step() {
  const Flight& ended = flight(finished_++);
  const Status status = runner_->wait(&results_);
  if (!status.ok()) spdlog::error("a step of {} sequences failed: {}", ended.chunks.size(), status.message());
  for (size_t i = 0; i < ended.chunks.size(); ++i) {
    const ScheduledChunk& chunk = ended.chunks[i];
    if (!scheduler_.leave_step(chunk)) continue;
    if (status.ok()) {
      deliver(chunk, results_[i]);
    } else {
      fail(chunk, status);
    }
  }
  std::lock_guard lock(mutex_);
  ++statistics_.steps;
}

void Engine::Impl::fail(const ScheduledChunk& chunk, const Status& error) {
  scheduler_.end(chunk.state)({.finished = true, .reason = FinishReason::kError, .error = error});
}

void Engine::Impl::deliver(const ScheduledChunk& chunk, runtime::SequenceResult& result) {
  Running& running = running_of(*chunk.state);
  Event event;
  event.prompt_logprobs = std::move(result.prompt_logprobs);
  {
    std::lock_guard lock(mutex_);
    if (chunk.begin < static_cast<int64_t>(running.request.prompt.size())) statistics_.prompt_tokens += chunk.tokens;
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
    // Unless a step in flight writes for it, the leases are back before the client hears of the end.
    scheduler_.end(chunk.state)(std::move(event));
  } else if (worth_telling) {
    running.sink(std::move(event));
  }
}

void Engine::Impl::publish_statistics() {
  std::lock_guard lock(mutex_);
  statistics_.running = scheduler_.running();
  statistics_.waiting = scheduler_.waiting();
  statistics_.kv_cache_usage = scheduler_.page_usage();
  last_progress_ = std::chrono::steady_clock::now();
}

}  // namespace tokenspeed::engine
