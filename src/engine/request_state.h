// The life of a request as move-only states that own their leases. A transition consumes the old state, so using a
// request in the wrong state does not compile, and a request that ends, however it ends, returns what it held.
//
//   Waiting --admit--> Prefilling --start_decoding--> Decoding --(dropped)--> leases back
#pragma once

#include <cstdint>
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

// What a request in the pools carries. `computed` tokens of prompt + output are in its caches.
struct Running {
  uint64_t id = 0;
  Request request;
  EventSink sink;
  std::vector<int32_t> output;
  cache::Lease pages;
  cache::Lease slot;
  int64_t computed = 0;
};

struct Prefilling {
  Running running;
};
struct Decoding {
  Running running;
};

inline Prefilling admit(Waiting&& waiting, cache::Lease pages, cache::Lease slot) {
  return {{.id = waiting.id,
           .request = std::move(waiting.request),
           .sink = std::move(waiting.sink),
           .output = {},
           .pages = std::move(pages),
           .slot = std::move(slot)}};
}
inline Decoding start_decoding(Prefilling&& prefilling) { return {std::move(prefilling.running)}; }

using ActiveState = std::variant<Prefilling, Decoding>;
inline Running& running_of(ActiveState& state) {
  return std::visit([](auto& s) -> Running& { return s.running; }, state);
}

}  // namespace tokenspeed::engine
