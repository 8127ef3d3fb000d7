#include "compile/memory_plan.h"

#include <algorithm>
#include <numeric>

namespace tokenspeed::compile {

MemoryPlan plan_memory(const std::vector<Lifetime>& lifetimes, int64_t alignment, bool reuse) {
  MemoryPlan plan;
  plan.offsets.resize(lifetimes.size());
  const auto padded = [&](size_t i) { return (lifetimes[i].bytes + alignment - 1) / alignment * alignment; };
  std::vector<size_t> order(lifetimes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return padded(a) > padded(b); });

  std::vector<size_t> placed;  // by ascending offset
  for (size_t i : order) {
    int64_t offset = 0;
    for (size_t other : placed) {
      const bool together =
          !reuse || (lifetimes[i].begin <= lifetimes[other].end && lifetimes[other].begin <= lifetimes[i].end);
      if (!together) continue;
      if (offset + padded(i) <= plan.offsets[other]) break;
      offset = std::max(offset, plan.offsets[other] + padded(other));
    }
    plan.offsets[i] = offset;
    plan.bytes = std::max(plan.bytes, offset + padded(i));
    const auto after = std::upper_bound(placed.begin(), placed.end(), offset,
                                        [&](int64_t value, size_t other) { return value < plan.offsets[other]; });
    placed.insert(after, i);
  }
  return plan;
}

}  // namespace tokenspeed::compile
