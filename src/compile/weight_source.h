// Where weights come from, as the runtime sees it: tensors by their canonical names, whatever file, prefix, precision
// or expert storage they have underneath. Implemented by model's checkpoint (files) and by its dummy weights (seeded).
//
// Canonical names are those of docs/model.md without the text-model prefix: "embed_tokens.weight", "norm.weight",
// "lm_head.weight", "layers.3.self_attn.q_proj.weight", "layers.0.linear_attn.A_log",
// "layers.0.mlp.experts.7.gate_proj.weight" (experts are always addressed one by one: gate_proj, up_proj, down_proj),
// "mtp.fc.weight", "mtp.layers.0....".
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/status.h"

namespace tokenspeed::compile {

// A row-major matrix or vector that stays valid as long as its source. For float8_e4m3 `scale` holds the block scales
// [ceil(rows/128), ceil(columns/128)] converted to float32.
struct WeightView {
  const std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  const float* scale = nullptr;
};

class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual bool has(const std::string& name) const = 0;
  // not_found names the tensor and the files looked into. Thread-safe.
  virtual Result<WeightView> view(const std::string& name) const = 0;
};

// Rows [row_begin, row_begin + rows) of a matrix view (or the elements of a vector with columns = 1) as float32.
void read_rows_as_float(const WeightView& view, int64_t row_begin, int64_t rows, float* out);
// The same rounded to bfloat16; exact and fast when the view holds bfloat16.
void read_rows_as_bfloat16(const WeightView& view, int64_t row_begin, int64_t rows, BFloat16* out);

}  // namespace tokenspeed::compile
