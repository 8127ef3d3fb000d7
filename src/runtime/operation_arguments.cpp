#include "runtime/operation_arguments.h"

namespace tokenspeed::runtime {

using compile::Attributes;
using compile::Operation;
using kernels::Rows;

kernels::AttentionShape attention_shape(const Operation& op) {
  const Attributes& a = op.attributes;
  return {a.query_heads, a.kv_heads, a.head_dim, a.rotary_dim, a.rope_theta};
}

kernels::GdnShape gdn_shape(const Operation& op) {
  const Attributes& a = op.attributes;
  return {a.key_heads, a.value_heads, a.key_dim, a.value_dim, a.conv_kernel};
}

Rows value_rows(const compile::Program& program, std::byte* arena, int32_t value, int64_t row) {
  const compile::ProgramValue& at = program.values[value];
  return {arena + at.offset + row * at.stride * static_cast<int64_t>(dtype_size(at.dtype)), at.dtype, at.stride};
}

int64_t OperationArguments::row_count() const {
  return memory_.program.values[op_.outputs[0]].rows == compile::RowSymbol::kTokens ? tokens() : memory_.wanted_count;
}

kernels::Embedding OperationArguments::embedding() const {
  return {tokens(), memory_.token_ids, weight(0).matrix, out()};
}

kernels::RmsNorm OperationArguments::rms_norm() const {
  kernels::RmsNorm args{.rows = tokens(),
                        .columns = out_columns(),
                        .x = in(0),
                        .weight = vector(0),
                        .epsilon = op_.attributes.epsilon,
                        .out = out()};
  if (op_.inputs.size() > 1) args.add = in(1);
  return args;
}

kernels::Linear OperationArguments::linear() const {
  kernels::Linear args{.rows = row_count(), .x = in(0), .weight = weight(0).matrix, .y = out()};
  if (op_.attributes.fused_norm) {
    args.norm_weight = vector(1);
    args.norm_epsilon = op_.attributes.epsilon;
  }
  args.workspace = memory_.workspace;
  return args;
}

kernels::SplitQueryGate OperationArguments::split_query_gate() const {
  return {attention_shape(op_), tokens(), in(0), out(0), out(1)};
}

kernels::HeadRmsNorm OperationArguments::head_rms_norm() const {
  const Attributes& a = op_.attributes;
  return {tokens(), a.heads, a.head_dim, a.head_dim, in(0), vector(0), a.epsilon};
}

kernels::Rope OperationArguments::rope() const {
  return {attention_shape(op_), op_.attributes.heads, tokens(), memory_.batch.position, in(0)};
}

kernels::KvWrite OperationArguments::kv_write() const {
  return {attention_shape(op_), memory_.batch, pages(), in(0), in(1)};
}

kernels::PagedAttention OperationArguments::attention() const {
  kernels::PagedAttention args{
      .shape = attention_shape(op_), .batch = memory_.batch, .pages = pages(), .query = in(0), .out = out()};
  if (op_.inputs.size() > 1) {
    // Each head's gate follows its query in the projection's output.
    args.gate = in(1);
    args.gate.data = static_cast<std::byte*>(args.gate.data) +
                     op_.attributes.head_dim * static_cast<int64_t>(dtype_size(args.gate.dtype));
    args.gate_head_stride = 2 * op_.attributes.head_dim;
  }
  return args;
}

kernels::SigmoidMultiply OperationArguments::sigmoid_multiply() const {
  return {tokens(), out_columns(), in(0), in(1), out()};
}

kernels::CausalConv OperationArguments::causal_conv() const {
  return {gdn_shape(op_), memory_.batch, state(), in(0), vector(0), out()};
}

kernels::GdnGates OperationArguments::gdn_gates() const {
  return {tokens(),
          op_.attributes.value_heads,
          in(0),
          in(1),
          vector(0),
          vector(1),
          static_cast<float*>(out(0).data),
          static_cast<float*>(out(1).data)};
}

kernels::GdnL2Norm OperationArguments::gdn_l2_norm() const { return {gdn_shape(op_), tokens(), in(0)}; }

kernels::GatedDeltaRule OperationArguments::gated_delta_rule() const {
  return {gdn_shape(op_),
          memory_.batch,
          state(),
          in(0),
          static_cast<const float*>(in(1).data),
          static_cast<const float*>(in(2).data),
          out()};
}

kernels::GatedRmsNorm OperationArguments::gated_rms_norm() const {
  const int64_t width = weight(0).matrix.n;
  return {tokens(), out_columns() / width, width, in(0), in(1), vector(0), op_.attributes.epsilon, out()};
}

kernels::SwiGlu OperationArguments::swiglu() const { return {tokens(), out_columns(), in(0), out()}; }

kernels::MoeRouter OperationArguments::router() const {
  const Attributes& a = op_.attributes;
  return {tokens(),
          a.experts,
          a.top_k,
          a.normalize_top_k,
          static_cast<const float*>(in(0).data),
          static_cast<int32_t*>(out(0).data),
          static_cast<float*>(out(1).data)};
}

kernels::MoeExperts OperationArguments::experts() const {
  const Attributes& a = op_.attributes;
  return {.rows = tokens(),
          .experts = a.experts,
          .top_k = a.top_k,
          .hidden = out_columns(),
          .width = a.width,
          .x = in(0),
          .gate_up = weight(0).matrix,
          .gate_up_stride = weight(0).matrix_stride,
          .down = weight(1).matrix,
          .down_stride = weight(1).matrix_stride,
          .expert_ids = static_cast<const int32_t*>(in(1).data),
          .expert_weights = static_cast<const float*>(in(2).data),
          .y = out(),
          .workspace = memory_.workspace};
}

kernels::ScaleRowsBySigmoid OperationArguments::scale_rows_by_sigmoid() const {
  return {tokens(), out_columns(), in(0), in(1)};
}

kernels::Add OperationArguments::add() const { return {tokens(), out_columns(), in(0), in(1), out()}; }

kernels::GatherRows OperationArguments::gather_rows() const {
  return {memory_.wanted_count, out_columns(), memory_.wanted, in(0), out()};
}

kernels::AttentionPrepare OperationArguments::attention_prepare() const {
  return {attention_shape(op_),   memory_.batch, pages(), in(0), in(1), in(2), vector(0), vector(1),
          op_.attributes.epsilon, out()};
}

kernels::GdnMixer OperationArguments::gdn_mixer() const {
  return {gdn_shape(op_), memory_.batch,    state(),   in(0),     in(1),     in(2),
          in(3),          vector(0),        vector(1), vector(2), vector(3), op_.attributes.epsilon,
          out(),          memory_.workspace};
}

kernels::SharedExpertCombine OperationArguments::shared_expert_combine() const {
  return {.rows = tokens(),
          .hidden = out_columns(),
          .x = in(0),
          .gate_weight = vector(0),
          .shared = in(1),
          .routed = in(2),
          .y = out()};
}

}  // namespace tokenspeed::runtime
