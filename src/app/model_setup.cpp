#include "app/model_setup.h"

#include <algorithm>
#include <utility>

#include "app/device.h"
#include "app/embedded_model.h"
#include "model/architecture.h"
#include "model/dummy_weights.h"
#include "runtime/cpu_runner.h"

namespace tokenspeed::app {
namespace {

DType dtype_of(const std::string& name, DType when_auto) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "fp8") return DType::kFloat8E4M3;
  return when_auto;
}

constexpr int32_t kCpuStepTokens = 512;

// A preset in the form of its FP8 release, or a checkpoint's configuration with such weights.
Result<model::LoadedModel> dummy_fp8_model(const std::string& name) {
  model::LoadedModel model;
  TS_ASSIGN_OR_RETURN(model.config, load_model_config(name));
  model.config.fp8_blocks = true;
  TS_ASSIGN_OR_RETURN(model.weights, model::DummyWeights::create(model.config));
  return model;
}

Result<std::unique_ptr<runtime::Runner>> make_cpu_runner(const model::LoadedModel& model, const ModelFlags& flags) {
  if (flags.dtype == "fp8") {
    return invalid_argument("the CPU computes FP8 checkpoints in bfloat16; give --dtype auto");
  }
  runtime::CpuRunnerOptions options;
  options.weights = options.activation = dtype_of(flags.dtype, DType::kBFloat16);
  options.kv = dtype_of(flags.kv_cache_dtype, options.activation);
  options.threads = flags.threads;
  options.max_step_tokens = flags.max_step_tokens ? flags.max_step_tokens : kCpuStepTokens;
  options.max_sequences = std::min(flags.max_sequences, options.max_step_tokens);
  options.page_size = flags.page_size;
  options.kv_bytes = flags.kv_cache_bytes;
  TS_ASSIGN_OR_RETURN(options.max_model_length, model_length(model.config, flags));
  TS_ASSIGN_OR_RETURN(const compile::ModelGraph graph, model::build_graph(model.config));
  TS_ASSIGN_OR_RETURN(std::unique_ptr<runtime::Runner> runner,
                      runtime::CpuRunner::create(graph, *model.weights, options));
  return runner;
}

}  // namespace

Result<int32_t> model_length(const compile::ModelConfig& config, const ModelFlags& flags) {
  if (flags.max_model_length > config.max_position_embeddings) {
    return invalid_argument("--max-model-len " + std::to_string(flags.max_model_length) + " is over the " +
                            std::to_string(config.max_position_embeddings) + " positions of " + config.name +
                            "; give at most that");
  }
  return flags.max_model_length > 0 ? flags.max_model_length : static_cast<int32_t>(config.max_position_embeddings);
}

void add_model_flags(CLI::App* command, ModelFlags* flags) {
  command->add_option("--load-format", flags->load_format, "auto, safetensors, or dummy: seeded random weights")
      ->check(CLI::IsMember({"auto", "safetensors", "dummy"}));
  command->add_option("--device", flags->device, "auto (a GPU where one is usable), cpu or cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  command
      ->add_option("--dtype", flags->dtype,
                   "Weights: auto (the checkpoint's FP8 on a GPU, else bfloat16), bfloat16, float32 (CPU), fp8 (GPU)")
      ->check(CLI::IsMember({"auto", "bfloat16", "float32", "fp8"}));
  command
      ->add_option("--kv-cache-dtype", flags->kv_cache_dtype,
                   "Keys and values: auto (as activations), bfloat16, fp8 (e4m3, half the memory), float32 (CPU)")
      ->check(CLI::IsMember({"auto", "bfloat16", "fp8", "float32"}));
  command->add_option("--max-model-len", flags->max_model_length, "Prompt and answer together, tokens; 0: the model's")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--max-num-seqs", flags->max_sequences, "Requests running at once")->check(CLI::Range(1, 4096));
  command
      ->add_option("--max-num-batched-tokens", flags->max_step_tokens,
                   "Tokens of one step; 0: 512 on the CPU, 8192 on a GPU")
      ->check(CLI::Range(0, 65536));
  command->add_option("--block-size", flags->page_size, "Positions of one KV page")->check(CLI::Range(1, 4096));
  command->add_option("--kv-cache-memory-bytes", flags->kv_cache_bytes, "Memory of the KV pages; 0: from free memory")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--threads", flags->threads, "CPU threads; 0: one per CPU")->check(CLI::Range(0, 1024));
  command->add_option("--gpu-memory-utilization", flags->gpu_memory_utilization, "Share of the GPU's memory to take")
      ->check(CLI::Range(0.01, 1.0));
  command->add_flag_callback("--debug-faults", arm_gpu_fault_dump,
                             "A fault of the GPU names its operation; costs about half a percent");
  command->add_flag("--debug-sync", flags->debug_sync, "Wait for every GPU operation, so that a fault names it; slow");
}

Result<model::LoadedModel> load_model(const ModelFlags& flags) {
  const auto format = flags.load_format == "dummy"         ? model::LoadFormat::kDummy
                      : flags.load_format == "safetensors" ? model::LoadFormat::kSafetensors
                                                           : model::LoadFormat::kAuto;
  if (format == model::LoadFormat::kDummy && flags.dtype == "fp8") return dummy_fp8_model(flags.model);
  const Directory* embedded = embedded_model(flags.model);
  return embedded ? model::load_model(*embedded, format) : model::load_model(flags.model, format);
}

Result<std::unique_ptr<runtime::Runner>> make_runner(const model::LoadedModel& model, const ModelFlags& flags,
                                                     std::function<void(const Status&)> on_fault) {
  TS_ASSIGN_OR_RETURN(const DeviceKind device, choose_device(flags.device));
  return device == DeviceKind::kCuda ? make_gpu_runner(model, flags, std::move(on_fault))
                                     : make_cpu_runner(model, flags);
}

}  // namespace tokenspeed::app
