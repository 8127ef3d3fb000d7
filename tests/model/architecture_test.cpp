#include "model/architecture.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "model/checkpoint.h"
#include "model/config.h"
#include "model/presets.h"
#include "model/safetensors.h"
#include "model/tensor_list.h"
#include "model/tensor_names.h"

namespace tokenspeed::model {
namespace {

using namespace compile;

const std::string kSource = TOKENSPEED_SOURCE_DIR;
const char* const kCheckpoints[] = {"/tests/goldens/random/dense-a", "/tests/goldens/random/moe-a",
                                    "/tests/goldens/random/moe-b", "/models/demo"};

int64_t columns_of(const std::vector<int64_t>& shape) {
  int64_t columns = 1;
  for (size_t i = 1; i < shape.size(); ++i) columns *= shape[i];
  return columns;
}

void expect_part_in(const Checkpoint& checkpoint, const Weight& weight, const WeightPart& part,
                    std::set<std::string>* used) {
  EXPECT_GE(part.row_begin, 0);
  EXPECT_LE(part.row_begin + part.rows, part.tensor_rows) << part.tensor;
  EXPECT_EQ(part.rows % part.units, 0) << part.tensor;
  const TensorSpec spec = {part.tensor, part.tensor_rows, weight.columns, weight.count, weight.form, false};
  for (int64_t i = 0; i < weight.count; ++i) {
    const std::string name = spec.name_of(i);
    used->insert(name);
    const auto view = checkpoint.view(name);
    ASSERT_TRUE(view.ok()) << view.status().to_string();
    EXPECT_EQ(view->shape[0], part.tensor_rows) << name;
    EXPECT_EQ(columns_of(view->shape), weight.columns) << name;
  }
}

void expect_weights_in(const Checkpoint& checkpoint, const Graph& graph, std::set<std::string>* used) {
  for (const Weight& weight : graph.weights) {
    ASSERT_FALSE(weight.parts.empty()) << weight.name;
    for (const WeightPart& part : weight.parts) expect_part_in(checkpoint, weight, part, used);
  }
}

// Tensors in the file that no name of `used` reads.
std::vector<std::string> unused_tensors(const SafetensorsFile& file, const std::set<std::string>& used) {
  std::vector<std::string> unused;
  for (const auto& [name, tensor] : file.tensors()) {
    const std::string canonical(canonical_name(name));
    const bool stacked = canonical.ends_with(".experts.gate_up_proj") || canonical.ends_with(".experts.down_proj");
    const std::string reader = !stacked ? canonical
                               : canonical.ends_with("gate_up_proj")
                                   ? canonical.substr(0, canonical.size() - 12) + "0.gate_proj.weight"
                                   : canonical.substr(0, canonical.size() - 9) + "0.down_proj.weight";
    if (!used.contains(reader)) unused.push_back(name);
  }
  return unused;
}

TEST(Architecture, GraphReadsExactlyTheTensorsOfRealCheckpoints) {
  for (const char* path : kCheckpoints) {
    SCOPED_TRACE(path);
    const auto config = load_config(kSource + path);
    ASSERT_TRUE(config.ok()) << config.status().to_string();
    const auto checkpoint = Checkpoint::open(kSource + path, config->tie_word_embeddings);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().to_string();
    const auto graph = build_graph(*config);
    ASSERT_TRUE(graph.ok()) << graph.status().to_string();
    EXPECT_EQ(graph->has_mtp, config->mtp_layers == 1);
    std::set<std::string> used;
    expect_weights_in(**checkpoint, graph->body, &used);
    expect_weights_in(**checkpoint, graph->mtp, &used);
    const auto file = SafetensorsFile::open(kSource + path + "/model.safetensors");
    ASSERT_TRUE(file.ok());
    EXPECT_EQ(unused_tensors(*file, used), std::vector<std::string>());
  }
}

void expect_well_formed(const Graph& graph) {
  std::vector<int> writers(graph.values.size(), 0);
  std::vector<int> readers(graph.weights.size(), 0);
  for (const Node& node : graph.nodes) {
    ASSERT_EQ(node.inputs.size(), node.required.size()) << node.name;
    for (const ValueId input : node.inputs) {
      ASSERT_GE(input, 0) << node.name;
      const bool written = input == graph.hidden_in || writers[input] == 1 || writers[graph.root(input)] == 1;
      // The joined row of the MTP layer is written through its two halves.
      bool through_views = false;
      for (size_t v = 0; v < graph.values.size(); ++v)
        through_views |= graph.values[v].parent == input && writers[v] == 1;
      EXPECT_TRUE(written || through_views)
          << node.name << " reads " << graph.values[input].name << " before it is written";
    }
    for (const ValueId output : node.outputs) EXPECT_EQ(++writers[output], 1) << graph.values[output].name;
    for (const WeightId weight : node.weights) ++readers[weight];
  }
  for (size_t i = 0; i < readers.size(); ++i) EXPECT_GT(readers[i], 0) << graph.weights[i].name;
  EXPECT_EQ(graph.values[graph.logits].columns, graph.vocabulary_size);
  EXPECT_EQ(graph.values[graph.hidden].columns, graph.hidden_size);
}

TEST(Architecture, GraphsAreWellFormedForEveryPresetAndRankCount) {
  for (const std::string_view name : preset_names()) {
    const auto config = find_preset(name);
    ASSERT_TRUE(config.ok());
    for (const int32_t ranks : {1, 2, 4, 8}) {
      SCOPED_TRACE(std::string(name) + " over " + std::to_string(ranks));
      const auto graph = build_graph(*config, {.tensor_parallel = ranks});
      ASSERT_TRUE(graph.ok()) << graph.status().to_string();
      expect_well_formed(graph->body);
      expect_well_formed(graph->mtp);
      EXPECT_EQ(graph->body.state_layers.size() * 4, config->layers.size() * 3);
      EXPECT_EQ(graph->body.kv_layers.size(), config->layers.size() / 4 + 1);
    }
  }
}

TEST(Architecture, RanksThatDoNotDivideAreNamed) {
  const auto config = find_preset("qwen3.5-0.8b");
  for (const auto& [ranks, expected] :
       std::vector<std::pair<int32_t, std::string>>{{3, "8 attention heads, which tensor parallelism over 3 ranks"},
                                                    {16, "8 attention heads"},
                                                    {0, "at least 1"}}) {
    const auto graph = build_graph(*config, {.tensor_parallel = ranks});
    ASSERT_FALSE(graph.ok()) << ranks;
    EXPECT_NE(graph.status().message().find(expected), std::string::npos) << graph.status().message();
  }
}

}  // namespace
}  // namespace tokenspeed::model
