// From an operation of a Program to the argument structs of its kernel: which operand is which, for every device.
#pragma once

#include <span>

#include "compile/program.h"
#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/gated_delta_net.h"
#include "kernels/linear.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"
#include "kernels/types.h"
#include "runtime/caches.h"
#include "runtime/loaded_weight.h"

namespace tokenspeed::runtime {

kernels::AttentionShape attention_shape(const compile::Operation& op);
kernels::GdnShape gdn_shape(const compile::Operation& op);
// Row `row` of a value in an arena.
kernels::Rows value_rows(const compile::Program& program, std::byte* arena, int32_t value, int64_t row = 0);

// What the operations of a step work on. All pointers are memory of the device.
struct OperationMemory {
  const compile::Program& program;
  std::span<const LoadedWeight> weights;  // by the Program's index
  std::byte* arena;
  void* workspace;
  const CacheLayers& caches;
  const kernels::SequenceBatch& batch;
  const int32_t* token_ids;  // [T]
  const int32_t* wanted;     // rows whose logits the head computes
  int32_t wanted_count;
};

// Refers to its arguments. One function per kind of operation.
class OperationArguments {
 public:
  OperationArguments(const OperationMemory& memory, const compile::Operation& op) : memory_(memory), op_(op) {}

  kernels::Embedding embedding() const;
  kernels::RmsNorm rms_norm() const;
  kernels::Linear linear() const;
  kernels::SplitQueryGate split_query_gate() const;
  kernels::HeadRmsNorm head_rms_norm() const;
  kernels::Rope rope() const;
  kernels::KvWrite kv_write() const;
  kernels::PagedAttention attention() const;
  kernels::SigmoidMultiply sigmoid_multiply() const;
  kernels::CausalConv causal_conv() const;
  kernels::GdnGates gdn_gates() const;
  kernels::GdnL2Norm gdn_l2_norm() const;
  kernels::GatedDeltaRule gated_delta_rule() const;
  kernels::GatedRmsNorm gated_rms_norm() const;
  kernels::SwiGlu swiglu() const;
  kernels::MoeRouter router() const;
  kernels::MoeExperts experts() const;
  kernels::ScaleRowsBySigmoid scale_rows_by_sigmoid() const;
  kernels::Add add() const;
  kernels::GatherRows gather_rows() const;
  kernels::AttentionPrepare attention_prepare() const;
  kernels::GdnMixer gdn_mixer() const;
  kernels::SharedExpertCombine shared_expert_combine() const;

 private:
  int64_t tokens() const { return memory_.batch.tokens; }
  int64_t row_count() const;
  int64_t columns(int32_t value) const { return memory_.program.values[value].columns; }
  int64_t out_columns() const { return columns(op_.outputs[0]); }
  kernels::Rows in(size_t i) const { return value_rows(memory_.program, memory_.arena, op_.inputs[i]); }
  kernels::Rows out(size_t i = 0) const { return value_rows(memory_.program, memory_.arena, op_.outputs[i]); }
  const LoadedWeight& weight(size_t i) const { return memory_.weights[op_.weights[i]]; }
  const float* vector(size_t i) const { return weight(i).vector(); }
  const kernels::KvPages& pages() const { return memory_.caches.kv(op_.attributes.kv_layer); }
  const kernels::GdnState& state() const { return memory_.caches.state(op_.attributes.state_layer); }

  const OperationMemory& memory_;
  const compile::Operation& op_;
};

}  // namespace tokenspeed::runtime
