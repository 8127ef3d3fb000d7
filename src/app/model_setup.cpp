#include "app/model_setup.h"

#include <algorithm>

#include "model/architecture.h"
#include "runtime/cpu_runner.h"

namespace tokenspeed::app {
namespace {

DType dtype_of(const std::string& name, DType when_auto) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  return when_auto;
}

Result<int32_t> model_length(const compile::ModelConfig& config, const ModelFlags& flags) {
  if (flags.max_model_length > config.max_position_embeddings) {
    return invalid_argument("--max-model-len " + std::to_string(flags.max_model_length) + " is over the " +
                            std::to_string(config.max_position_embeddings) + " positions of " + config.name +
                            "; give at most that");
  }
  return flags.max_model_length > 0 ? flags.max_model_length : static_cast<int32_t>(config.max_position_embeddings);
}

}  // namespace

void add_model_flags(CLI::App* command, ModelFlags* flags) {
  command->add_option("--load-format", flags->load_format, "auto, safetensors, or dummy: seeded random weights")
      ->check(CLI::IsMember({"auto", "safetensors", "dummy"}));
  command->add_option("--device", flags->device, "auto or cpu")->check(CLI::IsMember({"auto", "cpu"}));
  command->add_option("--dtype", flags->dtype, "Weights and activations: auto (bfloat16), bfloat16 or float32")
      ->check(CLI::IsMember({"auto", "bfloat16", "float32"}));
  command->add_option("--kv-cache-dtype", flags->kv_cache_dtype, "auto (that of --dtype), bfloat16 or float32")
      ->check(CLI::IsMember({"auto", "bfloat16", "float32"}));
  command->add_option("--max-model-len", flags->max_model_length, "Prompt and answer together, tokens; 0: the model's")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--max-num-seqs", flags->max_sequences, "Requests running at once")->check(CLI::Range(1, 4096));
  command->add_option("--max-num-batched-tokens", flags->max_step_tokens, "Tokens of one step")
      ->check(CLI::Range(1, 65536));
  command->add_option("--block-size", flags->page_size, "Positions of one KV page")->check(CLI::Range(1, 4096));
  command->add_option("--kv-cache-memory-bytes", flags->kv_cache_bytes, "Memory of the KV pages; 0: from free memory")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--threads", flags->threads, "CPU threads; 0: one per CPU")->check(CLI::Range(0, 1024));
}

Result<model::LoadedModel> load_model(const ModelFlags& flags) {
  const auto format = flags.load_format == "dummy"         ? model::LoadFormat::kDummy
                      : flags.load_format == "safetensors" ? model::LoadFormat::kSafetensors
                                                           : model::LoadFormat::kAuto;
  return model::load_model(flags.model, format);
}

Result<std::unique_ptr<runtime::Runner>> make_runner(const model::LoadedModel& model, const ModelFlags& flags) {
  runtime::CpuRunnerOptions options;
  options.weights = options.activation = dtype_of(flags.dtype, DType::kBFloat16);
  options.kv = dtype_of(flags.kv_cache_dtype, options.activation);
  options.threads = flags.threads;
  options.max_step_tokens = flags.max_step_tokens;
  options.max_sequences = std::min(flags.max_sequences, flags.max_step_tokens);
  options.page_size = flags.page_size;
  options.kv_bytes = flags.kv_cache_bytes;
  TS_ASSIGN_OR_RETURN(options.max_model_length, model_length(model.config, flags));
  TS_ASSIGN_OR_RETURN(const compile::ModelGraph graph, model::build_graph(model.config));
  TS_ASSIGN_OR_RETURN(std::unique_ptr<runtime::Runner> runner,
                      runtime::CpuRunner::create(graph, *model.weights, options));
  return runner;
}

}  // namespace tokenspeed::app
