// From the names tensors have in files to the canonical ones of compile::WeightSource.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace tokenspeed::model {

// True for the vision tower's tensors, which a text engine leaves alone.
bool is_vision_tensor(std::string_view file_name);

// Without the text model's prefix: "model.language_model.", as in multimodal releases, or "model.", as in text-only
// ones.
std::string_view canonical_name(std::string_view file_name);

// "layers.0.mlp.experts.7.up_proj.weight" -> {"layers.0.mlp.experts.", 7, "up_proj"}.
struct ExpertTensor {
  std::string_view prefix;
  int64_t expert = 0;
  std::string_view projection;
};
// Nothing when the name is not that of one expert's weight. The views point into `name`.
std::optional<ExpertTensor> parse_expert_tensor(std::string_view name);

}  // namespace tokenspeed::model
