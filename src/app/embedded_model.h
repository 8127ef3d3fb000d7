// The demo model, which the program carries in itself: commands that take a model know it as "demo" wherever they run.
// A directory of that name is reached as "./demo". Cost: its pages are read from the program's file when touched.
#pragma once

#include <string>

#include "base/directory.h"
#include "base/status.h"
#include "compile/model_config.h"

namespace tokenspeed::app {

constexpr const char* kEmbeddedModel = "demo";

// Null when `model` is not the name of the embedded model.
const Directory* embedded_model(const std::string& model);
// The embedded model's files, or the directory of that path.
Directory model_directory(const std::string& model);
// That of the embedded model, a directory or a preset. Errors: those of model::load_model_config.
Result<compile::ModelConfig> load_model_config(const std::string& model);

}  // namespace tokenspeed::app
