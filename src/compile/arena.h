// Where a Program's values lie in its arena.
#pragma once

#include "compile/program.h"

namespace tokenspeed::compile {

// Gives every value its offset and the Program its arena_bytes. On entry a view's offset is relative to its root and a
// root's is 0. Values share memory only when no order the Program allows has both alive: neither list order with
// streams side by side, nor, up to kMaxPhaseTokens, execution by phases. With reuse off each has bytes of its own.
void place_values(Program* program, bool reuse);

}  // namespace tokenspeed::compile
