// Everything between the input projections and the output projection of a Gated DeltaNet layer becomes one operation.
#include "compile/passes/editor.h"
#include "compile/passes/pass.h"

namespace tokenspeed::compile {

void fuse_gdn_mixer(Graph* graph) {
  GraphEditor editor(graph);
  auto& nodes = graph->nodes;
  for (int32_t i = 0; i < editor.count(); ++i) {
    if (nodes[i].kind != OpKind::kGatedRmsNorm) continue;
    const int32_t rule = editor.producer_of_kind(nodes[i].inputs[0], OpKind::kGatedDeltaRule);
    if (rule == kNone || editor.only_consumer_of_kind(nodes[rule].outputs[0], OpKind::kGatedRmsNorm) != i) continue;
    const int32_t l2_norm = editor.producer_of_kind(nodes[rule].inputs[0], OpKind::kGdnL2Norm);
    const int32_t gates = editor.producer_of_kind(nodes[rule].inputs[1], OpKind::kGdnGates);
    if (l2_norm == kNone || gates == kNone) continue;
    const int32_t conv = editor.producer_of_kind(nodes[l2_norm].inputs[0], OpKind::kCausalConv);
    if (conv == kNone) continue;

    Node& mixer = nodes[i];
    mixer.kind = OpKind::kGdnMixer;
    mixer.name = "gdn_mixer";
    mixer.required = {nodes[conv].required[0], mixer.required[1], nodes[gates].required[0], nodes[gates].required[1]};
    mixer.inputs = {nodes[conv].inputs[0], mixer.inputs[1], nodes[gates].inputs[0], nodes[gates].inputs[1]};
    mixer.weights = {nodes[conv].weights[0], nodes[gates].weights[0], nodes[gates].weights[1], mixer.weights[0]};
    const float epsilon = mixer.attributes.epsilon;
    mixer.attributes = nodes[rule].attributes;
    mixer.attributes.epsilon = epsilon;
    for (int32_t node : {conv, gates, l2_norm, rule}) editor.remove(node);
  }
}

}  // namespace tokenspeed::compile
