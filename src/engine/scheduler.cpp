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
    step_.push_back({state, 1, true});
    --budget;
  }
  for (auto state = active_.begin(); state != active_.end() && budget > 0; ++state) {
    if (!std::holds_alternative<Prefilling>(*state)) continue;
    const Running& running = running_of(*state);
    const int64_t left = static_cast<int64_t>(running.request.prompt.size()) - running.computed;
    const int32_t tokens = static_cast<int32_t>(std::min<int64_t>(left, budget));
    step_.push_back({state, tokens, tokens == left});
    budget -= tokens;
  }
  return step_;
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
  if (active == active_.end()) return {};
  EventSink sink = std::move(running_of(*active).sink);
  active_.erase(active);
  return sink;
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
