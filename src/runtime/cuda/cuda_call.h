// One operation of a Program on the GPU: its operands by position, and its kernel.
#pragma once

#include "kernels/attention.h"
#include "kernels/gated_delta_net.h"
#include "runtime/cuda/cuda_program.h"

namespace tokenspeed::runtime {

kernels::AttentionShape attention_shape(const compile::Operation& op);
kernels::GdnShape gdn_shape(const compile::Operation& op);

// Enqueues operation `index` on its stream. An error is the kernel's refusal or a failed launch.
Status call_operation(const CudaProgram& program, const CudaRank& rank, const CudaStep& step, int32_t index);

}  // namespace tokenspeed::runtime
