// residual + branch, then the norm of the sum, become one operation that updates the residual in place; with the
// branch's all-reduce in it when there is one.
#include <algorithm>

#include "compile/passes/editor.h"
#include "compile/passes/pass.h"

namespace tokenspeed::compile {
namespace {

bool all_before(const std::vector<int32_t>& nodes, int32_t limit) {
  return std::all_of(nodes.begin(), nodes.end(), [limit](int32_t node) { return node <= limit; });
}
bool all_after(const std::vector<int32_t>& nodes, int32_t limit) {
  return std::all_of(nodes.begin(), nodes.end(), [limit](int32_t node) { return node >= limit; });
}

}  // namespace

void fuse_all_reduce_residual_norm(Graph* graph) {
  GraphEditor editor(graph);
  auto& nodes = graph->nodes;
  for (int32_t i = 0; i < editor.count(); ++i) {
    Node& norm = nodes[i];
    if (norm.kind != OpKind::kRmsNorm || norm.inputs.size() != 1) continue;
    const ValueId sum = norm.inputs[0];
    const int32_t add = editor.producer_of_kind(sum, OpKind::kAdd);
    if (add == kNone) continue;
    const ValueId residual = nodes[add].inputs[0];
    // In place: nobody may read the old residual afterwards, nor the new one before.
    if (!all_before(editor.consumers(residual), add) || !all_after(editor.consumers(sum), i)) continue;

    ValueId branch = nodes[add].inputs[1];
    Placements required = nodes[add].required[1];
    norm.name = "add_rms_norm";
    const int32_t reduce = editor.producer_of_kind(branch, OpKind::kAllReduce);
    if (reduce != kNone && editor.only_consumer_of_kind(branch, OpKind::kAdd) == add) {
      branch = nodes[reduce].inputs[0];
      required = nodes[reduce].required[0];
      norm.kind = OpKind::kAllReduceRmsNorm;
      norm.name = "all_reduce_add_rms_norm";
      norm.attributes.axis = nodes[reduce].attributes.axis;
      editor.remove(reduce);
    }
    norm.inputs = {residual, branch};
    norm.required = {nodes[add].required[0], required};
    norm.outputs = {norm.outputs[0], sum};
    graph->values[sum].parent = residual;
    editor.remove(add);
  }
}

}  // namespace tokenspeed::compile
