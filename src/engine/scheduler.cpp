#include "engine/scheduler.h"

#include <algorithm>

namespace tokenspeed::engine {

Scheduler::Scheduler(const SchedulerLimits& limits)
    : limits_(limits), pages_(limits.pages), slots_(limits.state_slots) {}

int32_t Scheduler::pages_for(int64_t tokens) const {
  return static_cast<int32_t>((tokens + limits_.page_size - 1) / limits_.page_size);
}

double Scheduler::page_usage() const {
  return pages_.size() == 0 ? 0.0 : 1.0 - static_cast<double>(pages_.available()) / pages_.size();
}

void Scheduler::admit_waiting() {
  while (!waiting_.empty() && running() < limits_.max_sequences) {
    const Request& request = waiting_.front().request;
    const int64_t worst_case = static_cast<int64_t>(request.prompt.size()) + request.max_tokens;
    if (slots_.available() < 1) return;
    auto pages = pages_.acquire(pages_for(worst_case));
    if (!pages) return;  // strictly in order: a small request does not overtake a large one for ever
    active_.push_back(admit(std::move(waiting_.front()), *std::move(pages), *slots_.acquire(1)));
    waiting_.pop_front();
  }
}

const std::vector<ScheduledChunk>& Scheduler::plan() {
  admit_waiting();
  step_.clear();
  int32_t budget = limits_.max_step_tokens;
  for (auto state = active_.begin(); state != active_.end() && budget > 0; ++state) {
    if (!std::holds_alternative<Decoding>(*state)) continue;
    const Running& running = running_of(*state);
    if (static_cast<int64_t>(running.output.size()) + running.expected >= running.request.max_tokens) continue;
    step_.push_back({state, running.computed, 1, true, true});
    --budget;
  }
  for (auto state = active_.begin(); state != active_.end() && budget > 0; ++state) {
    if (!std::holds_alternative<Prefilling>(*state)) continue;
    const Running& running = running_of(*state);
    const int64_t left = static_cast<int64_t>(running.request.prompt.size()) - running.computed;
    const int32_t tokens = static_cast<int32_t>(std::min<int64_t>(left, budget));
    step_.push_back(
        {state, running.computed, tokens, tokens == left, tokens == left && running.request.max_tokens > 0});
    budget -= tokens;
  }
  return step_;
}

void Scheduler::enter_step() {
  for (size_t i = 0; i < step_.size(); ++i) {
    const ScheduledChunk& chunk = step_[i];
    Running& running = running_of(*chunk.state);
    running.computed += chunk.tokens;
    running.expected += chunk.samples ? 1 : 0;
    running.last_index = static_cast<int32_t>(i);
    ++running.steps;
    auto* const prefilling = std::get_if<Prefilling>(&*chunk.state);
    if (prefilling && chunk.completes_prompt) *chunk.state = start_decoding(std::move(*prefilling));
  }
}

bool Scheduler::leave_step(const ScheduledChunk& chunk) {
  Running& running = running_of(*chunk.state);
  --running.steps;
  running.expected -= chunk.samples ? 1 : 0;
  if (!std::holds_alternative<Ended>(*chunk.state)) return true;
  if (running.steps == 0) active_.erase(chunk.state);
  return false;
}

EventSink Scheduler::end(std::list<ActiveState>::iterator state) {
  EventSink sink = std::move(running_of(*state).sink);
  if (running_of(*state).steps == 0) {
    active_.erase(state);
  } else {
    *state = engine::end(std::move(*state));
  }
  return sink;
}

EventSink Scheduler::remove(uint64_t id) {
  const auto queued = std::find_if(waiting_.begin(), waiting_.end(), [id](const Waiting& w) { return w.id == id; });
  if (queued != waiting_.end()) {
    EventSink sink = std::move(queued->sink);
    waiting_.erase(queued);
    return sink;
  }
  const auto active =
      std::find_if(active_.begin(), active_.end(), [id](ActiveState& s) { return running_of(s).id == id; });
  if (active == active_.end() || std::holds_alternative<Ended>(*active)) return {};
  return end(active);
}

std::vector<EventSink> Scheduler::remove_all() {
  std::vector<EventSink> sinks;
  for (Waiting& waiting : waiting_) sinks.push_back(std::move(waiting.sink));
  for (ActiveState& state : active_) sinks.push_back(std::move(running_of(state).sink));
  waiting_.clear();
  active_.clear();
  return sinks;
}

}  // namespace tokenspeed::engine
