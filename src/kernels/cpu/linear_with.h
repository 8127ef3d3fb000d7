// The CPU products with a named instruction set instead of the machine's best: how tests and benchmarks reach each.
// `set` must not exceed what the machine has.
#pragma once

#include "kernels/cpu/cpu_features.h"
#include "kernels/linear.h"
#include "kernels/mlp.h"

namespace tokenspeed::kernels::cpu {

void linear(const Linear& args, ThreadPool& pool, InstructionSet set);
void moe_experts(const MoeExperts& args, ThreadPool& pool, InstructionSet set);

}  // namespace tokenspeed::kernels::cpu
