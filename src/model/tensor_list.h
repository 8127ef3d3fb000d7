// Every tensor a model's graph reads, once, under its canonical name: what a checkpoint must hold.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "compile/graph.h"

namespace tokenspeed::model {

struct TensorSpec {
  std::string name;  // with '*' for the expert's index when count > 1 or the form is kExperts
  int64_t rows = 0;
  int64_t columns = 0;  // 1 for vectors
  int64_t count = 1;    // experts
  compile::WeightForm form = compile::WeightForm::kMatrix;
  bool quantizable = false;

  int64_t elements() const { return rows * columns; }  // of one
  std::string name_of(int64_t index) const;            // the expert's index in place of '*'
};

// Body first, then what only the MTP layer has; each name once.
std::vector<TensorSpec> list_tensors(const compile::ModelGraph& graph);

}  // namespace tokenspeed::model
