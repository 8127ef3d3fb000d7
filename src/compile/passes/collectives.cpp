#include <map>
#include <set>
#include <utility>

#include "compile/passes/pass.h"

namespace tokenspeed::compile {
namespace {

struct Conversion {
  OpKind kind;
  bool in_place;
};

// kAdd stands for "no collective does this".
Conversion conversion(Placement have, Placement want) {
  using Kind = Placement::Kind;
  if (have.kind == Kind::kPartial && want.kind == Kind::kReplicate) return {OpKind::kAllReduce, true};
  if (have.kind == Kind::kPartial && want.kind == Kind::kShard) return {OpKind::kReduceScatter, false};
  if (have.kind == Kind::kShard && want.kind == Kind::kReplicate) return {OpKind::kAllGather, false};
  return {OpKind::kAdd, false};
}

class Inserter {
 public:
  explicit Inserter(Graph* graph) : graph_(graph) {}

  Status run() {
    std::vector<Node> old = std::exchange(graph_->nodes, {});
    note_direct_readers(old);
    for (Node& node : old) {
      for (size_t i = 0; i < node.inputs.size(); ++i) {
        TS_ASSIGN_OR_RETURN(node.inputs[i], place(node.inputs[i], node.required[i], node));
      }
      graph_->nodes.push_back(std::move(node));
    }
    for (ValueId* result : {&graph_->hidden, &graph_->logits}) {
      if (*result == kNone) continue;
      const Node sink{.kind = OpKind::kAdd, .name = "result", .layer = kNone};
      TS_ASSIGN_OR_RETURN(*result, place(*result, Placements{}, sink));
    }
    return {};
  }

 private:
  // Values that some node reads just as they are: a collective must not overwrite them.
  void note_direct_readers(const std::vector<Node>& nodes) {
    for (const Node& node : nodes) {
      for (size_t i = 0; i < node.inputs.size(); ++i) {
        if (graph_->values[node.inputs[i]].placements == node.required[i]) read_directly_.insert(node.inputs[i]);
      }
    }
  }

  Result<ValueId> place(ValueId value, const Placements& want, const Node& reader) {
    for (Axis axis : {Axis::kTensor, Axis::kExpert, Axis::kData}) {
      if (graph_->mesh.size(axis) == 1 || graph_->values[value].placements[axis] == want[axis]) continue;
      TS_ASSIGN_OR_RETURN(value, convert(value, axis, want[axis], reader));
    }
    return value;
  }

  Result<ValueId> convert(ValueId value, Axis axis, Placement want, const Node& reader) {
    const auto key = std::pair(value, std::pair(axis, std::pair(want.kind, want.dim)));
    if (auto known = converted_.find(key); known != converted_.end()) return known->second;
    const Value source = graph_->values[value];
    const Conversion how = conversion(source.placements[axis], want);
    if (how.kind == OpKind::kAdd) {
      return internal_error("no collective gives '" + reader.name + "' the value '" + source.name + "' on axis " +
                            std::string(axis_name(axis)) + " as it asks for it");
    }
    Value result = source;
    result.name += "." + std::string(op_kind_name(how.kind));
    result.placements[axis] = want;
    result.parent = how.in_place && !read_directly_.contains(value) ? value : kNone;
    result.column_offset = 0;
    const ValueId id = graph_->add_value(std::move(result));
    Node node{.kind = how.kind, .name = source.name, .layer = reader.layer};
    node.inputs = {value};
    node.required = {source.placements};
    node.outputs = {id};
    node.attributes.axis = axis;
    graph_->nodes.push_back(std::move(node));
    converted_[key] = id;
    return id;
  }

  Graph* const graph_;
  std::set<ValueId> read_directly_;
  std::map<std::pair<ValueId, std::pair<Axis, std::pair<Placement::Kind, int8_t>>>, ValueId> converted_;
};

}  // namespace

Status insert_collectives(Graph* graph) { return Inserter(graph).run(); }

}  // namespace tokenspeed::compile
