// From model flags to a Runner: reads the model, chooses the device and builds the runner. Used by serving and bench.
// Flags are named as vLLM names them.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "base/status.h"
#include "model/loader.h"
#include "runtime/runner.h"

namespace tokenspeed::app {

struct ModelFlags {
  std::string model;                    // directory or preset
  std::string load_format = "auto";     // auto, safetensors, dummy
  std::string device = "auto";          // auto, cpu
  std::string dtype = "auto";           // auto, bfloat16, float32
  std::string kv_cache_dtype = "auto";  // auto (that of --dtype), bfloat16, float32
  int32_t max_model_length = 0;         // 0: the model's
  int32_t max_sequences = 64;
  int32_t max_step_tokens = 512;
  int32_t page_size = 64;
  int64_t kv_cache_bytes = 0;  // 0: from free memory
  int32_t threads = 0;         // CPU only; 0: one per CPU
};
// Adds every flag but the model itself, which commands name in their own way.
void add_model_flags(CLI::App* command, ModelFlags* flags);

Result<model::LoadedModel> load_model(const ModelFlags& flags);
// Errors: those of the runner; invalid_argument for flags that contradict the model.
Result<std::unique_ptr<runtime::Runner>> make_runner(const model::LoadedModel& model, const ModelFlags& flags);

}  // namespace tokenspeed::app
