// One operation of a Program on the GPU: its operands by position, and its kernel.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "runtime/cuda/cuda_program.h"
#include "runtime/operation_arguments.h"

namespace tokenspeed::runtime {

// "operation 7 'router' of layer 0".
std::string describe_operation(const compile::Program& program, int32_t index);
// The operation that a launch belongs to, by the addresses among its parameters: first those of weights and caches,
// which are its own, then those of its values. kNone when none is among them.
int32_t find_operation(const CudaProgram& program, const CudaRank& rank, std::span<const uint64_t> parameters);

// Enqueues operation `index` on its stream. An error is the kernel's refusal or a failed launch.
Status call_operation(const CudaProgram& program, const CudaRank& rank, const CudaStep& step, int32_t index);

}  // namespace tokenspeed::runtime
