// The life of a request as move-only states that own their leases. A transition consumes the old state, so using a
// request in the wrong state does not compile, and a request that ends, however it ends, returns what it held.
//
//   Waiting --admit--> Prefilling --start_decoding--> Decoding --(dropped)--> leases back
//                          '-----------end----------------'--end--> Ended --(dropped)--> leases back
//
// Ended is for a request that a step in flight still writes for: its client knows the end, its leases wait for the
// step.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "cache/id_pool.h"
#include "engine/engine.h"

namespace tokenspeed::engine {

struct Waiting {
  uint64_t id = 0;
  Request request;
  EventSink sink;
};

// What a request in the pools carries. It stays in its place, because steps in flight refer to it.
struct Running {
  uint64_t id = 0;
  Request request;
  EventSink sink;
  std::vector<int32_t> output;
  cache::Lease pages;
  cache::Lease slot;
  int64_t computed = 0;    // tokens of prompt + output that its caches hold once all steps in flight have ended
  int32_t steps = 0;       // of those in flight, how many it is in
  int32_t expected = 0;    // tokens that steps in flight sample for it
  int32_t last_index = 0;  // in the last step it is in; that step was the last one submitted when `expected` is not 0
};

struct Prefilling {
  std::unique_ptr<Running> running;
};
struct Decoding {
  std::unique_ptr<Running> running;
};
struct Ended {
  std::unique_ptr<Running> running;
};

inline Prefilling admit(Waiting&& waiting, cache::Lease pages, cache::Lease slot) {
  auto running = std::make_unique<Running>();
  running->id = waiting.id;
  running->request = std::move(waiting.request);
  running->sink = std::move(waiting.sink);
  running->pages = std::move(pages);
  running->slot = std::move(slot);
  running->output.reserve(static_cast<size_t>(running->request.max_tokens));  // steps in flight refer to it
  return {std::move(running)};
}
inline Decoding start_decoding(Prefilling&& prefilling) { return {std::move(prefilling.running)}; }

using ActiveState = std::variant<Prefilling, Decoding, Ended>;
inline Running& running_of(ActiveState& state) {
  return std::visit([](auto& s) -> Running& { return *s.running; }, state);
}
inline Ended end(ActiveState&& state) {
  return std::visit([](auto& s) -> Ended { return {std::move(s.running)}; }, state);
}

}  // namespace tokenspeed::engine
