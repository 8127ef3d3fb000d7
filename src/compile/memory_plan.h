// Lifetimes of values -> offsets in one arena.
#pragma once

#include <cstdint>
#include <vector>

namespace tokenspeed::compile {

// Alive from operation `begin` to operation `end`, both included.
struct Lifetime {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t bytes = 0;
};

struct MemoryPlan {
  std::vector<int64_t> offsets;  // of each lifetime, multiples of `alignment`
  int64_t bytes = 0;
};

// First fit in order of size, greatest first: values alive together never overlap. Quadratic in the number of values.
// With reuse off every value has bytes of its own.
MemoryPlan plan_memory(const std::vector<Lifetime>& lifetimes, int64_t alignment, bool reuse);

}  // namespace tokenspeed::compile
