#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "compile/passes/pass.h"

namespace tokenspeed::compile {
namespace {

const Placements kWhole = on_tensor_axis(replicate());
const Placements kColumns = on_tensor_axis(shard(1));
const Placements kSum = on_tensor_axis(partial());

// A value written by an embedding at `have` and read at each of `wants`; the last reader's output is the result.
Graph graph_of(Placements have, const std::vector<Placements>& wants, int32_t ranks) {
  Graph graph;
  graph.name = "test";
  graph.mesh.sizes[0] = ranks;
  const ValueId x = graph.add_value({.name = "x", .columns = 64, .placements = have});
  graph.nodes.push_back({.kind = OpKind::kEmbedding, .name = "source", .outputs = {x}});
  for (const Placements& want : wants) {
    const ValueId y = graph.add_value({.name = "y", .columns = 64, .placements = kWhole});
    graph.nodes.push_back(
        {.kind = OpKind::kLinear, .name = "reader", .inputs = {x}, .required = {want}, .outputs = {y}});
    graph.hidden = y;
  }
  return graph;
}

std::vector<OpKind> kinds(const Graph& graph) {
  std::vector<OpKind> kinds;
  for (const Node& node : graph.nodes) kinds.push_back(node.kind);
  return kinds;
}

using Kinds = std::vector<OpKind>;

TEST(Collectives, OneWhereEachKindOfPlacementDisagrees) {
  Graph graph = graph_of(kSum, {kWhole}, 2);
  ASSERT_TRUE(insert_collectives(&graph).ok());
  EXPECT_EQ(kinds(graph), (Kinds{OpKind::kEmbedding, OpKind::kAllReduce, OpKind::kLinear}));
  EXPECT_EQ(graph.root(graph.nodes[2].inputs[0]), graph.nodes[0].outputs[0]) << "all-reduce works in place";

  graph = graph_of(kColumns, {kWhole}, 2);
  ASSERT_TRUE(insert_collectives(&graph).ok());
  EXPECT_EQ(kinds(graph), (Kinds{OpKind::kEmbedding, OpKind::kAllGather, OpKind::kLinear}));

  graph = graph_of(kSum, {kColumns}, 2);
  ASSERT_TRUE(insert_collectives(&graph).ok());
  EXPECT_EQ(kinds(graph), (Kinds{OpKind::kEmbedding, OpKind::kReduceScatter, OpKind::kLinear}));
}

TEST(Collectives, NoneWherePlacementsAgreeOrOneRankIsAlone) {
  for (const Placements& placement : {kWhole, kColumns, kSum}) {
    Graph graph = graph_of(placement, {placement}, 8);
    ASSERT_TRUE(insert_collectives(&graph).ok());
    EXPECT_EQ(graph.nodes.size(), 2u);
    graph = graph_of(placement, {kWhole, kColumns, kSum}, 1);
    ASSERT_TRUE(insert_collectives(&graph).ok());
    EXPECT_EQ(graph.nodes.size(), 4u);
  }
}

TEST(Collectives, SeveralReadersShareOne) {
  Graph graph = graph_of(kSum, {kWhole, kWhole, kWhole}, 4);
  ASSERT_TRUE(insert_collectives(&graph).ok());
  EXPECT_EQ(kinds(graph),
            (Kinds{OpKind::kEmbedding, OpKind::kAllReduce, OpKind::kLinear, OpKind::kLinear, OpKind::kLinear}));
  EXPECT_EQ(graph.nodes[2].inputs[0], graph.nodes[4].inputs[0]);
}

TEST(Collectives, AValueSomebodyReadsAsItIsIsNotOverwritten) {
  Graph graph = graph_of(kSum, {kWhole, kSum}, 2);
  ASSERT_TRUE(insert_collectives(&graph).ok());
  ASSERT_EQ(kinds(graph), (Kinds{OpKind::kEmbedding, OpKind::kAllReduce, OpKind::kLinear, OpKind::kLinear}));
  EXPECT_NE(graph.root(graph.nodes[2].inputs[0]), graph.root(graph.nodes[3].inputs[0]));
}

TEST(Collectives, ResultsAreMadeWhole) {
  Graph graph = graph_of(kWhole, {kWhole}, 2);
  graph.values[graph.hidden].placements = kSum;
  graph.logits = graph.add_value({.name = "logits", .columns = 64, .placements = kColumns});
  graph.nodes.push_back({.kind = OpKind::kLinear, .name = "head", .outputs = {graph.logits}});
  ASSERT_TRUE(insert_collectives(&graph).ok());
  ASSERT_EQ(graph.nodes.size(), 5u);
  EXPECT_EQ(graph.nodes[3].kind, OpKind::kAllReduce);
  EXPECT_EQ(graph.nodes[4].kind, OpKind::kAllGather);
  EXPECT_EQ(graph.hidden, graph.nodes[3].outputs[0]);
  EXPECT_EQ(graph.logits, graph.nodes[4].outputs[0]);
}

TEST(Collectives, TheImpossibleIsNamed) {
  Graph graph = graph_of(kWhole, {kSum}, 2);
  const Status status = insert_collectives(&graph);
  ASSERT_EQ(status.code(), StatusCode::kInternal);
  EXPECT_NE(status.message().find("'reader'"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("'x'"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("tp"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace tokenspeed::compile
