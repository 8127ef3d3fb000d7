// A model as a graph of logical operations over values with symbolic shapes and placements: what model::build_graph
// declares, what the passes rewrite and what lower() turns into a Program.
//
// Invariants: nodes are in an order in which they may run; every value is written by one node (or is an external
// input); numbers in attributes are those of one rank, columns of values are those of all ranks together. A value may
// be a view: columns [column_offset, column_offset + columns) of its parent's rows. In-place operations give an output
// that views their input, so the chain of parents says which values share memory.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tokenspeed::compile {

using ValueId = int32_t;
using WeightId = int32_t;
inline constexpr int32_t kNone = -1;

// Inputs -> outputs [weights] of each kind, by position. "in place" outputs view the input they replace.
enum class OpKind : uint8_t {
  kEmbedding,           // (token ids of the step) -> rows [table]
  kRmsNorm,             // x, (add) -> normed, (x + add, in place) [norm]
  kLinear,              // x -> y [matrix, (norm of x when attributes.fused_norm)]
  kSplitQueryGate,      // q_gate -> query, gate
  kHeadRmsNorm,         // x -> x in place [norm]
  kRope,                // x -> x in place
  kKvWrite,             // key, value ->
  kAttention,           // query, (q_gate) -> out; with q_gate multiplied by sigmoid of its gate half
  kSigmoidMultiply,     // x, gate -> out
  kCausalConv,          // qkv -> out [conv]
  kGdnGates,            // b, a -> beta, decay [a_log, dt_bias]
  kGdnL2Norm,           // qkv -> qkv in place
  kGatedDeltaRule,      // qkv, beta, decay -> out
  kGatedRmsNorm,        // x, z -> out [norm]
  kSwiGlu,              // gate_up -> out
  kRouter,              // logits -> expert ids, expert weights
  kExperts,             // x, expert ids, expert weights -> y [gate_up, down]
  kScaleRowsBySigmoid,  // gate logit, x -> x in place
  kAdd,                 // residual, branch -> sum
  kGatherRows,          // x -> the rows whose logits are wanted
  kAllReduce,           // x -> x in place
  kAllGather,           // x -> all columns
  kReduceScatter,       // x -> this rank's columns
  // Made by passes.
  kAttentionPrepare,     // q_gate, key, value -> query [query norm, key norm]
  kGdnMixer,             // qkv, z, b, a -> out [conv, a_log, dt_bias, norm]
  kSharedExpertCombine,  // x, shared, routed -> y [gate]
  kAllReduceRmsNorm,     // x, partial -> normed, (x + sum of partial, in place) [norm]
};
std::string_view op_kind_name(OpKind kind);
bool is_collective(OpKind kind);

enum class Axis : uint8_t { kTensor, kExpert, kData };
inline constexpr int kAxes = 3;
std::string_view axis_name(Axis axis);

struct Placement {
  enum class Kind : uint8_t { kReplicate, kShard, kPartial };
  Kind kind = Kind::kReplicate;
  int8_t dim = 0;  // of kShard: 0 rows, 1 columns
  bool operator==(const Placement&) const = default;
};
constexpr Placement replicate() { return {}; }
constexpr Placement shard(int dim) { return {Placement::Kind::kShard, static_cast<int8_t>(dim)}; }
constexpr Placement partial() { return {Placement::Kind::kPartial, 0}; }

// One placement per mesh axis.
struct Placements {
  std::array<Placement, kAxes> axes = {};
  Placement& operator[](Axis axis) { return axes[static_cast<size_t>(axis)]; }
  const Placement& operator[](Axis axis) const { return axes[static_cast<size_t>(axis)]; }
  bool operator==(const Placements&) const = default;
};
// Replicated on every axis but the tensor axis.
constexpr Placements on_tensor_axis(Placement placement) {
  Placements placements = {};
  placements.axes[0] = placement;
  return placements;
}

struct Mesh {
  std::array<int32_t, kAxes> sizes = {1, 1, 1};
  int32_t size(Axis axis) const { return sizes[static_cast<size_t>(axis)]; }
};

enum class RowSymbol : uint8_t { kTokens, kLogitRows };            // T of the step; rows whose logits are wanted
enum class ValueType : uint8_t { kActivation, kFloat32, kInt32 };  // kActivation: the Program's activation dtype

struct Value {
  std::string name = {};
  RowSymbol rows = RowSymbol::kTokens;
  int64_t columns = 0;
  ValueType type = ValueType::kActivation;
  Placements placements = {};
  ValueId parent = kNone;
  int64_t column_offset = 0;
};

// How a weight is held on the device.
enum class WeightForm : uint8_t {
  kMatrix,   // operand of kLinear (a tied embedding's table too)
  kTable,    // rows looked up by kEmbedding only
  kVector,   // small, float32, row-major: norms, conv taps, gates
  kExperts,  // `count` matrices one after the other; '*' in tensor names stands for the expert's index
};

// Rows [row_begin, row_begin + rows) of a canonical tensor. When the weight is sliced by rows every part is sliced by
// itself: its rows are `units` equal groups (heads) and a rank takes units / tp of them, or, when units < tp, the one
// group that its share of ranks repeats.
struct WeightPart {
  std::string tensor = {};
  int64_t tensor_rows = 0;
  int64_t row_begin = 0;
  int64_t rows = 0;
  int64_t units = 1;
};

enum class Slice : uint8_t { kNone, kRows, kColumns };

struct Weight {
  std::string name = {};
  WeightForm form = WeightForm::kMatrix;
  std::vector<WeightPart> parts = {};  // concatenated by rows
  int64_t columns = 0;
  Slice slice = Slice::kNone;  // along the tensor axis
  int64_t column_units = 1;    // groups of columns when sliced by columns
  int64_t count = 1;
  bool quantizable = false;  // FP8 in the official FP8 releases
};

// Those of the node's kind are set; per rank.
struct Attributes {
  float epsilon = 1e-6f;
  int64_t heads = 0;        // kHeadRmsNorm, kRope
  int64_t query_heads = 0;  // attention
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t rotary_dim = 0;
  float rope_theta = 0;
  int64_t key_heads = 0;  // Gated DeltaNet
  int64_t value_heads = 0;
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  int64_t conv_kernel = 0;
  int64_t experts = 0;  // mixture of experts
  int64_t top_k = 0;
  int64_t width = 0;
  bool normalize_top_k = true;
  int32_t kv_layer = kNone;     // index among the layers with KV pages
  int32_t state_layer = kNone;  // index among the layers with recurrent state
  bool fused_norm = false;      // kLinear: weights[1] is the norm applied to x first
  Axis axis = Axis::kTensor;    // collectives
};

struct Node {
  OpKind kind = OpKind::kAdd;
  std::string name = {};
  int32_t layer = kNone;
  int32_t stream = 0;
  std::vector<ValueId> inputs = {};
  std::vector<Placements> required = {};  // of each input
  std::vector<ValueId> outputs = {};
  std::vector<WeightId> weights = {};
  Attributes attributes = {};
};

// The recurrent state of one GDN layer and the keys and values of one attention layer, per rank.
struct StateShape {
  int64_t value_heads = 0;
  int64_t value_dim = 0;
  int64_t key_dim = 0;
  int64_t conv_rows = 0;
  int64_t channels = 0;
};
struct KvShape {
  int64_t heads = 0;
  int64_t head_dim = 0;
};

struct Graph {
  std::string name = {};
  Mesh mesh;
  int64_t hidden_size = 0;
  int64_t vocabulary_size = 0;
  std::vector<Value> values = {};
  std::vector<Weight> weights = {};
  std::vector<Node> nodes = {};
  std::vector<StateShape> state_layers = {};
  std::vector<KvShape> kv_layers = {};  // the MTP layer's, if any, is the last; the same list in both graphs
  ValueId hidden_in = kNone;            // external input: the MTP graph's final-normed hidden rows
  ValueId hidden = kNone;               // result: rows after the final norm
  ValueId logits = kNone;               // result: float32, one row per wanted row

  ValueId add_value(Value value);
  WeightId add_weight(Weight weight);
  ValueId root(ValueId id) const;  // the value whose memory `id` lies in
  bool is_result(ValueId id) const { return id == hidden || id == logits; }
};

// The decoder and, when the model has one, its multi-token-prediction layer. Both name the same weights alike.
struct ModelGraph {
  Graph body;
  Graph mtp;
  bool has_mtp = false;
};

}  // namespace tokenspeed::compile
