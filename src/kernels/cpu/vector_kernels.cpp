#include "kernels/cpu/vector_kernels.h"

#include "kernels/attention.h"
#include "kernels/cpu/cpu_features.h"

namespace tokenspeed::kernels::cpu {

static_assert(kAttentionPartition % kAttentionBlock == 0 && kAttentionBlock == 64,
              "the vector kernels sum keys in blocks of 64");

const VectorKernels& vector_kernels() {
  return instruction_set() == InstructionSet::kAvx2 ? kVectorKernelsAvx2 : kVectorKernelsAvx512;
}

}  // namespace tokenspeed::kernels::cpu
