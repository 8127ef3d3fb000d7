// config.json of the Qwen3.5 family, nested (multimodal releases) or flat (text-only ones), as a checked ModelConfig.
// Keys that every release shares have those values as defaults; the sizes of a model have none and must be there.
#pragma once

#include <string>
#include <string_view>

#include "base/directory.h"
#include "base/status.h"
#include "compile/model_config.h"

namespace tokenspeed::model {

// `name` is the model's name in messages. Errors: invalid_argument names the field, its value and the limit;
// unimplemented names the feature (quantisation, rope scaling, biases ...) or lists the supported model types.
Result<compile::ModelConfig> parse_config(std::string_view json, const std::string& name);

// Reads directory/config.json, and the end-of-sequence tokens of directory/generation_config.json where there is one.
// The model is named after the directory.
Result<compile::ModelConfig> load_config(const Directory& directory);

}  // namespace tokenspeed::model
