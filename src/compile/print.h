// A Program and its cost as a page for a terminal.
#pragma once

#include <string>

#include "compile/cost.h"

namespace tokenspeed::compile {

// At most 120 columns wide. Operations in order with stream, bytes, FLOPs and microseconds, layers of the same shape
// folded into one; then bytes, roofline and prediction of the step, memory per rank and, when a price was given, the
// price of a million tokens. `cost` is that of `program` on `device`.
std::string print_plan(const Program& program, const DeviceSpec& device, const Cost& cost);

// The operation's name in tables, alike in layers of the same shape: "linear in_proj_qkv+in_proj_z", "experts".
std::string operation_label(const Operation& operation);

// Its sizes on this rank, as far as they say what it costs: "12288 x 2048 fp8", "8 of 256 x 512"; empty for
// element-wise work.
std::string operation_shape(const Program& program, const Operation& operation);

}  // namespace tokenspeed::compile
