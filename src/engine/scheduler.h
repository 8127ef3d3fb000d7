// Decides what runs next: admits waiting requests in order of arrival, gives every decoding request its token, then
// fills the rest of the step with prompt chunks. Purely logical and deterministic; no threads, no device.
// A step can be planned while others are in flight: a request's next token is given its row before it is known, unless
// it is known to be one too many.
// Invariant: an admitted request holds pages for its worst case and one state slot until it has ended and no step in
// flight writes for it.
// Cost per step: O(running requests), without allocation once warm.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <vector>

#include "cache/id_pool.h"
#include "engine/request_state.h"

namespace tokenspeed::engine {

struct SchedulerLimits {
  int32_t max_sequences = 0;    // requests running at once
  int32_t max_step_tokens = 0;  // rows of one step
  int32_t pages = 0;
  int32_t page_size = 0;
  int32_t state_slots = 0;
};

// One request's share of a step: its tokens [begin, begin + tokens).
struct ScheduledChunk {
  std::list<ActiveState>::iterator state;
  int64_t begin = 0;
  int32_t tokens = 0;
  bool completes_prompt = false;  // after it, the next token may be sampled
  bool samples = false;           // and is
};

class Scheduler {
 public:
  explicit Scheduler(const SchedulerLimits& limits);

  int32_t pages_for(int64_t tokens) const;
  void enqueue(Waiting waiting) { waiting_.push_back(std::move(waiting)); }
  // The next step; empty when nothing can run. Valid until the next call of a non-const member.
  const std::vector<ScheduledChunk>& plan();
  // The planned step is in flight.
  void enter_step();
  // A step that the chunk was part of has ended. False when the request had ended before; then it may be gone now.
  bool leave_step(const ScheduledChunk& chunk);
  // Takes a request out that has not ended: its leases are back when it is in no step in flight. Returns its sink.
  EventSink end(std::list<ActiveState>::iterator state);
  // The same of the request of this id, waiting or running; an empty sink when there is none or it has ended.
  EventSink remove(uint64_t id);
  // All requests, waiting and running, removed: their sinks. No step may be in flight.
  std::vector<EventSink> remove_all();

  int64_t running() const { return static_cast<int64_t>(active_.size()); }
  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  double page_usage() const;

 private:
  void admit_waiting();

  SchedulerLimits limits_;
  cache::IdPool pages_;  // before the requests: leases return to pools that still live
  cache::IdPool slots_;
  std::deque<Waiting> waiting_;
  std::list<ActiveState> active_;  // in order of admission
  std::vector<ScheduledChunk> step_;
};

}  // namespace tokenspeed::engine
