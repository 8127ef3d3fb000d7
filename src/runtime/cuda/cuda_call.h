// One operation of a Program on the GPU: its operands by position, and its kernel.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "runtime/cuda/cuda_program.h"
#include "runtime/operation_arguments.h"

namespace tokenspeed::runtime {

// "operation 7 'router' of layer 0".
std::string describe_operation(const compile::Program& program, int32_t index);
// Of one, as above; of several "operations 1 'in_proj' to 42 'q_proj' of layers 0 to 3".
std::string describe_operations(const compile::Program& program, std::span<const OperationPart> parts);
// The operations of the launch that has these parameters: one of `launches`, or any operation alone. Among the
// addresses in the parameters those of weights and caches, which belong to one operation, tell first. Of several that
// hold as many of them the one of fewest operations, then one of `launches`, then one with more of its values'
// addresses. Empty when nothing is known among the parameters.
std::vector<OperationPart> find_launch(const CudaProgram& program, const CudaRank& rank,
                                       std::span<const std::span<const OperationPart>> launches,
                                       std::span<const uint64_t> parameters);

// Enqueues operation `index` on its stream. An error is the kernel's refusal or a failed launch.
Status call_operation(const CudaProgram& program, const CudaRank& rank, const CudaStep& step, int32_t index);

}  // namespace tokenspeed::runtime
