#include "runtime/cuda/cuda_call.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/gated_delta_net.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mlp.h"
#include "kernels/cuda/norm.h"

namespace tokenspeed::runtime {
namespace {

using compile::Operation;
using compile::OpKind;
using compile::RowSymbol;
using kernels::Rows;
namespace cuda = kernels::cuda;

class Call {
 public:
  Call(const CudaProgram& program, const CudaRank& rank, const CudaStep& step, const Operation& op)
      : program_(program), rank_(rank), step_(step), op_(op), stream_(rank.streams[op.stream]) {}

  Status execute() const {
    switch (op_.kind) {
      case OpKind::kEmbedding:
        embedding();
        break;
      case OpKind::kRmsNorm:
      case OpKind::kAllReduceRmsNorm:
        rms_norm();
        break;
      case OpKind::kLinear:
        return linear();
      case OpKind::kSplitQueryGate:
        cuda::split_query_gate({attention_shape(op_), tokens(), in(0), out(0), out(1)}, stream_);
        break;
      case OpKind::kHeadRmsNorm:
        head_rms_norm();
        break;
      case OpKind::kRope:
        cuda::rope({attention_shape(op_), op_.attributes.heads, tokens(), step_.batch.position, in(0)}, stream_);
        break;
      case OpKind::kKvWrite:
        cuda::kv_write({attention_shape(op_), step_.batch, pages(), in(0), in(1)}, stream_);
        break;
      case OpKind::kAttention:
        attention();
        break;
      case OpKind::kSigmoidMultiply:
        cuda::sigmoid_multiply({tokens(), columns(op_.outputs[0]), in(0), in(1), out()}, stream_);
        break;
      case OpKind::kCausalConv:
        cuda::causal_conv({gdn_shape(op_), step_.batch, state(), in(0), vector(0), out()}, stream_);
        break;
      case OpKind::kGdnGates:
        gdn_gates();
        break;
      case OpKind::kGdnL2Norm:
        cuda::gdn_l2_norm({gdn_shape(op_), tokens(), in(0)}, stream_);
        break;
      case OpKind::kGatedDeltaRule:
        gated_delta_rule();
        break;
      case OpKind::kGatedRmsNorm:
        gated_rms_norm();
        break;
      case OpKind::kSwiGlu:
        cuda::swiglu({tokens(), columns(op_.outputs[0]), in(0), out()}, stream_);
        break;
      case OpKind::kRouter:
        router();
        break;
      case OpKind::kExperts:
        experts();
        break;
      case OpKind::kScaleRowsBySigmoid:
        cuda::scale_rows_by_sigmoid({tokens(), columns(op_.outputs[0]), in(0), in(1)}, stream_);
        break;
      case OpKind::kAdd:
        cuda::add({tokens(), columns(op_.outputs[0]), in(0), in(1), out()}, stream_);
        break;
      case OpKind::kGatherRows:
        cuda::gather_rows({step_.wanted_count, columns(op_.outputs[0]), step_.wanted, in(0), out()}, stream_);
        break;
      case OpKind::kAttentionPrepare:
        attention_prepare();
        break;
      case OpKind::kGdnMixer:
        gdn_mixer();
        break;
      case OpKind::kSharedExpertCombine:
        shared_expert_combine();
        break;
      case OpKind::kAllReduce:
        break;
      case OpKind::kAllGather:
      case OpKind::kReduceScatter:
        return copy_share();
    }
    return cuda_check(cudaPeekAtLastError(), "launching the kernel");
  }

 private:
  int64_t tokens() const { return step_.batch.tokens; }
  int64_t row_count(int32_t value) const {
    return program_.program().values[value].rows == RowSymbol::kTokens ? tokens() : step_.wanted_count;
  }
  int64_t columns(int32_t value) const { return program_.program().values[value].columns; }
  Rows in(size_t i) const { return program_.rows(rank_, op_.inputs[i]); }
  Rows out(size_t i = 0) const { return program_.rows(rank_, op_.outputs[i]); }
  const CudaWeight& weight(size_t i) const { return program_.weight(op_, i); }
  const float* vector(size_t i) const { return weight(i).vector(); }
  const kernels::KvPages& pages() const { return rank_.caches->kv(op_.attributes.kv_layer); }
  const kernels::GdnState& state() const { return rank_.caches->state(op_.attributes.state_layer); }
  void* workspace() const { return rank_.workspace[op_.stream]; }

  void embedding() const { cuda::embedding({tokens(), step_.token_ids, weight(0).matrix, out()}, stream_); }

  void rms_norm() const {
    kernels::RmsNorm args{.rows = tokens(),
                          .columns = columns(op_.outputs[0]),
                          .x = in(0),
                          .weight = vector(0),
                          .epsilon = op_.attributes.epsilon,
                          .out = out()};
    if (op_.inputs.size() > 1) args.add = in(1);
    cuda::rms_norm(args, stream_);
  }

  Status linear() const {
    kernels::Linear args{.rows = row_count(op_.outputs[0]), .x = in(0), .weight = weight(0).matrix, .y = out()};
    if (op_.attributes.fused_norm) {
      args.norm_weight = vector(1);
      args.norm_epsilon = op_.attributes.epsilon;
    }
    args.workspace = workspace();
    return cuda::linear(args, stream_);
  }

  void head_rms_norm() const {
    const compile::Attributes& a = op_.attributes;
    cuda::head_rms_norm({tokens(), a.heads, a.head_dim, a.head_dim, in(0), vector(0), a.epsilon}, stream_);
  }

  void attention() const {
    kernels::PagedAttention args{
        .shape = attention_shape(op_), .batch = step_.batch, .pages = pages(), .query = in(0), .out = out()};
    if (op_.inputs.size() > 1) {
      // Each head's gate follows its query in the projection's output.
      args.gate = in(1);
      args.gate.data = static_cast<BFloat16*>(args.gate.data) + op_.attributes.head_dim;
      args.gate_head_stride = 2 * op_.attributes.head_dim;
    }
    cuda::paged_attention(args, stream_);
  }

  void gdn_gates() const {
    cuda::gdn_gates({tokens(), op_.attributes.value_heads, in(0), in(1), vector(0), vector(1),
                     static_cast<float*>(out(0).data), static_cast<float*>(out(1).data)},
                    stream_);
  }

  void gated_delta_rule() const {
    cuda::gated_delta_rule({gdn_shape(op_), step_.batch, state(), in(0), static_cast<const float*>(in(1).data),
                            static_cast<const float*>(in(2).data), out()},
                           stream_);
  }

  void gated_rms_norm() const {
    const int64_t width = weight(0).matrix.n;
    cuda::gated_rms_norm(
        {tokens(), columns(op_.outputs[0]) / width, width, in(0), in(1), vector(0), op_.attributes.epsilon, out()},
        stream_);
  }

  void router() const {
    const compile::Attributes& a = op_.attributes;
    cuda::moe_router({tokens(), a.experts, a.top_k, a.normalize_top_k, static_cast<const float*>(in(0).data),
                      static_cast<int32_t*>(out(0).data), static_cast<float*>(out(1).data)},
                     stream_);
  }

  void experts() const {
    const compile::Attributes& a = op_.attributes;
    cuda::moe_experts({.rows = tokens(),
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
                       .workspace = workspace()},
                      stream_);
  }

  void attention_prepare() const {
    cuda::attention_prepare({attention_shape(op_), step_.batch, pages(), in(0), in(1), in(2), vector(0), vector(1),
                             op_.attributes.epsilon, out()},
                            stream_);
  }

  void gdn_mixer() const {
    cuda::gdn_mixer({gdn_shape(op_), step_.batch, state(), in(0), in(1), in(2), in(3), vector(0), vector(1), vector(2),
                     vector(3), op_.attributes.epsilon, out(), workspace()},
                    stream_);
  }

  void shared_expert_combine() const {
    cuda::shared_expert_combine({.rows = tokens(),
                                 .hidden = columns(op_.outputs[0]),
                                 .x = in(0),
                                 .gate_weight = vector(0),
                                 .shared = in(1),
                                 .routed = in(2),
                                 .y = out()},
                                stream_);
  }

  // A stand-in for a collective that gathers or scatters columns: the columns this rank has itself.
  Status copy_share() const {
    const Rows from = in(0);
    const Rows to = out();
    const int64_t element = static_cast<int64_t>(dtype_size(from.dtype));
    const int64_t width = std::min(columns(op_.inputs[0]), columns(op_.outputs[0]));
    return cuda_check(cudaMemcpy2DAsync(to.data, to.stride * element, from.data, from.stride * element, width * element,
                                        row_count(op_.outputs[0]), cudaMemcpyDeviceToDevice, stream_),
                      "copying");
  }

  const CudaProgram& program_;
  const CudaRank& rank_;
  const CudaStep& step_;
  const Operation& op_;
  const cudaStream_t stream_;
};

}  // namespace

kernels::AttentionShape attention_shape(const Operation& op) {
  const compile::Attributes& a = op.attributes;
  return {a.query_heads, a.kv_heads, a.head_dim, a.rotary_dim, a.rope_theta};
}

kernels::GdnShape gdn_shape(const Operation& op) {
  const compile::Attributes& a = op.attributes;
  return {a.key_heads, a.value_heads, a.key_dim, a.value_dim, a.conv_kernel};
}

Status call_operation(const CudaProgram& program, const CudaRank& rank, const CudaStep& step, int32_t index) {
  const Operation& op = program.program().operations[index];
  Status status = Call(program, rank, step, op).execute();
  if (status.ok()) return status;
  return std::move(status).with_context("operation " + std::to_string(index) + " '" + op.name + "' of layer " +
                                        std::to_string(op.layer));
}

}  // namespace tokenspeed::runtime
