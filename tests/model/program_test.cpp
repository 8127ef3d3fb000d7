// Phases of the official sizes and the page that `plan` prints.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "compile/cost.h"
#include "compile/phases.h"
#include "compile/print.h"
#include "model/compiled_presets.h"

namespace tokenspeed::model {
namespace {

TEST(Phases, AtMostSixALayerAndTwoCollectives) {
  for (std::string_view name : preset_names()) {
    const ModelConfig config = preset(name);
    for (int32_t ranks : {1, 8}) {
      for (DType weights : {kBf16, kFp8}) {
        SCOPED_TRACE(std::string(name) + " tp " + std::to_string(ranks) + " " + std::string(dtype_name(weights)));
        const ModelGraph graph = graph_of(config, ranks);
        for (const Graph* part : {&graph.body, &graph.mtp}) {
          const std::vector<Phase> phases = group_into_phases(compiled(*part, without({}, weights)));
          const auto layers = static_cast<int32_t>(config.layers.size());
          for (int32_t layer = part == &graph.mtp ? layers : 0; layer < (part == &graph.mtp ? layers + 1 : layers);
               ++layer) {
            const PhaseCount count = count_phases(phases, layer);
            ASSERT_EQ(count.compute, config.is_moe() ? 6 : 5) << "layer " << layer;
            // The MTP layer's residual begins with a projection, not with a sum over ranks.
            const int32_t collectives = part == &graph.mtp ? 1 : 2;
            ASSERT_EQ(count.communication, ranks == 1 ? 0 : collectives) << "layer " << layer;
          }
        }
      }
    }
  }
}

// Each operation's parts stand in exactly one phase, after what they read.
TEST(Phases, CoverTheProgramInOrder) {
  ModelConfig config = preset("qwen3.5-35b-a3b");
  config.layers.resize(4);
  for (int32_t ranks : {1, 2}) {
    const ModelGraph graph = graph_of(config, ranks);
    for (const Graph* part : {&graph.body, &graph.mtp}) {
      const Program program = compiled(*part);
      std::map<int32_t, int> parts;
      std::set<int32_t> written;
      if (program.hidden_in != kNone) written.insert(program.hidden_in);
      for (const Phase& phase : group_into_phases(program)) {
        EXPECT_TRUE(!phase.communication || phase.steps.size() == 1);
        for (const PhaseStep& step : phase.steps) {
          const Operation& operation = program.operations[step.operation];
          ++parts[step.operation];
          if (step.part == PhasePart::kDown || step.part == PhasePart::kNorm) {
            EXPECT_EQ(parts[step.operation], 2);
          } else {
            for (int32_t id : operation.inputs) {
              EXPECT_TRUE(written.contains(program.values[id].root)) << operation.name << " reads too early";
            }
          }
          if (step.part == PhasePart::kGateUp || step.part == PhasePart::kResidual) continue;
          for (int32_t id : operation.outputs) written.insert(program.values[id].root);
        }
      }
      for (int32_t i = 0; i < static_cast<int32_t>(program.operations.size()); ++i) {
        const Operation& operation = program.operations[i];
        const bool two =
            operation.kind == OpKind::kExperts || (operation.kind == OpKind::kRmsNorm && operation.inputs.size() == 2);
        EXPECT_EQ(parts[i], two ? 2 : 1) << operation.name;
      }
    }
  }
}

TEST(PrintPlan, IsATerminalPage) {
  const DeviceSpec device = *find_device("h100");
  for (std::string_view name : preset_names()) {
    for (int32_t ranks : {1, 8}) {
      const ModelGraph graph = graph_of(preset(name), ranks);
      for (const Graph* part : {&graph.body, &graph.mtp}) {
        const Program program = compiled(*part, without({}, kFp8));
        const std::string page = print_plan(program, device, *estimate_cost(program, device, {.context = 50000}));
        std::istringstream lines(page);
        int count = 0;
        for (std::string line; std::getline(lines, line); ++count) EXPECT_LE(line.size(), 120u) << line;
        EXPECT_LE(count, 80) << page;
      }
    }
  }
}

TEST(PrintPlan, ShowsThe397BRankOfEight) {
  const DeviceSpec device = *find_device("h100");
  const Program program = compiled(graph_of(preset("qwen3.5-397b-a17b"), 8).body, without({}, kFp8));
  const Cost cost = *estimate_cost(program, device, {.price_per_hour = 2});
  const std::string page = print_plan(program, device, cost);
  for (const char* expected :
       {"qwen3.5-397b-a17b on 8 x h100", "layers 1-2, 4-6, 8-10, ..., 56-58 (44 alike",
        "layers 3, 7, 11, ..., 59 (15 alike", ": 6 phases + 2 collectives", "gdn_mixer", "all_reduce_add_rms_norm",
        "2.435 GB of weights", "50.08 GB weights", "roofline", "floor by phases", "prediction", "per million tokens",
        "fit                       yes"}) {
    EXPECT_NE(page.find(expected), std::string::npos) << expected << "\n" << page;
  }
  EXPECT_LT(cost.roofline_seconds, cost.phase_floor_seconds);
  EXPECT_LT(cost.phase_floor_seconds, cost.total.seconds);
}

}  // namespace
}  // namespace tokenspeed::model
