#include "kernels/cpu/cpu_features.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace tokenspeed::kernels::cpu {
namespace {

InstructionSet detect() {
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  InstructionSet best = InstructionSet::kAvx2;
  if (avx512) best = __builtin_cpu_supports("avx512bf16") ? InstructionSet::kAvx512Bf16 : InstructionSet::kAvx512;
  const char* wanted = std::getenv("TOKENSPEED_INSTRUCTION_SET");
  if (wanted == nullptr) return best;
  for (InstructionSet set : {InstructionSet::kAvx2, InstructionSet::kAvx512, InstructionSet::kAvx512Bf16}) {
    if (wanted == instruction_set_name(set)) return std::min(best, set);
  }
  return best;
}

}  // namespace

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

InstructionSet instruction_set() {
  static const InstructionSet set = detect();
  return set;
}

std::string_view instruction_set_name(InstructionSet set) {
  switch (set) {
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "?";
}

}  // namespace tokenspeed::kernels::cpu
