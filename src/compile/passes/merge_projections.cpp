// Linear nodes of one layer that read the same value become one over the row-concatenated weights; their outputs become
// column ranges of its output. Merges q, k, v of attention and qkv, z, b, a of Gated DeltaNet (b and a apart when the
// others are FP8 and they are not: `quantizable` must agree).
#include <utility>

#include "compile/passes/editor.h"
#include "compile/passes/pass.h"

namespace tokenspeed::compile {
namespace {

bool mergeable(const Graph& graph, const Node& node) {
  if (node.kind != OpKind::kLinear || node.attributes.fused_norm) return false;
  const Value& out = graph.values[node.outputs[0]];
  return out.type == ValueType::kActivation && out.rows == RowSymbol::kTokens && out.parent == kNone;
}

bool alike(const Graph& graph, const Node& a, const Node& b, bool fp8) {
  const Weight& weight_a = graph.weights[a.weights[0]];
  const Weight& weight_b = graph.weights[b.weights[0]];
  return a.inputs[0] == b.inputs[0] && a.layer == b.layer && weight_a.slice == weight_b.slice &&
         weight_a.slice != Slice::kColumns &&
         graph.values[a.outputs[0]].placements == graph.values[b.outputs[0]].placements &&
         (!fp8 || weight_a.quantizable == weight_b.quantizable);
}

// Names of the parts without their common beginning: "layers.0.linear_attn.in_proj_qkv+in_proj_z".
std::string merged_name(const std::string& first, const std::string& next) {
  const size_t dot = next.rfind('.');
  return first + "+" + (dot == std::string::npos ? next : next.substr(dot + 1));
}

void merge(Graph* graph, const std::vector<int32_t>& group, GraphEditor* editor) {
  Node& first = graph->nodes[group[0]];
  Weight weight = graph->weights[first.weights[0]];
  Value merged = graph->values[first.outputs[0]];
  for (size_t i = 1; i < group.size(); ++i) {
    const Node& node = graph->nodes[group[i]];
    const Weight& part = graph->weights[node.weights[0]];
    weight.name = merged_name(weight.name, part.name);
    weight.quantizable = weight.quantizable && part.quantizable;
    weight.parts.insert(weight.parts.end(), part.parts.begin(), part.parts.end());
    merged.name = merged_name(merged.name, graph->values[node.outputs[0]].name);
    merged.columns += graph->values[node.outputs[0]].columns;
  }
  const ValueId output = graph->add_value(std::move(merged));
  int64_t offset = 0;
  for (int32_t index : group) {
    Value& view = graph->values[graph->nodes[index].outputs[0]];
    view.parent = output;
    view.column_offset = offset;
    offset += view.columns;
    if (index != group[0]) editor->remove(index);
  }
  first.weights = {graph->add_weight(std::move(weight))};
  first.outputs = {output};
  first.name = graph->values[output].name;
}

}  // namespace

void merge_projections(Graph* graph, bool fp8) {
  GraphEditor editor(graph);
  for (int32_t i = 0; i < editor.count(); ++i) {
    if (editor.removed(i) || !mergeable(*graph, graph->nodes[i])) continue;
    std::vector<int32_t> group = {i};
    for (int32_t other : editor.consumers(graph->nodes[i].inputs[0])) {
      if (other > i && !editor.removed(other) && mergeable(*graph, graph->nodes[other]) &&
          alike(*graph, graph->nodes[i], graph->nodes[other], fp8)) {
        group.push_back(other);
      }
    }
    if (group.size() > 1) merge(graph, group, &editor);
  }
}

}  // namespace tokenspeed::compile
