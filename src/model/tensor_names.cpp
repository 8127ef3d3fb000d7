#include "model/tensor_names.h"

#include <charconv>

namespace tokenspeed::model {

bool is_vision_tensor(std::string_view file_name) {
  return file_name.starts_with("model.visual.") || file_name.starts_with("visual.");
}

std::string_view canonical_name(std::string_view file_name) {
  for (const std::string_view prefix : {"model.language_model.", "model."}) {
    if (file_name.starts_with(prefix)) return file_name.substr(prefix.size());
  }
  return file_name;
}

std::optional<ExpertTensor> parse_expert_tensor(std::string_view name) {
  constexpr std::string_view kExperts = ".experts.";
  constexpr std::string_view kWeight = ".weight";
  const size_t found = name.find(kExperts);
  if (found == std::string_view::npos || !name.ends_with(kWeight)) return std::nullopt;
  ExpertTensor tensor;
  tensor.prefix = name.substr(0, found + kExperts.size());
  const std::string_view rest = name.substr(tensor.prefix.size());
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), tensor.expert);
  const size_t digits = static_cast<size_t>(end - rest.data());
  if (error != std::errc() || tensor.expert < 0 || digits >= rest.size() || rest[digits] != '.') return std::nullopt;
  if (rest.size() < digits + 1 + kWeight.size()) return std::nullopt;
  tensor.projection = rest.substr(digits + 1, rest.size() - digits - 1 - kWeight.size());
  return tensor;
}

}  // namespace tokenspeed::model
