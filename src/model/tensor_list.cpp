#include "model/tensor_list.h"

#include <set>

namespace tokenspeed::model {

std::string TensorSpec::name_of(int64_t index) const {
  const size_t star = name.find('*');
  if (star == std::string::npos) return name;
  return name.substr(0, star) + std::to_string(index) + name.substr(star + 1);
}

std::vector<TensorSpec> list_tensors(const compile::ModelGraph& graph) {
  std::vector<TensorSpec> tensors;
  std::set<std::string> seen;
  for (const compile::Graph* part_of_model : {&graph.body, &graph.mtp}) {
    for (const compile::Weight& weight : part_of_model->weights) {
      for (const compile::WeightPart& part : weight.parts) {
        if (!seen.insert(part.tensor).second) continue;
        tensors.push_back(
            {part.tensor, part.tensor_rows, weight.columns, weight.count, weight.form, weight.quantizable});
      }
    }
  }
  return tensors;
}

}  // namespace tokenspeed::model
