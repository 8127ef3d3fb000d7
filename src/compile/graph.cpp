#include "compile/graph.h"

#include <utility>

namespace tokenspeed::compile {

std::string_view op_kind_name(OpKind kind) {
  switch (kind) {
    case OpKind::kEmbedding:
      return "embedding";
    case OpKind::kRmsNorm:
      return "rms_norm";
    case OpKind::kLinear:
      return "linear";
    case OpKind::kSplitQueryGate:
      return "split_query_gate";
    case OpKind::kHeadRmsNorm:
      return "head_rms_norm";
    case OpKind::kRope:
      return "rope";
    case OpKind::kKvWrite:
      return "kv_write";
    case OpKind::kAttention:
      return "attention";
    case OpKind::kSigmoidMultiply:
      return "sigmoid_multiply";
    case OpKind::kCausalConv:
      return "causal_conv";
    case OpKind::kGdnGates:
      return "gdn_gates";
    case OpKind::kGdnL2Norm:
      return "gdn_l2_norm";
    case OpKind::kGatedDeltaRule:
      return "gated_delta_rule";
    case OpKind::kGatedRmsNorm:
      return "gated_rms_norm";
    case OpKind::kSwiGlu:
      return "swiglu";
    case OpKind::kRouter:
      return "router";
    case OpKind::kExperts:
      return "experts";
    case OpKind::kScaleRowsBySigmoid:
      return "scale_rows_by_sigmoid";
    case OpKind::kAdd:
      return "add";
    case OpKind::kGatherRows:
      return "gather_rows";
    case OpKind::kAllReduce:
      return "all_reduce";
    case OpKind::kAllGather:
      return "all_gather";
    case OpKind::kReduceScatter:
      return "reduce_scatter";
    case OpKind::kAttentionPrepare:
      return "attention_prepare";
    case OpKind::kGdnMixer:
      return "gdn_mixer";
    case OpKind::kSharedExpertCombine:
      return "shared_expert_combine";
    case OpKind::kAllReduceRmsNorm:
      return "all_reduce_rms_norm";
  }
  return "?";
}

bool is_collective(OpKind kind) {
  return kind == OpKind::kAllReduce || kind == OpKind::kAllGather || kind == OpKind::kReduceScatter ||
         kind == OpKind::kAllReduceRmsNorm;
}

std::string_view axis_name(Axis axis) {
  switch (axis) {
    case Axis::kTensor:
      return "tp";
    case Axis::kExpert:
      return "ep";
    case Axis::kData:
      return "dp";
  }
  return "?";
}

ValueId Graph::add_value(Value value) {
  values.push_back(std::move(value));
  return static_cast<ValueId>(values.size()) - 1;
}

WeightId Graph::add_weight(Weight weight) {
  weights.push_back(std::move(weight));
  return static_cast<WeightId>(weights.size()) - 1;
}

ValueId Graph::root(ValueId id) const {
  while (values[id].parent != kNone) id = values[id].parent;
  return id;
}

}  // namespace tokenspeed::compile
