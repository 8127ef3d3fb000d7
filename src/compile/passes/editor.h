// Who writes and who reads each value, and removal of nodes: what passes need to match and rewrite patterns.
#pragma once

#include <vector>

#include "compile/graph.h"

namespace tokenspeed::compile {

// Indices are into graph->nodes and stay valid until the editor is destroyed, which drops the removed nodes. A fused
// node takes the place of the last node of its pattern, where all of its inputs exist.
class GraphEditor {
 public:
  explicit GraphEditor(Graph* graph);
  ~GraphEditor();
  GraphEditor(const GraphEditor&) = delete;
  GraphEditor& operator=(const GraphEditor&) = delete;

  int32_t count() const { return static_cast<int32_t>(removed_.size()); }
  bool removed(int32_t node) const { return removed_[node]; }
  int32_t producer(ValueId value) const { return producer_[value]; }  // kNone for external inputs
  const std::vector<int32_t>& consumers(ValueId value) const { return consumers_[value]; }
  // The producer of `value` when it is of this kind and still there, else kNone.
  int32_t producer_of_kind(ValueId value, OpKind kind) const;
  // The only reader of `value` when it is of this kind, else kNone.
  int32_t only_consumer_of_kind(ValueId value, OpKind kind) const;
  void remove(int32_t node) { removed_[node] = true; }

 private:
  Graph* const graph_;
  std::vector<int32_t> producer_;
  std::vector<std::vector<int32_t>> consumers_;
  std::vector<bool> removed_;
};

}  // namespace tokenspeed::compile
