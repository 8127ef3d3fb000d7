// From what the user names - a model directory or a preset - to a configuration with its weights.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "base/directory.h"
#include "base/status.h"
#include "compile/model_config.h"
#include "compile/weight_source.h"

namespace tokenspeed::model {

enum class LoadFormat : uint8_t {
  kAuto,  // the directory's safetensors
  kSafetensors,
  kDummy,  // seeded random weights
};

struct LoadedModel {
  compile::ModelConfig config;
  std::unique_ptr<compile::WeightSource> weights;
  std::optional<Directory> directory;  // none for a preset
};

// The configuration alone; a directory goes before a preset of the same name. Errors: those of load_config; not_found
// lists the presets.
Result<compile::ModelConfig> load_model_config(const std::string& name_or_directory);

// Every tensor of the model is there with the right shape, or it is an error that names the tensor. The configuration
// is adjusted to the files: no MTP layer where they lack it, FP8 blocks where they have them.
// Errors: those of load_model_config and Checkpoint::open; failed_precondition for a preset unless random weights are
// asked for; data_loss when config.json and the weights do not belong together.
Result<LoadedModel> load_model(const std::string& name_or_directory, LoadFormat format);
// The same from a directory that is known to be one, or is embedded in the program.
Result<LoadedModel> load_model(const Directory& directory, LoadFormat format);

}  // namespace tokenspeed::model
