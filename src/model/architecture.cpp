#include "model/architecture.h"

#include <algorithm>
#include <map>
#include <utility>

namespace tokenspeed::model {
namespace {

using namespace compile;

Status check_division(const ModelConfig& config, int64_t tp) {
  const auto divides = [tp](int64_t n) { return n % tp == 0; };
  const auto refuse = [&](const char* what, int64_t n) {
    return invalid_argument("model '" + config.name + "' has " + std::to_string(n) + " " + what +
                            ", which tensor parallelism over " + std::to_string(tp) + " ranks does not divide");
  };
  if (tp < 1) return invalid_argument("tensor parallelism must be at least 1, not " + std::to_string(tp));
  if (!divides(config.attention_heads)) return refuse("attention heads", config.attention_heads);
  if (!divides(config.key_value_heads) && tp % config.key_value_heads != 0) {
    return refuse("key-value heads", config.key_value_heads);
  }
  const bool linear =
      std::find(config.layers.begin(), config.layers.end(), LayerKind::kLinearAttention) != config.layers.end();
  if (linear && !divides(config.linear_key_heads)) return refuse("Gated DeltaNet key heads", config.linear_key_heads);
  if (!divides(config.vocabulary_size)) return refuse("vocabulary rows", config.vocabulary_size);
  if (!config.is_moe() && !divides(config.intermediate_size)) return refuse("MLP columns", config.intermediate_size);
  if (config.is_moe() && !divides(config.expert_width)) return refuse("expert columns", config.expert_width);
  if (config.is_moe() && !divides(config.shared_expert_width)) {
    return refuse("shared-expert columns", config.shared_expert_width);
  }
  return {};
}

const Placements kWhole = on_tensor_axis(replicate());
const Placements kColumns = on_tensor_axis(shard(1));
const Placements kSum = on_tensor_axis(partial());

class Builder {
 public:
  Builder(const ModelConfig& config, int64_t tp) : config_(config), tp_(tp) {
    graph_.name = config.name;
    graph_.mesh.sizes[0] = static_cast<int32_t>(tp);
    graph_.hidden_size = config.hidden_size;
    graph_.vocabulary_size = config.vocabulary_size;
    for (LayerKind kind : config.layers) {
      if (kind == LayerKind::kFullAttention) {
        graph_.kv_layers.push_back({local_kv_heads(), config.head_dim});
      } else {
        graph_.state_layers.push_back({config.linear_value_heads / tp, config.linear_value_dim, config.linear_key_dim,
                                       config.linear_conv_kernel - 1, channels() / tp});
      }
    }
    if (config.mtp_layers > 0) graph_.kv_layers.push_back({local_kv_heads(), config.head_dim});
  }

  Graph body() && {
    ValueId x = embedding("embed_tokens");
    int32_t state_layer = 0;
    int32_t kv_layer = 0;
    for (size_t i = 0; i < config_.layers.size(); ++i) {
      layer_ = static_cast<int32_t>(i);
      const std::string prefix = "layers." + std::to_string(i) + ".";
      const bool attention = config_.layers[i] == LayerKind::kFullAttention;
      x = decoder_layer(prefix, x, attention, attention ? kv_layer++ : state_layer++);
    }
    layer_ = kNone;
    finish("norm.weight", x);
    return std::move(graph_);
  }

  Graph mtp() && {
    const int64_t hidden = config_.hidden_size;
    graph_.name += " MTP";
    graph_.hidden_in = value("hidden_in", hidden, kWhole);
    const ValueId embedded = embedding("mtp.embedding");
    // One row [norm(embedding) | norm(hidden)] for fc.
    const ValueId joined = value("mtp.joined", 2 * hidden, kWhole);
    norm_into("mtp.pre_fc_norm_embedding.weight", embedded, joined, 0);
    norm_into("mtp.pre_fc_norm_hidden.weight", graph_.hidden_in, joined, hidden);
    const ValueId x =
        linear("mtp.fc", joined, whole_matrix("mtp.fc.weight", hidden, 2 * hidden, false), hidden, kWhole, kWhole);
    layer_ = static_cast<int32_t>(config_.layers.size());
    const ValueId y = decoder_layer("mtp.layers.0.", x, true, static_cast<int32_t>(graph_.kv_layers.size()) - 1);
    layer_ = kNone;
    finish("mtp.norm.weight", y);
    return std::move(graph_);
  }

 private:
  // Values and nodes
  // ---------------------------------------------------------------------------------------------------

  ValueId value(std::string name, int64_t columns, Placements placements, ValueType type = ValueType::kActivation,
                RowSymbol rows = RowSymbol::kTokens) {
    return graph_.add_value({std::move(name), rows, columns, type, placements, kNone, 0});
  }

  ValueId in_place(std::string name, ValueId of) {
    Value view = graph_.values[of];
    view.name = std::move(name);
    view.parent = of;
    view.column_offset = 0;
    return graph_.add_value(std::move(view));
  }

  // Every input must have the placement given beside it.
  struct Use {
    ValueId value;
    Placements placements;
  };

  Node& node(OpKind kind, std::string name, const std::vector<Use>& inputs, std::vector<ValueId> outputs,
             std::vector<WeightId> weights = {}) {
    Node node{.kind = kind, .name = std::move(name), .layer = layer_};
    for (const Use& use : inputs) {
      node.inputs.push_back(use.value);
      node.required.push_back(use.placements);
    }
    node.outputs = std::move(outputs);
    node.weights = std::move(weights);
    node.attributes.epsilon = config_.rms_norm_epsilon;
    graph_.nodes.push_back(std::move(node));
    return graph_.nodes.back();
  }

  ValueId linear(const std::string& name, ValueId x, WeightId weight, int64_t columns, Placements in, Placements out,
                 ValueType type = ValueType::kActivation, RowSymbol rows = RowSymbol::kTokens) {
    const ValueId y = value(name, columns, out, type, rows);
    node(OpKind::kLinear, name, {{x, in}}, {y}, {weight});
    return y;
  }

  ValueId rms_norm(const std::string& weight_name, ValueId x) {
    const ValueId out = value(weight_name, config_.hidden_size, kWhole);
    node(OpKind::kRmsNorm, "rms_norm", {{x, kWhole}}, {out}, {vector(weight_name, config_.hidden_size)});
    return out;
  }

  void norm_into(const std::string& weight_name, ValueId x, ValueId row, int64_t column_offset) {
    const ValueId out = value(weight_name, config_.hidden_size, kWhole);
    graph_.values[out].parent = row;
    graph_.values[out].column_offset = column_offset;
    node(OpKind::kRmsNorm, "rms_norm", {{x, kWhole}}, {out}, {vector(weight_name, config_.hidden_size)});
  }

  // Weights: one entry per name ---------------------------------------------------------------------------------------

  WeightId weight(const Weight& weight) {
    if (auto known = weights_.find(weight.name); known != weights_.end()) return known->second;
    const WeightId id = graph_.add_weight(weight);
    weights_[weight.name] = id;
    return id;
  }

  WeightId vector(const std::string& name, int64_t size) {
    return weight({.name = name, .form = WeightForm::kVector, .parts = {{name, size, 0, size, 1}}, .columns = 1});
  }

  // A vector or small matrix with one row (or entry) per GDN head or channel, sliced with them.
  WeightId head_vector(const std::string& name, std::vector<WeightPart> parts, int64_t columns) {
    return weight({.name = name,
                   .form = WeightForm::kVector,
                   .parts = std::move(parts),
                   .columns = columns,
                   .slice = Slice::kRows});
  }

  WeightId whole_matrix(const std::string& name, int64_t rows, int64_t columns, bool quantizable) {
    return weight({.name = name, .parts = {{name, rows, 0, rows, 1}}, .columns = columns, .quantizable = quantizable});
  }

  WeightId row_sliced(const std::string& name, std::vector<WeightPart> parts, int64_t columns,
                      bool quantizable = true) {
    return weight({.name = name,
                   .parts = std::move(parts),
                   .columns = columns,
                   .slice = Slice::kRows,
                   .quantizable = quantizable});
  }

  WeightId column_sliced(const std::string& name, int64_t rows, int64_t columns, int64_t units) {
    return weight({.name = name,
                   .parts = {{name, rows, 0, rows, 1}},
                   .columns = columns,
                   .slice = Slice::kColumns,
                   .column_units = units,
                   .quantizable = true});
  }

  WeightId vocabulary_matrix(bool head) {
    const int64_t rows = config_.vocabulary_size;
    const bool tied = config_.tie_word_embeddings;
    const std::string tensor = head && !tied ? "lm_head.weight" : "embed_tokens.weight";
    return weight({.name = tensor,
                   .form = head || tied ? WeightForm::kMatrix : WeightForm::kTable,
                   .parts = {{tensor, rows, 0, rows, rows}},
                   .columns = config_.hidden_size,
                   .slice = Slice::kRows});
  }

  // Modules
  // ------------------------------------------------------------------------------------------------------------

  ValueId embedding(const std::string& name) {
    const ValueId x = value(name, config_.hidden_size, kSum);
    node(OpKind::kEmbedding, "embedding", {}, {x}, {vocabulary_matrix(false)});
    return x;
  }

  ValueId decoder_layer(const std::string& prefix, ValueId x, bool attention, int32_t cache_layer) {
    const ValueId normed = rms_norm(prefix + "input_layernorm.weight", x);
    const ValueId mixed = attention ? full_attention(prefix + "self_attn.", normed, cache_layer)
                                    : gated_delta_net(prefix + "linear_attn.", normed, cache_layer);
    x = residual_add(prefix + "mixer_residual", x, mixed);
    const ValueId again = rms_norm(prefix + "post_attention_layernorm.weight", x);
    const ValueId fed = config_.is_moe() ? mixture_of_experts(prefix + "mlp.", again)
                                         : mlp(prefix + "mlp.", again, config_.intermediate_size);
    return residual_add(prefix + "mlp_residual", x, fed);
  }

  ValueId residual_add(const std::string& name, ValueId x, ValueId branch) {
    const ValueId sum = value(name, config_.hidden_size, kWhole);
    node(OpKind::kAdd, "add", {{x, kWhole}, {branch, kWhole}}, {sum});
    return sum;
  }

  int64_t local_kv_heads() const { return std::max<int64_t>(1, config_.key_value_heads / tp_); }
  int64_t channels() const {
    return 2 * config_.linear_key_heads * config_.linear_key_dim +
           config_.linear_value_heads * config_.linear_value_dim;
  }

  ValueId full_attention(const std::string& prefix, ValueId x, int32_t kv_layer) {
    const int64_t heads = config_.attention_heads;
    const int64_t dim = config_.head_dim;
    const int64_t query_columns = heads * dim;
    const int64_t kv_rows = config_.key_value_heads * dim;
    const int64_t kv_columns = local_kv_heads() * tp_ * dim;  // with the repeats, when ranks outnumber heads
    const auto projection = [&](const char* name, int64_t rows, int64_t units, int64_t columns) {
      const std::string tensor = prefix + name + ".weight";
      return linear(prefix + name, x, row_sliced(tensor, {{tensor, rows, 0, rows, units}}, config_.hidden_size),
                    columns, kWhole, kColumns);
    };
    const ValueId q_gate = projection("q_proj", 2 * query_columns, heads, 2 * query_columns);
    const ValueId key = projection("k_proj", kv_rows, config_.key_value_heads, kv_columns);
    const ValueId v = projection("v_proj", kv_rows, config_.key_value_heads, kv_columns);

    const auto describe = [&](Node& node) {
      Attributes& attributes = node.attributes;
      attributes.query_heads = heads / tp_;
      attributes.kv_heads = local_kv_heads();
      attributes.head_dim = dim;
      attributes.rotary_dim = config_.rotary_dim;
      attributes.rope_theta = config_.rope_theta;
      attributes.kv_layer = kv_layer;
    };
    const ValueId query = value(prefix + "query", query_columns, kColumns);
    const ValueId gate = value(prefix + "gate", query_columns, kColumns);
    describe(node(OpKind::kSplitQueryGate, "split_query_gate", {{q_gate, kColumns}}, {query, gate}));
    const auto normed_and_turned = [&](const char* name, ValueId from, int64_t local_heads) {
      const ValueId normed = in_place(prefix + name + ".normed", from);
      const std::string weight_name = prefix + name + ".weight";
      Node& norm = node(OpKind::kHeadRmsNorm, name, {{from, kColumns}}, {normed}, {vector(weight_name, dim)});
      describe(norm);
      norm.attributes.heads = local_heads;
      const ValueId turned = in_place(prefix + name + ".turned", normed);
      Node& rope = node(OpKind::kRope, "rope", {{normed, kColumns}}, {turned});
      describe(rope);
      rope.attributes.heads = local_heads;
      return turned;
    };
    const ValueId turned_query = normed_and_turned("q_norm", query, heads / tp_);
    const ValueId turned_key = normed_and_turned("k_norm", key, local_kv_heads());
    describe(node(OpKind::kKvWrite, "kv_write", {{turned_key, kColumns}, {v, kColumns}}, {}));
    const ValueId attended = value(prefix + "attention", query_columns, kColumns);
    describe(node(OpKind::kAttention, "attention", {{turned_query, kColumns}}, {attended}));
    const ValueId gated = value(prefix + "gated", query_columns, kColumns);
    node(OpKind::kSigmoidMultiply, "sigmoid_multiply", {{attended, kColumns}, {gate, kColumns}}, {gated});
    return linear(prefix + "o_proj", gated,
                  column_sliced(prefix + "o_proj.weight", config_.hidden_size, query_columns, heads),
                  config_.hidden_size, kColumns, kSum);
  }

  ValueId gated_delta_net(const std::string& prefix, ValueId x, int32_t state_layer) {
    const int64_t key_heads = config_.linear_key_heads;
    const int64_t value_heads = config_.linear_value_heads;
    const int64_t key_rows = key_heads * config_.linear_key_dim;
    const int64_t value_rows = value_heads * config_.linear_value_dim;
    const auto segments = [&](const std::string& tensor) {
      return std::vector<WeightPart>{{tensor, channels(), 0, key_rows, key_heads},
                                     {tensor, channels(), key_rows, key_rows, key_heads},
                                     {tensor, channels(), 2 * key_rows, value_rows, value_heads}};
    };
    const auto projection = [&](const char* name, std::vector<WeightPart> parts, int64_t columns, bool quantizable) {
      return linear(prefix + name, x,
                    row_sliced(prefix + name + ".weight", std::move(parts), config_.hidden_size, quantizable), columns,
                    kWhole, kColumns);
    };
    const auto rows = [&](const char* name, int64_t count, const char* suffix) {
      return std::vector<WeightPart>{{prefix + name + suffix, count, 0, count, value_heads}};
    };
    const ValueId qkv = projection("in_proj_qkv", segments(prefix + "in_proj_qkv.weight"), channels(), true);
    const ValueId z = projection("in_proj_z", rows("in_proj_z", value_rows, ".weight"), value_rows, true);
    const ValueId b = projection("in_proj_b", rows("in_proj_b", value_heads, ".weight"), value_heads, false);
    const ValueId a = projection("in_proj_a", rows("in_proj_a", value_heads, ".weight"), value_heads, false);

    const auto describe = [&](Node& node) {
      Attributes& attributes = node.attributes;
      attributes.key_heads = key_heads / tp_;
      attributes.value_heads = value_heads / tp_;
      attributes.key_dim = config_.linear_key_dim;
      attributes.value_dim = config_.linear_value_dim;
      attributes.conv_kernel = config_.linear_conv_kernel;
      attributes.state_layer = state_layer;
    };
    const ValueId convolved = value(prefix + "conv", channels(), kColumns);
    describe(
        node(OpKind::kCausalConv, "causal_conv", {{qkv, kColumns}}, {convolved},
             {head_vector(prefix + "conv1d.weight", segments(prefix + "conv1d.weight"), config_.linear_conv_kernel)}));
    const ValueId beta = value(prefix + "beta", value_heads, kColumns, ValueType::kFloat32);
    const ValueId decay = value(prefix + "decay", value_heads, kColumns, ValueType::kFloat32);
    describe(node(OpKind::kGdnGates, "gdn_gates", {{b, kColumns}, {a, kColumns}}, {beta, decay},
                  {head_vector(prefix + "A_log", rows("A_log", value_heads, ""), 1),
                   head_vector(prefix + "dt_bias", rows("dt_bias", value_heads, ""), 1)}));
    const ValueId unit = in_place(prefix + "unit", convolved);
    describe(node(OpKind::kGdnL2Norm, "gdn_l2_norm", {{convolved, kColumns}}, {unit}));
    const ValueId read = value(prefix + "read", value_rows, kColumns);
    describe(node(OpKind::kGatedDeltaRule, "gated_delta_rule", {{unit, kColumns}, {beta, kColumns}, {decay, kColumns}},
                  {read}));
    const ValueId normed = value(prefix + "normed", value_rows, kColumns);
    describe(node(OpKind::kGatedRmsNorm, "gated_rms_norm", {{read, kColumns}, {z, kColumns}}, {normed},
                  {vector(prefix + "norm.weight", config_.linear_value_dim)}));
    return linear(prefix + "out_proj", normed,
                  column_sliced(prefix + "out_proj.weight", config_.hidden_size, value_rows, value_heads),
                  config_.hidden_size, kColumns, kSum);
  }

  ValueId mlp(const std::string& prefix, ValueId x, int64_t width) {
    const std::vector<WeightPart> parts = {{prefix + "gate_proj.weight", width, 0, width, width},
                                           {prefix + "up_proj.weight", width, 0, width, width}};
    const ValueId gate_up =
        linear(prefix + "gate_up", x, row_sliced(prefix + "gate_up_proj.weight", parts, config_.hidden_size), 2 * width,
               kWhole, kColumns);
    const ValueId activated = value(prefix + "activated", width, kColumns);
    node(OpKind::kSwiGlu, "swiglu", {{gate_up, kColumns}}, {activated});
    return linear(prefix + "down_proj", activated,
                  column_sliced(prefix + "down_proj.weight", config_.hidden_size, width, width), config_.hidden_size,
                  kColumns, kSum);
  }

  ValueId mixture_of_experts(const std::string& prefix, ValueId x) {
    const ValueId routed = routed_experts(prefix, x);
    const ValueId shared = mlp(prefix + "shared_expert.", x, config_.shared_expert_width);
    const std::string gate_name = prefix + "shared_expert_gate";
    const ValueId gate =
        linear(gate_name, x, whole_matrix(gate_name + ".weight", 1, config_.hidden_size, false), 1, kWhole, kWhole);
    const ValueId scaled = in_place(prefix + "shared_scaled", shared);
    node(OpKind::kScaleRowsBySigmoid, "scale_rows_by_sigmoid", {{gate, kWhole}, {shared, kSum}}, {scaled});
    const ValueId sum = value(prefix + "sum", config_.hidden_size, kSum);
    node(OpKind::kAdd, "add", {{routed, kSum}, {scaled, kSum}}, {sum});
    return sum;
  }

  ValueId routed_experts(const std::string& prefix, ValueId x) {
    const int64_t experts = config_.experts;
    const int64_t width = config_.expert_width;
    const ValueId logits =
        linear(prefix + "router", x, whole_matrix(prefix + "gate.weight", experts, config_.hidden_size, false), experts,
               kWhole, kWhole, ValueType::kFloat32);
    const ValueId ids = value(prefix + "expert_ids", config_.experts_per_token, kWhole, ValueType::kInt32);
    const ValueId shares = value(prefix + "expert_weights", config_.experts_per_token, kWhole, ValueType::kFloat32);
    const auto describe = [&](Node& node) {
      node.attributes.experts = experts;
      node.attributes.top_k = config_.experts_per_token;
      node.attributes.width = width / tp_;
      node.attributes.normalize_top_k = config_.normalize_top_k;
    };
    describe(node(OpKind::kRouter, "router", {{logits, kWhole}}, {ids, shares}));
    const std::string expert = prefix + "experts.*.";
    const WeightId gate_up = weight({.name = prefix + "experts.gate_up_proj",
                                     .form = WeightForm::kExperts,
                                     .parts = {{expert + "gate_proj.weight", width, 0, width, width},
                                               {expert + "up_proj.weight", width, 0, width, width}},
                                     .columns = config_.hidden_size,
                                     .slice = Slice::kRows,
                                     .count = experts,
                                     .quantizable = true});
    const WeightId down =
        weight({.name = prefix + "experts.down_proj",
                .form = WeightForm::kExperts,
                .parts = {{expert + "down_proj.weight", config_.hidden_size, 0, config_.hidden_size, 1}},
                .columns = width,
                .slice = Slice::kColumns,
                .column_units = width,
                .count = experts,
                .quantizable = true});
    const ValueId routed = value(prefix + "routed", config_.hidden_size, kSum);
    describe(
        node(OpKind::kExperts, "experts", {{x, kWhole}, {ids, kWhole}, {shares, kWhole}}, {routed}, {gate_up, down}));
    return routed;
  }

  void finish(const std::string& norm_name, ValueId x) {
    graph_.hidden = rms_norm(norm_name, x);
    const ValueId wanted =
        value("wanted_rows", config_.hidden_size, kWhole, ValueType::kActivation, RowSymbol::kLogitRows);
    node(OpKind::kGatherRows, "gather_rows", {{graph_.hidden, kWhole}}, {wanted});
    graph_.logits = linear("lm_head", wanted, vocabulary_matrix(true), config_.vocabulary_size, kWhole, kColumns,
                           ValueType::kFloat32, RowSymbol::kLogitRows);
  }

  const ModelConfig& config_;
  const int64_t tp_;
  Graph graph_;
  int32_t layer_ = kNone;
  std::map<std::string, WeightId> weights_;
};

}  // namespace

Result<compile::ModelGraph> build_graph(const compile::ModelConfig& config, const GraphOptions& options) {
  TS_RETURN_IF_ERROR(check_division(config, options.tensor_parallel));
  compile::ModelGraph graph;
  graph.body = Builder(config, options.tensor_parallel).body();
  graph.has_mtp = config.mtp_layers > 0;
  if (graph.has_mtp) graph.mtp = Builder(config, options.tensor_parallel).mtp();
  return graph;
}

}  // namespace tokenspeed::model
