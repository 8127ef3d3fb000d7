// Weights that make a sequence fail: what a NaN in a checkpoint does to the requests that meet it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "compile/weight_source.h"
#include "runtime/test_model.h"

namespace tokenspeed::runtime {

// Another source with one row of the embedding replaced by a value that spreads through every layer.
class PoisonedSource : public compile::WeightSource {
 public:
  PoisonedSource(const compile::WeightSource& source, int32_t token, float poison) : source_(source) {
    const compile::WeightView view = must(source.view(kTensor));
    const int64_t columns = view.shape[1];
    table_.resize(static_cast<size_t>(view.shape[0] * columns));
    compile::read_rows_as_float(view, 0, view.shape[0], table_.data());
    std::fill_n(table_.begin() + token * columns, columns, poison);
  }
  bool has(const std::string& name) const override { return source_.has(name); }
  Result<compile::WeightView> view(const std::string& name) const override {
    TS_ASSIGN_OR_RETURN(compile::WeightView view, source_.view(name));
    if (name != kTensor) return view;
    view.data = reinterpret_cast<const std::byte*>(table_.data());
    view.dtype = DType::kFloat32;
    return view;
  }

 private:
  static constexpr const char* kTensor = "embed_tokens.weight";
  const compile::WeightSource& source_;
  std::vector<float> table_;
};

}  // namespace tokenspeed::runtime
