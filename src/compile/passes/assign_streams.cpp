// The shared expert runs beside the router and the routed experts: stream 1 from the block's normalised input up to the
// node that joins both.
#include "compile/passes/editor.h"
#include "compile/passes/pass.h"

namespace tokenspeed::compile {
namespace {

// Marks the nodes that lead to `value` on stream 1, back to the first value that others read as well.
void mark(Graph* graph, const GraphEditor& editor, ValueId value) {
  const int32_t node = editor.producer(value);
  if (node == kNone || editor.consumers(value).size() != 1) return;
  graph->nodes[node].stream = 1;
  for (ValueId input : graph->nodes[node].inputs) mark(graph, editor, input);
}

}  // namespace

void assign_streams(Graph* graph) {
  GraphEditor editor(graph);
  for (int32_t i = 0; i < editor.count(); ++i) {
    const Node& node = graph->nodes[i];
    const bool adds_shared_expert =
        node.kind == OpKind::kSharedExpertCombine ||
        (node.kind == OpKind::kAdd && editor.producer_of_kind(node.inputs[1], OpKind::kScaleRowsBySigmoid) != kNone);
    if (adds_shared_expert) mark(graph, editor, node.inputs[1]);
  }
}

}  // namespace tokenspeed::compile
