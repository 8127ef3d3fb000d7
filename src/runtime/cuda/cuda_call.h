// One operation of a Program on the GPU: its operands by position, and its kernel.
#pragma once

#include <string>

#include "runtime/cuda/cuda_program.h"
#include "runtime/operation_arguments.h"

namespace tokenspeed::runtime {

// "operation 7 'router' of layer 0".
std::string describe_operation(const compile::Program& program, int32_t index);

// Enqueues operation `index` on its stream. An error is the kernel's refusal or a failed launch.
Status call_operation(const CudaProgram& program, const CudaRank& rank, const CudaStep& step, int32_t index);

}  // namespace tokenspeed::runtime
