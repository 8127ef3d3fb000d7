// The shared expert's gate projection, sigmoid, multiplication and the addition to the routed experts become one
// operation that takes the gate's weight as a vector.
#include "compile/passes/editor.h"
#include "compile/passes/pass.h"

namespace tokenspeed::compile {

void fuse_shared_expert(Graph* graph) {
  GraphEditor editor(graph);
  auto& nodes = graph->nodes;
  for (int32_t i = 0; i < editor.count(); ++i) {
    if (nodes[i].kind != OpKind::kAdd) continue;
    const int32_t scale = editor.producer_of_kind(nodes[i].inputs[1], OpKind::kScaleRowsBySigmoid);
    if (scale == kNone || editor.only_consumer_of_kind(nodes[scale].outputs[0], OpKind::kAdd) != i) continue;
    const int32_t gate = editor.producer_of_kind(nodes[scale].inputs[0], OpKind::kLinear);
    if (gate == kNone || editor.only_consumer_of_kind(nodes[gate].outputs[0], OpKind::kScaleRowsBySigmoid) != scale)
      continue;
    Weight& weight = graph->weights[nodes[gate].weights[0]];
    if (weight.parts.size() != 1 || weight.parts[0].rows != 1) continue;

    weight.form = WeightForm::kVector;
    Node& combine = nodes[i];
    combine.kind = OpKind::kSharedExpertCombine;
    combine.name = "shared_expert_combine";
    combine.required = {nodes[gate].required[0], nodes[scale].required[1], combine.required[0]};
    combine.inputs = {nodes[gate].inputs[0], nodes[scale].inputs[1], combine.inputs[0]};
    combine.weights = nodes[gate].weights;
    for (int32_t node : {scale, gate}) editor.remove(node);
  }
}

}  // namespace tokenspeed::compile
