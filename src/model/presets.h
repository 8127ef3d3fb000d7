// The eight official Qwen3.5 sizes by name, for planning and benchmarks without any file.
#pragma once

#include <span>
#include <string_view>

#include "base/status.h"
#include "compile/model_config.h"

namespace tokenspeed::model {

// "qwen3.5-0.8b" ... "qwen3.5-397b-a17b", smallest first.
std::span<const std::string_view> preset_names();

// not_found lists the names.
Result<compile::ModelConfig> find_preset(std::string_view name);

// Whether the size has an official FP8 release (27B and up). False for names that are no presets.
bool preset_has_fp8_release(std::string_view name);

}  // namespace tokenspeed::model
