// Gate split, q and k norm, both rotations and the KV write become one operation that reads the projections' output;
// the attention then reads the gate where the projection left it and multiplies by its sigmoid itself.
#include "compile/passes/editor.h"
#include "compile/passes/pass.h"

namespace tokenspeed::compile {
namespace {

struct Pattern {
  int32_t split, query_norm, key_norm, query_rope, key_rope, write, attention, multiply;
};

bool match(const Graph& graph, const GraphEditor& editor, int32_t multiply, Pattern* out) {
  const auto& nodes = graph.nodes;
  Pattern found = {};
  found.multiply = multiply;
  found.split = editor.producer_of_kind(nodes[multiply].inputs[1], OpKind::kSplitQueryGate);
  found.attention = editor.producer_of_kind(nodes[multiply].inputs[0], OpKind::kAttention);
  if (found.split == kNone || found.attention == kNone) return false;
  if (editor.only_consumer_of_kind(nodes[found.attention].outputs[0], OpKind::kSigmoidMultiply) != multiply)
    return false;
  if (editor.only_consumer_of_kind(nodes[found.split].outputs[1], OpKind::kSigmoidMultiply) != multiply) return false;
  found.query_rope = editor.producer_of_kind(nodes[found.attention].inputs[0], OpKind::kRope);
  if (found.query_rope == kNone) return false;
  found.query_norm = editor.producer_of_kind(nodes[found.query_rope].inputs[0], OpKind::kHeadRmsNorm);
  if (found.query_norm == kNone || nodes[found.query_norm].inputs[0] != nodes[found.split].outputs[0]) return false;
  // The KV write of the same layer stands before its attention.
  found.write = found.attention;
  while (found.write >= 0 && (editor.removed(found.write) || nodes[found.write].kind != OpKind::kKvWrite))
    --found.write;
  if (found.write < 0 || nodes[found.write].attributes.kv_layer != nodes[found.attention].attributes.kv_layer)
    return false;
  found.key_rope = editor.producer_of_kind(nodes[found.write].inputs[0], OpKind::kRope);
  if (found.key_rope == kNone) return false;
  found.key_norm = editor.producer_of_kind(nodes[found.key_rope].inputs[0], OpKind::kHeadRmsNorm);
  if (found.key_norm == kNone) return false;
  *out = found;
  return true;
}

void fuse(Graph* graph, const Pattern& p, GraphEditor* editor) {
  auto& nodes = graph->nodes;
  const ValueId q_gate = nodes[p.split].inputs[0];
  Node& prepare = nodes[p.write];
  prepare.kind = OpKind::kAttentionPrepare;
  prepare.name = "attention_prepare";
  prepare.required = {nodes[p.split].required[0], nodes[p.key_norm].required[0], prepare.required[1]};
  prepare.inputs = {q_gate, nodes[p.key_norm].inputs[0], prepare.inputs[1]};
  prepare.weights = {nodes[p.query_norm].weights[0], nodes[p.key_norm].weights[0]};
  // The query is a value of its own now, written by this node alone.
  const ValueId query = nodes[p.attention].inputs[0];
  graph->values[query].parent = kNone;
  graph->values[query].column_offset = 0;
  prepare.outputs = {query};

  Node& attention = nodes[p.attention];
  attention.inputs = {query, q_gate};
  attention.required.push_back(nodes[p.split].required[0]);
  attention.outputs = nodes[p.multiply].outputs;
  for (int32_t node : {p.split, p.query_norm, p.key_norm, p.query_rope, p.key_rope, p.multiply}) editor->remove(node);
}

}  // namespace

void fuse_attention_prepare(Graph* graph) {
  GraphEditor editor(graph);
  for (int32_t i = 0; i < editor.count(); ++i) {
    Pattern pattern;
    if (graph->nodes[i].kind == OpKind::kSigmoidMultiply && match(*graph, editor, i, &pattern)) {
      fuse(graph, pattern, &editor);
    }
  }
}

}  // namespace tokenspeed::compile
