#include "compile/program.h"

#include "compile/arena.h"

namespace tokenspeed::compile {
namespace {

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Range {
  int64_t begin = 0;
  int64_t size = 0;
};

// The share of `rank` in `size` elements made of `units` equal groups. Fewer groups than ranks: each is repeated.
Result<Range> share(int64_t size, int64_t units, int32_t ranks, int32_t rank, const std::string& name) {
  if (units >= ranks ? units % ranks != 0 : ranks % units != 0) {
    return invalid_argument("weight '" + name + "' has " + std::to_string(units) +
                            " parts, which tensor parallelism over " + std::to_string(ranks) +
                            " ranks cannot divide; choose a --tp that divides it");
  }
  const int64_t unit = size / units;
  if (units < ranks) return Range{rank * units / ranks * unit, unit};
  return Range{rank * (units / ranks) * unit, units / ranks * unit};
}

class Lowering {
 public:
  Lowering(const Graph& graph, const CompileOptions& options) : graph_(graph), options_(options) {}

  Result<Program> run() {
    program_.name = graph_.name;
    program_.mesh = graph_.mesh;
    program_.rank = options_.rank;
    program_.activation = options_.activation;
    program_.tokens = options_.tokens;
    program_.logit_rows = options_.logit_rows;
    program_.hidden_size = graph_.hidden_size;
    program_.vocabulary_size = graph_.vocabulary_size;
    value_of_.assign(graph_.values.size(), kNone);
    weight_of_.assign(graph_.weights.size(), kNone);
    for (const Node& node : graph_.nodes) TS_RETURN_IF_ERROR(lower(node));
    program_.hidden_in = graph_.hidden_in == kNone ? kNone : value(graph_.hidden_in);
    program_.hidden = value(graph_.hidden);
    program_.logits = value(graph_.logits);
    lay_out_caches();
    place_values(&program_, options_.passes.enabled("plan_memory"));
    return std::move(program_);
  }

 private:
  Status lower(const Node& node) {
    Operation operation;
    operation.kind = node.kind;
    operation.name = node.name;
    operation.layer = node.layer;
    operation.stream = node.stream;
    operation.attributes = node.attributes;
    for (ValueId id : node.inputs) operation.inputs.push_back(value(id));
    for (ValueId id : node.outputs) operation.outputs.push_back(value(id));
    for (WeightId id : node.weights) {
      TS_ASSIGN_OR_RETURN(const int32_t lowered, weight(id));
      operation.weights.push_back(lowered);
    }
    const bool head = !node.outputs.empty() && graph_.values[node.outputs[0]].rows == RowSymbol::kLogitRows;
    if (!head) program_.head_begin = static_cast<int32_t>(program_.operations.size()) + 1;
    program_.operations.push_back(std::move(operation));
    return {};
  }

  int64_t ranks() const { return graph_.mesh.size(Axis::kTensor); }

  int64_t local(ValueId id, int64_t columns) const {
    const bool sharded = graph_.values[id].placements[Axis::kTensor] == shard(1);
    return sharded ? columns / ranks() : columns;
  }

  int32_t value(ValueId id) {
    if (value_of_[id] != kNone) return value_of_[id];
    const Value& from = graph_.values[id];
    const int32_t parent = from.parent == kNone ? kNone : value(from.parent);
    ProgramValue to;
    to.name = from.name;
    to.rows = from.rows;
    to.dtype = from.type == ValueType::kActivation ? options_.activation
               : from.type == ValueType::kFloat32  ? DType::kFloat32
                                                   : DType::kInt32;
    to.columns = local(id, from.columns);
    const int32_t index = static_cast<int32_t>(program_.values.size());
    to.root = parent == kNone ? index : program_.values[parent].root;
    to.stride = parent == kNone ? to.columns : program_.values[to.root].stride;
    // Relative to the root until the arena is planned.
    to.offset = parent == kNone ? 0
                                : program_.values[parent].offset +
                                      local(id, from.column_offset) * static_cast<int64_t>(dtype_size(to.dtype));
    program_.values.push_back(std::move(to));
    value_of_[id] = index;
    return index;
  }

  Result<int32_t> weight(WeightId id) {
    if (weight_of_[id] != kNone) return weight_of_[id];
    const Weight& from = graph_.weights[id];
    ProgramWeight to;
    to.name = from.name;
    to.form = from.form;
    to.count = from.count;
    const int32_t ranks = graph_.mesh.size(Axis::kTensor);
    Range columns = {0, from.columns};
    if (from.slice == Slice::kColumns) {
      TS_ASSIGN_OR_RETURN(columns, share(from.columns, from.column_units, ranks, options_.rank, from.name));
    }
    for (const WeightPart& part : from.parts) {
      Range rows = {0, part.rows};
      if (from.slice == Slice::kRows) {
        TS_ASSIGN_OR_RETURN(rows, share(part.rows, part.units, ranks, options_.rank, from.name));
      }
      to.pieces.push_back({part.tensor, part.tensor_rows, from.columns, part.row_begin + rows.begin, rows.size,
                           columns.begin, columns.size});
      to.rows += rows.size;
    }
    to.columns = columns.size;
    to.dtype = options_.weights;
    if (from.form == WeightForm::kVector) to.dtype = DType::kFloat32;
    if (to.dtype == DType::kFloat8E4M3 && !(from.quantizable && keeps_blocks(to))) to.dtype = DType::kBFloat16;
    weight_of_[id] = static_cast<int32_t>(program_.weights.size());
    program_.weights.push_back(std::move(to));
    return weight_of_[id];
  }

  void lay_out_caches() {
    program_.kv.layers = graph_.kv_layers;
    program_.kv.dtype = options_.kv;
    program_.state.conv_dtype = options_.activation;
    int64_t offset = 0;
    for (const StateShape& shape : graph_.state_layers) {
      StateLayout::Layer layer{.shape = shape};
      layer.recurrent_offset = offset;
      offset = round_up(offset + shape.value_heads * shape.value_dim * shape.key_dim * 4, kArenaAlignment);
      layer.conv_offset = offset;
      const int64_t element = static_cast<int64_t>(dtype_size(options_.activation));
      offset = round_up(offset + shape.conv_rows * shape.channels * element, kArenaAlignment);
      program_.state.layers.push_back(layer);
    }
    program_.state.bytes_per_slot = offset;
  }

  // A runner can hold a slice as FP8 blocks only where it cuts none of the checkpoint's 128 x 128 blocks.
  static bool keeps_blocks(const ProgramWeight& weight) {
    for (size_t i = 0; i < weight.pieces.size(); ++i) {
      const WeightPiece& piece = weight.pieces[i];
      const int64_t row_end = piece.row_begin + piece.rows;
      const int64_t column_end = piece.column_begin + piece.columns;
      const bool last = i + 1 == weight.pieces.size();
      if (piece.row_begin % kFp8Block != 0 || piece.column_begin % kFp8Block != 0) return false;
      if (row_end % kFp8Block != 0 && !(last && row_end == piece.tensor_rows)) return false;
      if (column_end % kFp8Block != 0 && column_end != piece.tensor_columns) return false;
    }
    return true;
  }

  const Graph& graph_;
  const CompileOptions& options_;
  Program program_;
  std::vector<int32_t> value_of_;
  std::vector<int32_t> weight_of_;
};

}  // namespace

int64_t ProgramWeight::bytes() const {
  const int64_t elements = rows * columns * count;
  if (dtype != DType::kFloat8E4M3) return elements * static_cast<int64_t>(dtype_size(dtype));
  const int64_t blocks = (rows + kFp8Block - 1) / kFp8Block * ((columns + kFp8Block - 1) / kFp8Block);
  return elements + blocks * count * static_cast<int64_t>(sizeof(float));
}

int64_t KvLayout::bytes_per_position(int32_t layer) const {
  return 2 * layers[layer].heads * layers[layer].head_dim * static_cast<int64_t>(dtype_size(dtype));
}

int64_t KvLayout::bytes_per_position() const {
  int64_t bytes = 0;
  for (int32_t layer = 0; layer < static_cast<int32_t>(layers.size()); ++layer) bytes += bytes_per_position(layer);
  return bytes;
}

Result<Program> compile_program(Graph graph, const CompileOptions& options) {
  const int32_t ranks = graph.mesh.size(Axis::kTensor);
  if (options.rank < 0 || options.rank >= ranks) {
    return invalid_argument("rank " + std::to_string(options.rank) + " is outside the mesh of " +
                            std::to_string(ranks) + " tensor-parallel ranks");
  }
  if (options.tokens < 1 || options.logit_rows < 1) {
    return invalid_argument("a Program needs at least 1 token and 1 logit row, not " + std::to_string(options.tokens) +
                            " and " + std::to_string(options.logit_rows));
  }
  TS_RETURN_IF_ERROR(insert_collectives(&graph));
  TS_RETURN_IF_ERROR(run_passes(&graph, options.passes, options.weights == DType::kFloat8E4M3));
  return Lowering(graph, options).run();
}

}  // namespace tokenspeed::compile
