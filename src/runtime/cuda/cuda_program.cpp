#include "runtime/cuda/cuda_program.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/cuda/gated_delta_net.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mlp.h"
#include "runtime/cuda/cuda_call.h"

namespace tokenspeed::runtime {
namespace {

using compile::Operation;
using compile::OpKind;
using compile::RowSymbol;

Status refuse(const Operation& op, const std::string& what, int64_t value, const char* allowed) {
  return unimplemented("operation '" + op.name + "' has " + what + " " + std::to_string(value) +
                       "; the CUDA kernels take " + allowed + ". Run with --device cpu");
}

Status check_operation(const Operation& op) {
  const compile::Attributes& a = op.attributes;
  switch (op.kind) {
    case OpKind::kAttention:
    case OpKind::kAttentionPrepare:
    case OpKind::kRope:
      if (a.head_dim != 64 && a.head_dim != 128 && a.head_dim != 256)
        return refuse(op, "a head dim of", a.head_dim, "64, 128 or 256");
      if (a.rotary_dim / 2 % (a.head_dim / 32) != 0)
        return refuse(op, "a rotary dim of", a.rotary_dim, "multiples of head_dim / 16");
      return {};
    case OpKind::kCausalConv:
    case OpKind::kGatedDeltaRule:
    case OpKind::kGdnMixer:
      if (a.conv_kernel != 4) return refuse(op, "a convolution of", a.conv_kernel, "4 taps");
      if (a.key_dim != a.value_dim || (a.key_dim != 32 && a.key_dim != 64 && a.key_dim != 128)) {
        return refuse(op, "a key dim of", a.key_dim, "32, 64 or 128, equal to the value dim");
      }
      return {};
    case OpKind::kRouter:
      if (a.experts > 512) return refuse(op, "experts:", a.experts, "at most 512");
      if (a.top_k > 16) return refuse(op, "experts per token:", a.top_k, "at most 16");
      return {};
    default:
      return {};
  }
}

// Kernels move 16 bytes at once.
Status check_value(const compile::ProgramValue& value) {
  if (value.dtype != DType::kBFloat16 || value.stride < 8 || value.stride % 8 == 0) return {};
  return unimplemented("value '" + value.name + "' has rows of " + std::to_string(value.stride) +
                       " elements; the CUDA kernels take multiples of 8. Run with --device cpu");
}

}  // namespace

Status CudaProgram::check(const compile::Program& program, bool stand_in) {
  if (program.activation != DType::kBFloat16) {
    return unimplemented("the CUDA kernels have bfloat16 activations only; run float32 with --device cpu");
  }
  for (const compile::ProgramValue& value : program.values) TS_RETURN_IF_ERROR(check_value(value));
  for (const Operation& op : program.operations) {
    TS_RETURN_IF_ERROR(check_operation(op));
    if (is_collective(op.kind) && !stand_in) {
      return unimplemented(
          "operation '" + op.name + "' of '" + program.name +
          "' communicates between ranks, but this runner is a single one; use --tp 1, or --rank-only to "
          "measure one rank alone");
    }
  }
  return {};
}

CudaProgram::CudaProgram(compile::Program program, const CudaWeights& weights) : program_(std::move(program)) {
  for (const compile::ProgramWeight& weight : program_.weights) weights_.push_back(weights.at(weight.name));
  plan_streams();
}

// The first operation of a stretch on stream 1 waits for all of stream 0 so far; the operation on stream 0 that reads
// what stream 1 wrote waits for all of stream 1. The memory plan keeps everything between the two apart.
void CudaProgram::plan_streams() {
  const auto& operations = program_.operations;
  waits_.assign(operations.size(), false);
  std::vector<bool> pending(program_.values.size(), false);  // roots written on stream 1 and not joined yet
  bool forked = false;
  for (size_t i = 0; i < operations.size(); ++i) {
    const Operation& op = operations[i];
    if (op.stream != 0) {
      waits_[i] = !forked;
      forked = true;
      for (int32_t id : op.outputs) pending[program_.values[id].root] = true;
      continue;
    }
    for (int32_t id : op.inputs) waits_[i] = waits_[i] || pending[program_.values[id].root];
    if (!waits_[i]) continue;
    std::fill(pending.begin(), pending.end(), false);
    forked = false;
  }
}

int64_t CudaProgram::workspace_bytes() const {
  int64_t bytes = 0;
  for (const Operation& op : program_.operations) {
    const compile::Attributes& a = op.attributes;
    if (op.kind == OpKind::kLinear) {
      const compile::ProgramValue& x = program_.values[op.inputs[0]];
      const int64_t rows = x.rows == RowSymbol::kTokens ? program_.tokens : program_.logit_rows;
      bytes = std::max(bytes, kernels::cuda::linear_workspace_bytes(rows, x.columns));
    } else if (op.kind == OpKind::kExperts) {
      bytes = std::max(bytes, kernels::cuda::moe_experts_workspace_bytes(program_.tokens, a.experts, a.top_k,
                                                                         program_.hidden_size, a.width));
    } else if (op.kind == OpKind::kGdnMixer) {
      bytes = std::max(bytes, kernels::cuda::gdn_mixer_workspace_bytes(gdn_shape(op), program_.tokens));
    }
  }
  return bytes;
}

Status CudaProgram::run_body(const CudaRank& rank, const CudaStep& step, const LaunchObserver& observe) const {
  return run(rank, step, 0, program_.head_begin, observe);
}

Status CudaProgram::run_head(const CudaRank& rank, const CudaStep& step, const LaunchObserver& observe) const {
  return run(rank, step, program_.head_begin, static_cast<int32_t>(program_.operations.size()), observe);
}

Status CudaProgram::run(const CudaRank& rank, const CudaStep& step, int32_t begin, int32_t end,
                        const LaunchObserver& observe) const {
  for (int32_t i = begin; i < end; ++i) {
    const int32_t stream = program_.operations[i].stream;
    if (waits_[i]) {
      const cudaEvent_t event = stream == 0 ? rank.joined : rank.forked;
      TS_RETURN_IF_ERROR(cuda_check(cudaEventRecord(event, rank.streams[1 - stream]), "recording an event"));
      TS_RETURN_IF_ERROR(cuda_check(cudaStreamWaitEvent(rank.streams[stream], event), "waiting for an event"));
    }
    const OperationPart part = {.operation = i};
    TS_ASSIGN_OR_RETURN(const bool launch, shall_launch(observe, {&part, 1}));
    if (launch) TS_RETURN_IF_ERROR(call_operation(*this, rank, step, i));
  }
  return {};
}

kernels::Rows CudaProgram::rows(const CudaRank& rank, int32_t value, int64_t row) const {
  return value_rows(program_, rank.arena, value, row);
}

}  // namespace tokenspeed::runtime
