#include "app/device.h"

#include <algorithm>
#include <utility>

#include "compile/print.h"
#include "kernels/cuda/memory_bandwidth.h"
#include "model/architecture.h"
#include "runtime/cuda/cuda_runner.h"

namespace tokenspeed::app {
namespace {

constexpr int64_t kBandwidthBytes = int64_t{4} << 30;
constexpr int kBandwidthRounds = 9;
constexpr int32_t kStepTokens = 8192;

Result<DType> weight_dtype(const compile::ModelConfig& config, const std::string& name) {
  if (name == "float32") {
    return invalid_argument("the GPU computes in bfloat16 and FP8; give --dtype auto, or run with --device cpu");
  }
  if (name == "fp8" && !config.fp8_blocks) {
    return invalid_argument("the weights of '" + config.name +
                            "' are not FP8 and are not quantised here; give --dtype auto, or an FP8 checkpoint");
  }
  return name != "bfloat16" && config.fp8_blocks ? DType::kFloat8E4M3 : DType::kBFloat16;
}

}  // namespace

Result<std::string> gpu_name() {
  TS_ASSIGN_OR_RETURN(const runtime::Device device, runtime::open_device(0));
  return device.name;
}

Result<double> gpu_read_bandwidth() {
  TS_RETURN_IF_ERROR(gpu_name().status());
  return kernels::cuda::measure_read_bandwidth(kBandwidthBytes, kBandwidthRounds);
}

Result<std::unique_ptr<runtime::Runner>> make_gpu_runner(const model::LoadedModel& model, const ModelFlags& flags,
                                                         std::function<void(const Status&)> on_fault) {
  if (flags.kv_cache_dtype == "float32") {
    return invalid_argument("the GPU keeps keys and values as bfloat16; give --kv-cache-dtype auto");
  }
  runtime::CudaRunnerOptions options;
  TS_ASSIGN_OR_RETURN(options.weights, weight_dtype(model.config, flags.dtype));
  TS_ASSIGN_OR_RETURN(options.max_model_length, model_length(model.config, flags));
  options.max_step_tokens = flags.max_step_tokens ? flags.max_step_tokens : kStepTokens;
  options.max_sequences = std::min(flags.max_sequences, options.max_step_tokens);
  options.page_size = flags.page_size;
  options.kv_bytes = flags.kv_cache_bytes;
  options.memory_fraction = flags.gpu_memory_utilization;
  options.debug_sync = flags.debug_sync;
  options.on_fault = std::move(on_fault);
  options.rank_only = flags.tensor_parallel > 1;
  options.rank = flags.rank;
  TS_ASSIGN_OR_RETURN(const compile::ModelGraph graph,
                      model::build_graph(model.config, {.tensor_parallel = flags.tensor_parallel}));
  TS_ASSIGN_OR_RETURN(std::unique_ptr<runtime::Runner> runner,
                      runtime::CudaRunner::create(graph, *model.weights, options));
  return runner;
}

Result<std::vector<PhaseTime>> profile_step(runtime::Runner& runner, std::span<const runtime::SequenceStep> sequences,
                                            std::vector<runtime::SequenceResult>* results) {
  auto& cuda = static_cast<runtime::CudaRunner&>(runner);
  TS_ASSIGN_OR_RETURN(const std::vector<runtime::LaunchTime> launches, cuda.profile(sequences, results));
  std::vector<PhaseTime> phases;
  for (const runtime::LaunchTime& launch : launches) {
    const std::string name = launch.parts.empty()
                                 ? "sampling"
                                 : compile::operation_label(cuda.program().operations[launch.parts[0].operation]);
    auto phase = std::find_if(phases.begin(), phases.end(), [&](const PhaseTime& p) { return p.name == name; });
    if (phase == phases.end()) {
      phases.push_back({name, 0, 0, {}});
      phase = phases.end() - 1;
    }
    ++phase->launches;
    phase->seconds += launch.seconds;
    for (const runtime::OperationPart& part : launch.parts) phase->parts.emplace_back(part.operation, part.share);
  }
  return phases;
}

}  // namespace tokenspeed::app
