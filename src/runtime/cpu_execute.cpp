#include "runtime/cpu_execute.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/gated_delta_net.h"
#include "kernels/linear.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"
#include "runtime/operation_arguments.h"

namespace tokenspeed::runtime {
namespace {

using compile::Operation;
using compile::OpKind;
using compile::RowSymbol;
namespace cpu = kernels::cpu;
namespace reference = kernels::reference;

// The reference kernels, or the fast ones on the rank's threads.
class Kernels {
 public:
  explicit Kernels(const CpuRank& rank) : rank_(rank) {}
  template <typename Args>
  void call(void (*plain)(const Args&), void (*fast)(const Args&, ThreadPool&), const Args& args) const {
    if (rank_.reference_kernels) {
      plain(args);
    } else {
      fast(args, *rank_.pool);
    }
  }

 private:
  const CpuRank& rank_;
};

void execute(const Operation& op, const OperationArguments& arguments, const Kernels& kernels) {
  switch (op.kind) {
    case OpKind::kEmbedding:
      return kernels.call(reference::embedding, cpu::embedding, arguments.embedding());
    case OpKind::kRmsNorm:
      return kernels.call(reference::rms_norm, cpu::rms_norm, arguments.rms_norm());
    case OpKind::kLinear:
      return kernels.call(reference::linear, cpu::linear, arguments.linear());
    case OpKind::kSplitQueryGate:
      return kernels.call(reference::split_query_gate, cpu::split_query_gate, arguments.split_query_gate());
    case OpKind::kHeadRmsNorm:
      return kernels.call(reference::head_rms_norm, cpu::head_rms_norm, arguments.head_rms_norm());
    case OpKind::kRope:
      return kernels.call(reference::rope, cpu::rope, arguments.rope());
    case OpKind::kKvWrite:
      return kernels.call(reference::kv_write, cpu::kv_write, arguments.kv_write());
    case OpKind::kAttention:
      return kernels.call(reference::paged_attention, cpu::paged_attention, arguments.attention());
    case OpKind::kSigmoidMultiply:
      return kernels.call(reference::sigmoid_multiply, cpu::sigmoid_multiply, arguments.sigmoid_multiply());
    case OpKind::kCausalConv:
      return kernels.call(reference::causal_conv, cpu::causal_conv, arguments.causal_conv());
    case OpKind::kGdnGates:
      return kernels.call(reference::gdn_gates, cpu::gdn_gates, arguments.gdn_gates());
    case OpKind::kGdnL2Norm:
      return kernels.call(reference::gdn_l2_norm, cpu::gdn_l2_norm, arguments.gdn_l2_norm());
    case OpKind::kGatedDeltaRule:
      return kernels.call(reference::gated_delta_rule, cpu::gated_delta_rule, arguments.gated_delta_rule());
    case OpKind::kGatedRmsNorm:
      return kernels.call(reference::gated_rms_norm, cpu::gated_rms_norm, arguments.gated_rms_norm());
    case OpKind::kSwiGlu:
      return kernels.call(reference::swiglu, cpu::swiglu, arguments.swiglu());
    case OpKind::kRouter:
      return kernels.call(reference::moe_router, cpu::moe_router, arguments.router());
    case OpKind::kExperts:
      return kernels.call(reference::moe_experts, cpu::moe_experts, arguments.experts());
    case OpKind::kScaleRowsBySigmoid:
      return kernels.call(reference::scale_rows_by_sigmoid, cpu::scale_rows_by_sigmoid,
                          arguments.scale_rows_by_sigmoid());
    case OpKind::kAdd:
      return kernels.call(reference::add, cpu::add, arguments.add());
    case OpKind::kGatherRows:
      return kernels.call(reference::gather_rows, cpu::gather_rows, arguments.gather_rows());
    case OpKind::kAttentionPrepare:
      return kernels.call(reference::attention_prepare, cpu::attention_prepare, arguments.attention_prepare());
    case OpKind::kGdnMixer:
      return kernels.call(reference::gdn_mixer, cpu::gdn_mixer, arguments.gdn_mixer());
    case OpKind::kSharedExpertCombine:
      return kernels.call(reference::shared_expert_combine, cpu::shared_expert_combine,
                          arguments.shared_expert_combine());
    case OpKind::kAllReduce:
    case OpKind::kAllGather:
    case OpKind::kReduceScatter:
    case OpKind::kAllReduceRmsNorm:
      return;
  }
}

}  // namespace

CpuProgram::CpuProgram(compile::Program program, const CpuWeights& weights) : program_(std::move(program)) {
  for (const compile::ProgramWeight& weight : program_.weights) weights_.push_back(weights.at(weight.name));
}

int64_t CpuProgram::workspace_bytes() const {
  int64_t bytes = 0;
  for (const Operation& op : program_.operations) {
    const compile::Attributes& a = op.attributes;
    if (op.kind == OpKind::kLinear) {
      const compile::ProgramValue& x = program_.values[op.inputs[0]];
      const int64_t rows = x.rows == RowSymbol::kTokens ? program_.tokens : program_.logit_rows;
      bytes = std::max(bytes, kernels::linear_workspace_bytes(rows, x.columns, x.dtype, a.fused_norm));
    } else if (op.kind == OpKind::kExperts) {
      bytes = std::max(bytes, kernels::moe_experts_workspace_bytes(program_.tokens, a.experts, a.top_k,
                                                                   program_.hidden_size, a.width));
    } else if (op.kind == OpKind::kGdnMixer) {
      bytes = std::max(bytes, kernels::gdn_mixer_workspace_bytes(gdn_shape(op), program_.tokens));
    }
  }
  return bytes;
}

void CpuProgram::run_operation(const CpuRank& rank, const CpuStep& step, size_t index) const {
  const OperationMemory memory = {program_,    weights_,       rank.arena,  rank.workspace,   *rank.caches,
                                  *step.batch, step.token_ids, step.wanted, step.wanted_count};
  const Operation& op = program_.operations[index];
  if (!step.seconds) return execute(op, OperationArguments(memory, op), Kernels(rank));
  const auto start = std::chrono::steady_clock::now();
  execute(op, OperationArguments(memory, op), Kernels(rank));
  step.seconds[index] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void CpuProgram::run_body(const CpuRank& rank, const CpuStep& step) const {
  for (size_t i = 0; i < static_cast<size_t>(program_.head_begin); ++i) run_operation(rank, step, i);
}

void CpuProgram::run_head(const CpuRank& rank, const CpuStep& step) const {
  for (size_t i = program_.head_begin; i < program_.operations.size(); ++i) run_operation(rank, step, i);
}

kernels::Rows CpuProgram::rows(const CpuRank& rank, int32_t value, int64_t row) const {
  return value_rows(program_, rank.arena, value, row);
}

}  // namespace tokenspeed::runtime
