// From model flags to a Runner: reads the model, chooses the device and builds the runner. Used by serving and bench.
// Flags are named as vLLM names them.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "model/loader.h"
#include "runtime/runner.h"

namespace tokenspeed::app {

struct ModelFlags {
  std::string model;                    // directory, demo or preset
  std::string load_format = "auto";     // auto, safetensors, dummy
  std::string device = "auto";          // auto, cpu, cuda
  std::string dtype = "auto";           // auto, bfloat16, float32, fp8
  std::string kv_cache_dtype = "auto";  // auto (as activations), bfloat16, fp8, float32
  int32_t max_model_length = 0;         // 0: the model's
  int32_t max_sequences = 64;
  int32_t max_step_tokens = 0;  // 0: what suits the device
  int32_t page_size = 64;
  int64_t kv_cache_bytes = 0;  // 0: from free memory
  int32_t threads = 0;         // CPU only; 0: one per CPU
  double gpu_memory_utilization = 0.92;
  bool debug_sync = false;
  int32_t tensor_parallel = 1;  // above 1: one rank is run alone, to measure it
  int32_t rank = 0;
};
// Adds every flag but the model itself, which commands name in their own way.
void add_model_flags(CLI::App* command, ModelFlags* flags);

Result<model::LoadedModel> load_model(const ModelFlags& flags);
// Tokens a sequence may have. invalid_argument when the flags ask for more than the model has positions.
Result<int32_t> model_length(const compile::ModelConfig& config, const ModelFlags& flags);
// on_fault is told once when the device has failed: every request will fail from then on, the process should end.
// Errors: those of the device and the runner; invalid_argument for flags that contradict the model.
Result<std::unique_ptr<runtime::Runner>> make_runner(const model::LoadedModel& model, const ModelFlags& flags,
                                                     std::function<void(const Status&)> on_fault = {});

}  // namespace tokenspeed::app
