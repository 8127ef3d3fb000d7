#include "runtime/cpu_execute.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/gated_delta_net.h"
#include "kernels/linear.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"

namespace tokenspeed::runtime {
namespace {

using compile::Operation;
using compile::OpKind;
using compile::RowSymbol;
using kernels::Rows;
namespace cpu = kernels::cpu;
namespace reference = kernels::reference;

kernels::AttentionShape attention_shape(const Operation& op) {
  const compile::Attributes& a = op.attributes;
  return {a.query_heads, a.kv_heads, a.head_dim, a.rotary_dim, a.rope_theta};
}

kernels::GdnShape gdn_shape(const Operation& op) {
  const compile::Attributes& a = op.attributes;
  return {a.key_heads, a.value_heads, a.key_dim, a.value_dim, a.conv_kernel};
}

// One operation of one step: its operands by position, and its call.
class Call {
 public:
  Call(const CpuProgram& program, const std::vector<CpuWeight>& weights, const CpuRank& rank, const CpuStep& step,
       const Operation& op)
      : program_(program), weights_(weights), rank_(rank), step_(step), op_(op) {}

  void execute() const {
    switch (op_.kind) {
      case OpKind::kEmbedding:
        return embedding();
      case OpKind::kRmsNorm:
        return rms_norm();
      case OpKind::kLinear:
        return linear();
      case OpKind::kSplitQueryGate:
        return split_query_gate();
      case OpKind::kHeadRmsNorm:
        return head_rms_norm();
      case OpKind::kRope:
        return rope();
      case OpKind::kKvWrite:
        return kv_write();
      case OpKind::kAttention:
        return attention();
      case OpKind::kSigmoidMultiply:
        return sigmoid_multiply();
      case OpKind::kCausalConv:
        return causal_conv();
      case OpKind::kGdnGates:
        return gdn_gates();
      case OpKind::kGdnL2Norm:
        return gdn_l2_norm();
      case OpKind::kGatedDeltaRule:
        return gated_delta_rule();
      case OpKind::kGatedRmsNorm:
        return gated_rms_norm();
      case OpKind::kSwiGlu:
        return swiglu();
      case OpKind::kRouter:
        return router();
      case OpKind::kExperts:
        return experts();
      case OpKind::kScaleRowsBySigmoid:
        return scale_rows_by_sigmoid();
      case OpKind::kAdd:
        return add();
      case OpKind::kGatherRows:
        return gather_rows();
      case OpKind::kAttentionPrepare:
        return attention_prepare();
      case OpKind::kGdnMixer:
        return gdn_mixer();
      case OpKind::kSharedExpertCombine:
        return shared_expert_combine();
      case OpKind::kAllReduce:
      case OpKind::kAllGather:
      case OpKind::kReduceScatter:
      case OpKind::kAllReduceRmsNorm:
        return;
    }
  }

 private:
  template <typename Args>
  void call(void (*plain)(const Args&), void (*fast)(const Args&, ThreadPool&), const Args& args) const {
    if (rank_.reference_kernels) {
      plain(args);
    } else {
      fast(args, *rank_.pool);
    }
  }

  int64_t tokens() const { return step_.batch->tokens; }
  int64_t row_count() const {
    const compile::ProgramValue& out = program_.program().values[op_.outputs[0]];
    return out.rows == RowSymbol::kTokens ? tokens() : step_.wanted_count;
  }
  int64_t columns(int32_t value) const { return program_.program().values[value].columns; }
  Rows in(size_t i) const { return program_.rows(rank_, op_.inputs[i]); }
  Rows out(size_t i = 0) const { return program_.rows(rank_, op_.outputs[i]); }
  const CpuWeight& weight(size_t i) const { return weights_[op_.weights[i]]; }
  const float* vector(size_t i) const { return weight(i).vector(); }
  const kernels::KvPages& pages() const { return rank_.caches->kv(op_.attributes.kv_layer); }
  const kernels::GdnState& state() const { return rank_.caches->state(op_.attributes.state_layer); }

  void embedding() const {
    call(reference::embedding, cpu::embedding, {tokens(), step_.token_ids, weight(0).matrix, out()});
  }

  void rms_norm() const {
    kernels::RmsNorm args{.rows = tokens(),
                          .columns = columns(op_.outputs[0]),
                          .x = in(0),
                          .weight = vector(0),
                          .epsilon = op_.attributes.epsilon,
                          .out = out()};
    if (op_.inputs.size() > 1) args.add = in(1);
    call(reference::rms_norm, cpu::rms_norm, args);
  }

  void linear() const {
    kernels::Linear args{.rows = row_count(), .x = in(0), .weight = weight(0).matrix, .y = out()};
    if (op_.attributes.fused_norm) {
      args.norm_weight = vector(1);
      args.norm_epsilon = op_.attributes.epsilon;
      args.workspace = rank_.workspace;
    }
    call(reference::linear, cpu::linear, args);
  }

  void split_query_gate() const {
    call(reference::split_query_gate, cpu::split_query_gate, {attention_shape(op_), tokens(), in(0), out(0), out(1)});
  }

  void head_rms_norm() const {
    const compile::Attributes& a = op_.attributes;
    call(reference::head_rms_norm, cpu::head_rms_norm,
         {tokens(), a.heads, a.head_dim, a.head_dim, in(0), vector(0), a.epsilon});
  }

  void rope() const {
    call(reference::rope, cpu::rope,
         {attention_shape(op_), op_.attributes.heads, tokens(), step_.batch->position, in(0)});
  }

  void kv_write() const {
    call(reference::kv_write, cpu::kv_write, {attention_shape(op_), *step_.batch, pages(), in(0), in(1)});
  }

  void attention() const {
    kernels::PagedAttention args{
        .shape = attention_shape(op_), .batch = *step_.batch, .pages = pages(), .query = in(0), .out = out()};
    if (op_.inputs.size() > 1) {
      // Each head's gate follows its query in the projection's output.
      args.gate = in(1);
      args.gate.data = static_cast<std::byte*>(args.gate.data) +
                       op_.attributes.head_dim * static_cast<int64_t>(dtype_size(args.gate.dtype));
      args.gate_head_stride = 2 * op_.attributes.head_dim;
    }
    call(reference::paged_attention, cpu::paged_attention, args);
  }

  void sigmoid_multiply() const {
    call(reference::sigmoid_multiply, cpu::sigmoid_multiply, {tokens(), columns(op_.outputs[0]), in(0), in(1), out()});
  }

  void causal_conv() const {
    call(reference::causal_conv, cpu::causal_conv, {gdn_shape(op_), *step_.batch, state(), in(0), vector(0), out()});
  }

  void gdn_gates() const {
    call(reference::gdn_gates, cpu::gdn_gates,
         {tokens(), op_.attributes.value_heads, in(0), in(1), vector(0), vector(1), static_cast<float*>(out(0).data),
          static_cast<float*>(out(1).data)});
  }

  void gdn_l2_norm() const { call(reference::gdn_l2_norm, cpu::gdn_l2_norm, {gdn_shape(op_), tokens(), in(0)}); }

  void gated_delta_rule() const {
    call(reference::gated_delta_rule, cpu::gated_delta_rule,
         {gdn_shape(op_), *step_.batch, state(), in(0), static_cast<const float*>(in(1).data),
          static_cast<const float*>(in(2).data), out()});
  }

  void gated_rms_norm() const {
    const int64_t width = weight(0).matrix.n;
    call(reference::gated_rms_norm, cpu::gated_rms_norm,
         {tokens(), columns(op_.outputs[0]) / width, width, in(0), in(1), vector(0), op_.attributes.epsilon, out()});
  }

  void swiglu() const { call(reference::swiglu, cpu::swiglu, {tokens(), columns(op_.outputs[0]), in(0), out()}); }

  void router() const {
    const compile::Attributes& a = op_.attributes;
    call(reference::moe_router, cpu::moe_router,
         {tokens(), a.experts, a.top_k, a.normalize_top_k, static_cast<const float*>(in(0).data),
          static_cast<int32_t*>(out(0).data), static_cast<float*>(out(1).data)});
  }

  void experts() const {
    const compile::Attributes& a = op_.attributes;
    call(reference::moe_experts, cpu::moe_experts,
         {.rows = tokens(),
          .experts = a.experts,
          .top_k = a.top_k,
          .hidden = columns(op_.outputs[0]),
          .width = a.width,
          .x = in(0),
          .gate_up = weight(0).matrix,
          .gate_up_stride = weight(0).matrix_stride,
          .down = weight(1).matrix,
          .down_stride = weight(1).matrix_stride,
          .expert_ids = static_cast<const int32_t*>(in(1).data),
          .expert_weights = static_cast<const float*>(in(2).data),
          .y = out(),
          .workspace = rank_.workspace});
  }

  void scale_rows_by_sigmoid() const {
    call(reference::scale_rows_by_sigmoid, cpu::scale_rows_by_sigmoid,
         {tokens(), columns(op_.outputs[0]), in(0), in(1)});
  }

  void add() const { call(reference::add, cpu::add, {tokens(), columns(op_.outputs[0]), in(0), in(1), out()}); }

  void gather_rows() const {
    call(reference::gather_rows, cpu::gather_rows,
         {step_.wanted_count, columns(op_.outputs[0]), step_.wanted, in(0), out()});
  }

  void attention_prepare() const {
    call(reference::attention_prepare, cpu::attention_prepare,
         {attention_shape(op_), *step_.batch, pages(), in(0), in(1), in(2), vector(0), vector(1),
          op_.attributes.epsilon, out()});
  }

  void gdn_mixer() const {
    call(reference::gdn_mixer, cpu::gdn_mixer,
         {gdn_shape(op_), *step_.batch, state(), in(0), in(1), in(2), in(3), vector(0), vector(1), vector(2), vector(3),
          op_.attributes.epsilon, out(), rank_.workspace});
  }

  void shared_expert_combine() const {
    call(reference::shared_expert_combine, cpu::shared_expert_combine,
         {.rows = tokens(),
          .hidden = columns(op_.outputs[0]),
          .x = in(0),
          .gate_weight = vector(0),
          .shared = in(1),
          .routed = in(2),
          .y = out()});
  }

  const CpuProgram& program_;
  const std::vector<CpuWeight>& weights_;
  const CpuRank& rank_;
  const CpuStep& step_;
  const Operation& op_;
};

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
  Call(*this, weights_, rank, step, program_.operations[index]).execute();
}

void CpuProgram::run_body(const CpuRank& rank, const CpuStep& step) const {
  for (size_t i = 0; i < static_cast<size_t>(program_.head_begin); ++i) run_operation(rank, step, i);
}

void CpuProgram::run_head(const CpuRank& rank, const CpuStep& step) const {
  for (size_t i = program_.head_begin; i < program_.operations.size(); ++i) run_operation(rank, step, i);
}

Rows CpuProgram::rows(const CpuRank& rank, int32_t value, int64_t row) const {
  const compile::ProgramValue& at = program_.values[value];
  const int64_t begin = at.offset + row * at.stride * static_cast<int64_t>(dtype_size(at.dtype));
  return {rank.arena + begin, at.dtype, at.stride};
}

}  // namespace tokenspeed::runtime
