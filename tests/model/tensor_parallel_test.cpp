// Collectives and slices of tensor-parallel Programs.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "model/compiled_presets.h"

namespace tokenspeed::model {
namespace {

TEST(TensorParallel, CollectivesOnlyWherePlacementsDisagree) {
  for (const char* name : {"qwen3.5-0.8b", "qwen3.5-35b-a3b"}) {
    const ModelConfig config = preset(name);
    const auto layers = static_cast<int>(config.layers.size());
    std::map<OpKind, int> alone = kinds(compiled(graph_of(config).body, without(every_pass())));
    for (OpKind kind : {OpKind::kAllReduce, OpKind::kAllGather, OpKind::kReduceScatter, OpKind::kAllReduceRmsNorm}) {
      EXPECT_EQ(alone[kind], 0) << name;
    }
    for (int32_t ranks : {2, 8}) {
      SCOPED_TRACE(std::string(name) + " tp " + std::to_string(ranks));
      const ModelGraph graph = graph_of(config, ranks);
      const Program plain = compiled(graph.body, without(every_pass()));
      std::map<OpKind, int> count = kinds(plain);
      EXPECT_EQ(count[OpKind::kAllReduce], 2 * layers + 1) << "two a layer and the embedding's";
      EXPECT_EQ(count[OpKind::kAllGather], 1) << "the logits";
      EXPECT_EQ(count[OpKind::kReduceScatter], 0);
      EXPECT_EQ(
          static_cast<int>(plain.operations.size()),
          static_cast<int>(compiled(graph_of(config).body, without(every_pass())).operations.size()) + 2 * layers + 2);

      count = kinds(compiled(graph.body));
      EXPECT_EQ(count[OpKind::kAllReduce], 1);
      EXPECT_EQ(count[OpKind::kAllReduceRmsNorm], 2 * layers);
      count = kinds(compiled(graph.mtp));
      EXPECT_EQ(count[OpKind::kAllReduce], 1);
      EXPECT_EQ(count[OpKind::kAllReduceRmsNorm], 2);
      EXPECT_EQ(count[OpKind::kAllGather], 1);
    }
  }
}

// The different pieces of a tensor that the ranks hold, repeats aside, have together as many elements as the tensor.
TEST(TensorParallel, RanksTogetherHoldEveryTensorOnce) {
  for (const char* name : {"qwen3.5-27b", "qwen3.5-35b-a3b"}) {
    ModelConfig config = preset(name);
    config.layers.resize(4);
    for (int32_t ranks : {1, 2, 4, 8}) {
      SCOPED_TRACE(std::string(name) + " tp " + std::to_string(ranks));
      const Graph graph = graph_of(config, ranks).body;
      std::map<std::string, int64_t> held;
      std::map<std::string, int64_t> size;
      std::map<std::string, std::set<std::pair<int64_t, int64_t>>> starts;
      for (int32_t rank = 0; rank < ranks; ++rank) {
        CompileOptions options;
        options.rank = rank;
        for (const ProgramWeight& weight : compiled(graph, options).weights) {
          for (const WeightPiece& piece : weight.pieces) {
            ASSERT_LE(piece.row_begin + piece.rows, piece.tensor_rows) << piece.tensor;
            ASSERT_LE(piece.column_begin + piece.columns, piece.tensor_columns) << piece.tensor;
            size[piece.tensor] = piece.tensor_rows * piece.tensor_columns;
            if (starts[piece.tensor].insert({piece.row_begin, piece.column_begin}).second) {
              held[piece.tensor] += piece.rows * piece.columns;  // repeats (norms, router, KV heads) count once
            }
          }
        }
      }
      EXPECT_EQ(held, size);
    }
  }
}

TEST(TensorParallel, HeadsAreSplitAsTheModelDocumentSays) {
  const ModelConfig config = preset("qwen3.5-397b-a17b");
  const Graph graph = graph_of(config, 8).body;
  for (int32_t rank = 0; rank < 8; ++rank) {
    SCOPED_TRACE(rank);
    CompileOptions options;
    options.rank = rank;
    const Program program = compiled(graph, options);
    std::map<std::string, std::vector<std::pair<int64_t, int64_t>>> rows;  // begin, count of each piece
    std::map<std::string, std::pair<int64_t, int64_t>> columns;
    for (const ProgramWeight& weight : program.weights) {
      for (const WeightPiece& piece : weight.pieces) {
        rows[piece.tensor].push_back({piece.row_begin, piece.rows});
        columns[piece.tensor] = {piece.column_begin, piece.columns};
      }
    }
    using Rows = std::vector<std::pair<int64_t, int64_t>>;
    const std::string attention = "layers.3.self_attn.";
    EXPECT_EQ(rows[attention + "q_proj.weight"], (Rows{{rank * 4 * 512, 4 * 512}}));
    EXPECT_EQ(rows[attention + "k_proj.weight"], (Rows{{rank / 4 * 256, 256}}));
    EXPECT_EQ(rows[attention + "v_proj.weight"], (Rows{{rank / 4 * 256, 256}}));
    EXPECT_EQ(columns[attention + "o_proj.weight"], (std::pair<int64_t, int64_t>{rank * 4 * 256, 4 * 256}));
    const std::string gdn = "layers.0.linear_attn.";
    const Rows segments = {{rank * 256, 256}, {2048 + rank * 256, 256}, {4096 + rank * 1024, 1024}};
    EXPECT_EQ(rows[gdn + "in_proj_qkv.weight"], segments);
    EXPECT_EQ(rows[gdn + "conv1d.weight"], segments);
    EXPECT_EQ(rows[gdn + "in_proj_z.weight"], (Rows{{rank * 1024, 1024}}));
    EXPECT_EQ(rows[gdn + "A_log"], (Rows{{rank * 8, 8}}));
    EXPECT_EQ(rows[gdn + "dt_bias"], (Rows{{rank * 8, 8}}));
    EXPECT_EQ(rows[gdn + "norm.weight"], (Rows{{0, 128}})) << "works within a head";
    EXPECT_EQ(columns[gdn + "out_proj.weight"], (std::pair<int64_t, int64_t>{rank * 1024, 1024}));
    const std::string mlp = "layers.0.mlp.";
    EXPECT_EQ(rows[mlp + "gate.weight"], (Rows{{0, 512}}));
    EXPECT_EQ(rows[mlp + "experts.*.gate_proj.weight"], (Rows{{rank * 128, 128}}));
    EXPECT_EQ(rows[mlp + "experts.*.up_proj.weight"], (Rows{{rank * 128, 128}}));
    EXPECT_EQ(columns[mlp + "experts.*.down_proj.weight"], (std::pair<int64_t, int64_t>{rank * 128, 128}));
    EXPECT_EQ(rows["lm_head.weight"], (Rows{{rank * 31040, 31040}}));
    EXPECT_EQ(rows["embed_tokens.weight"], (Rows{{rank * 31040, 31040}}));
  }
}

TEST(TensorParallel, WhatDoesNotDivideIsNamed) {
  const Result<ModelGraph> graph = build_graph(preset("qwen3.5-27b"), {.tensor_parallel = 16});
  EXPECT_EQ(graph.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(graph.status().message().find("24 attention heads"), std::string::npos) << graph.status().message();
  EXPECT_EQ(build_graph(preset("qwen3.5-27b"), {.tensor_parallel = 0}).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace tokenspeed::model
