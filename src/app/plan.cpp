#include <fmt/core.h>

#include "app/command_line.h"
#include "app/commands.h"
#include "app/embedded_model.h"
#include "compile/cost.h"
#include "compile/device.h"
#include "compile/print.h"
#include "compile/program.h"
#include "model/architecture.h"
#include "model/loader.h"
#include "model/presets.h"

namespace tokenspeed::app {
namespace {

constexpr int64_t kPromptStep = 8192;  // as a runner on a GPU has it by default

struct PlanFlags {
  std::string model;
  std::string device = "h100";
  std::string dtype = "auto";
  std::string kv_cache_dtype = "auto";
  int32_t tensor_parallel = 1;
  int32_t rank = 0;
  compile::Workload workload;
  compile::PassOptions passes;
};

// The form a model is served in: its checkpoint's, or for a preset the smallest official release.
DType planned_weights(const PlanFlags& flags, const compile::ModelConfig& config) {
  if (flags.dtype == "bfloat16") return DType::kBFloat16;
  if (flags.dtype == "float32") return DType::kFloat32;
  const bool fp8 = flags.dtype == "fp8" || config.fp8_blocks || model::preset_has_fp8_release(flags.model);
  return fp8 ? DType::kFloat8E4M3 : DType::kBFloat16;
}

Status run(const PlanFlags& flags) {
  TS_ASSIGN_OR_RETURN(const compile::ModelConfig config, load_model_config(flags.model));
  TS_ASSIGN_OR_RETURN(const compile::DeviceSpec device, compile::find_device(flags.device));
  TS_ASSIGN_OR_RETURN(const compile::ModelGraph graph,
                      model::build_graph(config, {.tensor_parallel = flags.tensor_parallel}));
  compile::CompileOptions options;
  options.rank = flags.rank;
  options.weights = planned_weights(flags, config);
  if (options.weights == DType::kFloat32) options.activation = DType::kFloat32;
  options.kv = flags.kv_cache_dtype == "fp8" ? DType::kFloat8E4M3 : DType::kBFloat16;
  options.tokens = flags.workload.sequences;
  options.logit_rows = flags.workload.sequences;
  options.passes = flags.passes;
  TS_ASSIGN_OR_RETURN(const compile::Program program, compile::compile_program(graph.body, options));
  TS_ASSIGN_OR_RETURN(const compile::Cost cost, compile::estimate_cost(program, device, flags.workload));
  fmt::print("{}", compile::print_plan(program, device, cost));
  if (flags.workload.context == 0) return {};
  TS_ASSIGN_OR_RETURN(const double prompt, compile::estimate_prompt_seconds(graph.body, options, device,
                                                                            flags.workload.context, kPromptStep));
  fmt::print("prompt                    {:.1f} ms to the first token of a prompt of {} tokens, in steps of {}\n",
             prompt * 1e3, flags.workload.context, kPromptStep);
  return {};
}

std::string joined(auto&& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

}  // namespace

void add_plan_command(CLI::App& program, int* exit_code) {
  const auto flags = std::make_shared<PlanFlags>();
  CLI::App* command = program.add_subcommand("plan", "Print what a model becomes on a device: operations, bytes, time");
  command->add_option("model", flags->model, "Directory, demo, or preset: " + joined(model::preset_names()))
      ->required();
  command->add_option("--device", flags->device, joined(compile::device_names()));
  command
      ->add_option("--dtype", flags->dtype,
                   "Weights: auto (the model's smallest official form), fp8, bfloat16, float32")
      ->check(CLI::IsMember({"auto", "fp8", "bfloat16", "float32"}));
  command->add_option("--kv-cache-dtype", flags->kv_cache_dtype, "Keys and values: auto (bfloat16), bfloat16, fp8")
      ->check(CLI::IsMember({"auto", "bfloat16", "fp8"}));
  command->add_option("--tensor-parallel-size,--tp", flags->tensor_parallel, "Ranks of tensor parallelism")
      ->check(CLI::Range(1, 64));
  command->add_option("--rank", flags->rank, "Rank whose Program is shown")->check(CLI::NonNegativeNumber);
  command->add_option("--batch-size", flags->workload.sequences, "Sequences of the step, a token each")
      ->check(CLI::Range(1, 4096));
  command->add_option("--input-len", flags->workload.context, "Tokens before each sequence's new one")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--price-per-hour", flags->workload.price_per_hour, "Of one device, for the price of tokens")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--disable-pass", flags->passes.disabled, "Leave out a pass: " + joined(compile::pass_names()));
  set_action(command, exit_code, [flags] { return run(*flags); });
}

}  // namespace tokenspeed::app
