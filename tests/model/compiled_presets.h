// Presets compiled for tests of the compiler's results.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compile/program.h"
#include "model/architecture.h"
#include "model/presets.h"

namespace tokenspeed::model {

using namespace compile;

inline constexpr DType kBf16 = DType::kBFloat16;
inline constexpr DType kFp8 = DType::kFloat8E4M3;

inline ModelConfig preset(std::string_view name) {
  Result<ModelConfig> config = find_preset(name);
  EXPECT_TRUE(config.ok()) << config.status().message();
  return std::move(config).value();
}

inline ModelGraph graph_of(const ModelConfig& config, int32_t tensor_parallel = 1) {
  Result<ModelGraph> graph = build_graph(config, {.tensor_parallel = tensor_parallel});
  EXPECT_TRUE(graph.ok()) << graph.status().message();
  return std::move(graph).value();
}

inline Program compiled(const Graph& graph, const CompileOptions& options = {}) {
  Result<Program> program = compile_program(graph, options);
  EXPECT_TRUE(program.ok()) << program.status().message();
  return std::move(program).value();
}

inline std::vector<std::string> every_pass() { return {pass_names().begin(), pass_names().end()}; }

inline CompileOptions without(std::vector<std::string> disabled, DType weights = kBf16) {
  CompileOptions options;
  options.weights = weights;
  options.passes.disabled = std::move(disabled);
  return options;
}

inline std::map<OpKind, int> kinds(const Program& program) {
  std::map<OpKind, int> kinds;
  for (const Operation& operation : program.operations) ++kinds[operation.kind];
  return kinds;
}

}  // namespace tokenspeed::model
