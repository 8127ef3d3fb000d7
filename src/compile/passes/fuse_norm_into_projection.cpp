// A norm whose result only one projection reads becomes that projection's prologue.
#include "compile/passes/editor.h"
#include "compile/passes/pass.h"

namespace tokenspeed::compile {

void fuse_norm_into_projection(Graph* graph) {
  GraphEditor editor(graph);
  auto& nodes = graph->nodes;
  for (int32_t i = 0; i < editor.count(); ++i) {
    const Node& norm = nodes[i];
    if (norm.kind != OpKind::kRmsNorm || norm.inputs.size() != 1) continue;
    const ValueId normed = norm.outputs[0];
    if (graph->values[normed].parent != kNone) continue;  // part of a wider row that others fill too
    const int32_t user = editor.only_consumer_of_kind(normed, OpKind::kLinear);
    if (user == kNone || nodes[user].attributes.fused_norm) continue;
    Node& linear = nodes[user];
    linear.inputs = norm.inputs;
    linear.required = norm.required;
    linear.weights.push_back(norm.weights[0]);
    linear.attributes.fused_norm = true;
    linear.attributes.epsilon = norm.attributes.epsilon;
    linear.name = "norm+" + linear.name;
    editor.remove(i);
  }
}

}  // namespace tokenspeed::compile
