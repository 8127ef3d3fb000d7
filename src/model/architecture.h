// From a model's configuration to its Graph: the decoder of docs/model.md as modules with placements, and its MTP
// layer.
#pragma once

#include "base/status.h"
#include "compile/graph.h"
#include "compile/model_config.h"

namespace tokenspeed::model {

struct GraphOptions {
  int32_t tensor_parallel = 1;
};

// Declares every logical operation of the model once, with the weights under their canonical names and the rules by
// which tensor-parallel ranks slice them. Errors: invalid_argument when heads, widths or the vocabulary do not divide
// by tensor_parallel.
Result<compile::ModelGraph> build_graph(const compile::ModelConfig& config, const GraphOptions& options = {});

}  // namespace tokenspeed::model
