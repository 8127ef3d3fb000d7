// Which instruction sets the fast CPU kernels may use on this machine.
#pragma once

#include <string_view>

namespace tokenspeed::kernels::cpu {

enum class InstructionSet { kAvx2, kAvx512, kAvx512Bf16 };

// Whether this machine runs the fast kernels at all (AVX2, FMA and F16C); otherwise the program refuses at start.
bool supported();
// The best set of this machine. Fixed for the life of the process; TOKENSPEED_INSTRUCTION_SET=avx2|avx512|avx512_bf16
// lowers it (never raises it), for tests of the other paths.
InstructionSet instruction_set();
std::string_view instruction_set_name(InstructionSet set);

}  // namespace tokenspeed::kernels::cpu
