#include "app/device.h"

#include <algorithm>
#include <utility>

#include "app/phase_time.h"
#include "kernels/cuda/memory_bandwidth.h"
#include "model/architecture.h"
#include "runtime/cuda/cuda_runner.h"
#include "runtime/cuda/fault_dump.h"

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
    return invalid_argument("the GPU keeps keys and values as bfloat16 or FP8; give --kv-cache-dtype auto or fp8");
  }
  runtime::CudaRunnerOptions options;
  options.kv = flags.kv_cache_dtype == "fp8" ? DType::kFloat8E4M3 : DType::kBFloat16;
  TS_ASSIGN_OR_RETURN(options.weights, weight_dtype(model.config, flags.dtype));
  TS_ASSIGN_OR_RETURN(options.max_model_length, model_length(model.config, flags));
  options.max_step_tokens = flags.max_step_tokens ? flags.max_step_tokens : kStepTokens;
  options.max_sequences = std::min(flags.max_sequences, options.max_step_tokens);
  options.page_size = flags.page_size;
  options.kv_bytes = flags.kv_cache_bytes;
  options.memory_fraction = flags.gpu_memory_utilization;
  options.debug_sync = options.operations_apart = flags.debug_sync;
  options.on_fault = std::move(on_fault);
  options.rank_only = flags.tensor_parallel > 1;
  options.rank = flags.rank;
  TS_ASSIGN_OR_RETURN(const compile::ModelGraph graph,
                      model::build_graph(model.config, {.tensor_parallel = flags.tensor_parallel}));
  TS_ASSIGN_OR_RETURN(std::unique_ptr<runtime::Runner> runner,
                      runtime::CudaRunner::create(graph, *model.weights, options));
  return runner;
}

void arm_gpu_fault_dump() { runtime::arm_fault_dump(); }

Result<std::pair<uint64_t, uint64_t>> gpu_step_times(const runtime::Runner& runner) {
  TS_ASSIGN_OR_RETURN(const auto times, static_cast<const runtime::CudaRunner&>(runner).last_step_times());
  return std::make_pair(times.begin, times.end_before);
}

Result<std::vector<PhaseTime>> profile_gpu_step(runtime::Runner& runner,
                                                std::span<const runtime::SequenceStep> sequences,
                                                std::vector<runtime::SequenceResult>* results) {
  auto& cuda = static_cast<runtime::CudaRunner&>(runner);
  TS_ASSIGN_OR_RETURN(const std::vector<runtime::LaunchTime> launches, cuda.profile(sequences, results));
  return collect_phases(cuda.program(), launches);
}

Result<std::vector<PhaseTime>> time_gpu_kinds(runtime::Runner& runner, std::span<const runtime::SequenceStep> sequences,
                                              int32_t rounds) {
  auto& cuda = static_cast<runtime::CudaRunner&>(runner);
  TS_ASSIGN_OR_RETURN(const std::vector<runtime::LaunchTime> kinds, cuda.time_kinds(sequences, rounds));
  return collect_phases(cuda.program(), kinds);
}

}  // namespace tokenspeed::app
