// What a measured launch carried out, and how long it took.
#pragma once

#include <cstdint>
#include <vector>

namespace tokenspeed::runtime {

// An operation, or the share of its bytes, that a launch carries out.
struct OperationPart {
  int32_t operation = 0;  // index in the Program
  double share = 1;
};

// One launch of a step, the launches of one operation, or all launches of one kind.
struct LaunchTime {
  std::vector<OperationPart> parts;  // of the Program; empty: sampling
  double seconds = 0;
  int32_t launches = 1;
};

}  // namespace tokenspeed::runtime
