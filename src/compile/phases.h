// A Program's operations grouped into phases: what a GPU can run as one kernel for a few tokens, with a grid-wide
// dependency only between phases. The design's count (6 or fewer per layer, collectives apart) is that of these.
//
// Each operation is the main work of a phase, a prologue or an epilogue:
//  * prologue (norms, row gathering): every block of the readers' phases computes it again from whole rows in memory;
//    its first reader's phase also writes the result for later phases;
//  * epilogue (activation, routing, combination, residual sum): on the rows a block has just made, or by the last block
//    to arrive where a whole row is needed (routing);
//  * one operation may belong to two phases: experts (gate/up, then down), residual sum + norm.
// Independent work shares a phase; work off the critical path (the shared expert) goes as late as its reader allows.
// Invariant: a step reads values that earlier phases, or earlier steps of its phase, complete.
#pragma once

#include <vector>

#include "compile/program.h"

namespace tokenspeed::compile {

// Greatest T for which runners may execute by phases; up to it the memory plan holds for that order as well.
inline constexpr int64_t kMaxPhaseTokens = 8;

enum class PhasePart : uint8_t { kWhole, kResidual, kNorm, kGateUp, kDown };

struct PhaseStep {
  int32_t operation = kNone;
  PhasePart part = PhasePart::kWhole;
};

struct Phase {
  int32_t layer = kNone;
  bool communication = false;    // a collective
  std::vector<PhaseStep> steps;  // in an order that respects their dependencies
};

// In execution order. Linear in operations times their inputs. Needs operations and values only, not the arena.
std::vector<Phase> group_into_phases(const Program& program);

struct PhaseCount {
  int32_t compute = 0;
  int32_t communication = 0;
};
PhaseCount count_phases(const std::vector<Phase>& phases, int32_t layer);

}  // namespace tokenspeed::compile
