// What each pass does to the model's graph, alone and left out.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "compile/program_check.h"
#include "model/compiled_presets.h"

namespace tokenspeed::model {
namespace {

// What one pass alone turns into what, in a model of one attention layer and three GDN layers with experts.
TEST(Passes, EachMakesItsFusionAndCanBeSwitchedOff) {
  ModelConfig config = preset("qwen3.5-35b-a3b");
  config.layers.resize(4);
  const Graph graph = graph_of(config, 2).body;
  const std::map<OpKind, int> plain = kinds(compiled(graph, without(every_pass())));
  struct Effect {
    const char* pass;
    std::map<OpKind, int> changes;
  };
  const Effect effects[] = {
      // qkv, z, b, a of three layers; q, k, v of one.
      {"merge_projections", {{OpKind::kLinear, -3 * 3 - 2}}},
      {"fuse_attention_prepare",
       {{OpKind::kSplitQueryGate, -1},
        {OpKind::kHeadRmsNorm, -2},
        {OpKind::kRope, -2},
        {OpKind::kKvWrite, -1},
        {OpKind::kSigmoidMultiply, -1},
        {OpKind::kAttentionPrepare, 1}}},
      {"fuse_gdn_mixer",
       {{OpKind::kCausalConv, -3},
        {OpKind::kGdnGates, -3},
        {OpKind::kGdnL2Norm, -3},
        {OpKind::kGatedDeltaRule, -3},
        {OpKind::kGatedRmsNorm, -3},
        {OpKind::kGdnMixer, 3}}},
      {"fuse_shared_expert",
       {{OpKind::kScaleRowsBySigmoid, -4},
        {OpKind::kLinear, -4},
        {OpKind::kAdd, -4},
        {OpKind::kSharedExpertCombine, 4}}},
      // Every norm but the first has a residual sum before it.
      {"fuse_all_reduce_residual_norm",
       {{OpKind::kAllReduce, -8}, {OpKind::kAdd, -8}, {OpKind::kRmsNorm, -8}, {OpKind::kAllReduceRmsNorm, 8}}},
      {"fuse_norm_into_projection", {}},  // several projections read every norm until they are merged
      {"assign_streams", {}},
      {"plan_memory", {}},
  };
  ASSERT_EQ(std::size(effects), pass_names().size());
  for (const Effect& effect : effects) {
    SCOPED_TRACE(effect.pass);
    std::vector<std::string> others = every_pass();
    std::erase(others, effect.pass);
    ASSERT_EQ(others.size() + 1, pass_names().size());
    std::map<OpKind, int> expected = plain;
    for (const auto& [kind, change] : effect.changes) expected[kind] += change;
    std::erase_if(expected, [](const auto& entry) { return entry.second == 0; });
    const Program program = compiled(graph, without(others));
    EXPECT_EQ(kinds(program), expected);
    expect_sound(program);
    const Program all_but_it = compiled(graph, without({effect.pass}));
    expect_sound(all_but_it);
    for (const auto& [kind, change] : effect.changes) {
      if (change > 0) {
        EXPECT_EQ(kinds(all_but_it).count(kind), 0u);
      }
    }
  }
}

TEST(Passes, ANormWithOneReaderMovesIntoIt) {
  ModelConfig config = preset("qwen3.5-0.8b");
  config.layers.resize(4);
  const Graph graph = graph_of(config).body;
  const auto fused = [](const Program& program) {
    return std::count_if(program.operations.begin(), program.operations.end(), [](const Operation& operation) {
      return operation.kind == OpKind::kLinear && operation.attributes.fused_norm && operation.weights.size() == 2;
    });
  };
  // Each layer has two norms; the final one is a result.
  EXPECT_EQ(fused(compiled(graph, without({"fuse_all_reduce_residual_norm"}))), 8);
  EXPECT_EQ(fused(compiled(graph)), 1) << "norms after a residual sum stay with it";
  EXPECT_EQ(fused(compiled(graph, without({"fuse_norm_into_projection"}))), 0);
  // FP8 keeps b and a apart, so two projections read a GDN layer's norm.
  EXPECT_EQ(fused(compiled(graph, without({"fuse_all_reduce_residual_norm"}, kFp8))), 5);
}

TEST(Passes, TheSharedExpertRunsBesideTheRoutedOnes) {
  ModelConfig config = preset("qwen3.5-35b-a3b");
  config.layers.resize(4);
  const Graph graph = graph_of(config).body;
  std::map<std::string, int> side;
  for (const Operation& operation : compiled(graph).operations) {
    if (operation.stream != 0) ++side[operation.name.substr(operation.name.rfind('.') + 1)];
  }
  EXPECT_EQ(side, (std::map<std::string, int>{{"gate_up", 4}, {"swiglu", 4}, {"down_proj", 4}}));
  for (const Operation& operation : compiled(graph, without({"assign_streams"})).operations) {
    EXPECT_EQ(operation.stream, 0);
  }
}

TEST(Passes, EveryProgramKeepsWhatIsAliveApart) {
  std::vector<std::vector<std::string>> choices = {{}, every_pass()};
  for (std::string_view name : pass_names()) choices.push_back({std::string(name)});
  for (const char* name : {"qwen3.5-0.8b", "qwen3.5-35b-a3b"}) {
    ModelConfig config = preset(name);
    config.layers.resize(8);
    for (int32_t ranks : {1, 8}) {
      const ModelGraph graph = graph_of(config, ranks);
      for (const std::vector<std::string>& disabled : choices) {
        for (int64_t tokens : {1, 8, 512}) {
          CompileOptions options = without(disabled, tokens == 8 ? kFp8 : kBf16);
          options.tokens = tokens;
          options.logit_rows = std::min<int64_t>(tokens, 16);
          expect_sound(compiled(graph.body, options));
          expect_sound(compiled(graph.mtp, options));
        }
      }
    }
  }
}

TEST(Passes, ThePlanReusesMemory) {
  CompileOptions options;
  options.tokens = 512;
  const Graph graph = graph_of(preset("qwen3.5-27b")).body;
  const int64_t planned = compiled(graph, options).arena_bytes;
  options.passes.disabled = {"plan_memory"};
  EXPECT_LT(planned * 20, compiled(graph, options).arena_bytes);
}

}  // namespace
}  // namespace tokenspeed::model
