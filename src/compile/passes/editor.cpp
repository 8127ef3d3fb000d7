#include "compile/passes/editor.h"

#include <utility>

namespace tokenspeed::compile {

GraphEditor::GraphEditor(Graph* graph)
    : graph_(graph),
      producer_(graph->values.size(), kNone),
      consumers_(graph->values.size()),
      removed_(graph->nodes.size(), false) {
  for (int32_t i = 0; i < count(); ++i) {
    for (ValueId value : graph->nodes[i].outputs) producer_[value] = i;
    for (ValueId value : graph->nodes[i].inputs) consumers_[value].push_back(i);
  }
}

GraphEditor::~GraphEditor() {
  size_t kept = 0;
  for (size_t i = 0; i < removed_.size(); ++i) {
    if (removed_[i]) continue;
    if (kept != i) graph_->nodes[kept] = std::move(graph_->nodes[i]);
    ++kept;
  }
  graph_->nodes.resize(kept);
}

int32_t GraphEditor::producer_of_kind(ValueId value, OpKind kind) const {
  const int32_t node = producer_[value];
  return node != kNone && !removed_[node] && graph_->nodes[node].kind == kind ? node : kNone;
}

int32_t GraphEditor::only_consumer_of_kind(ValueId value, OpKind kind) const {
  if (consumers_[value].size() != 1 || graph_->is_result(value)) return kNone;
  const int32_t node = consumers_[value][0];
  return !removed_[node] && graph_->nodes[node].kind == kind ? node : kNone;
}

}  // namespace tokenspeed::compile
