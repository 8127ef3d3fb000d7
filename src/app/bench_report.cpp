#include <fmt/core.h>

#include <algorithm>

#include "app/bench.h"
#include "app/phase_time.h"
#include "base/thread_pool.h"
#include "kernels/memory_bandwidth.h"
#include "model/architecture.h"

namespace tokenspeed::app {
namespace {

constexpr int64_t kBandwidthBytes = int64_t{1} << 30;
constexpr int kBandwidthRounds = 5;

// As the GPU's runner decides.
bool uses_fp8(const model::LoadedModel& model, const BenchFlags& flags) {
  return flags.device == DeviceKind::kCuda && model.config.fp8_blocks && flags.model.dtype != "bfloat16";
}

compile::CompileOptions compile_options(const model::LoadedModel& model, const BenchFlags& flags) {
  compile::CompileOptions options;
  options.rank = flags.model.rank;
  if (flags.model.dtype == "float32") options.weights = options.activation = options.kv = DType::kFloat32;
  if (flags.model.kv_cache_dtype == "fp8") options.kv = DType::kFloat8E4M3;
  if (uses_fp8(model, flags)) options.weights = DType::kFloat8E4M3;
  return options;
}

Result<compile::ModelGraph> graph_of(const model::LoadedModel& model, const BenchFlags& flags) {
  return model::build_graph(model.config, {.tensor_parallel = flags.model.tensor_parallel});
}

}  // namespace

Status resolve_device(BenchFlags* flags) {
  TS_ASSIGN_OR_RETURN(flags->device, choose_device(flags->model.device));
  flags->model.device = flags->device == DeviceKind::kCuda ? "cuda" : "cpu";
  if (flags->device == DeviceKind::kCpu && flags->model.tensor_parallel > 1) {
    return unimplemented("--tensor-parallel-size is for a GPU; leave it out on the CPU");
  }
  return {};
}

Result<double> read_bandwidth(DeviceKind device, int32_t threads) {
  if (device == DeviceKind::kCuda) return gpu_read_bandwidth();
  ThreadPool pool(threads, true);
  return kernels::cpu::measure_read_bandwidth(kBandwidthBytes, kBandwidthRounds, pool) * 1e9;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

Result<StepModel> model_step(const model::LoadedModel& model, const BenchFlags& flags, int64_t tokens,
                             int64_t context) {
  StepModel step;
  TS_ASSIGN_OR_RETURN(compile::ModelGraph graph, graph_of(model, flags));
  compile::CompileOptions options = compile_options(model, flags);
  options.tokens = tokens;
  options.logit_rows = flags.sequences;
  TS_ASSIGN_OR_RETURN(step.program, compile::compile_program(std::move(graph.body), options));
  std::string name = "cpu";
  if (flags.device == DeviceKind::kCuda) {
    TS_ASSIGN_OR_RETURN(name, gpu_name());
  }
  const auto gpu = compile::find_gpu(name);
  step.known_device = gpu.ok() || flags.device == DeviceKind::kCpu;
  TS_ASSIGN_OR_RETURN(step.device, gpu.ok() ? gpu : compile::find_device("cpu"));
  TS_ASSIGN_OR_RETURN(step.cost, compile::estimate_cost(step.program, step.device, {flags.sequences, context}));
  return step;
}

Result<double> predict_prompt(const model::LoadedModel& model, const BenchFlags& flags,
                              const compile::DeviceSpec& device, int64_t chunk) {
  TS_ASSIGN_OR_RETURN(const compile::ModelGraph graph, graph_of(model, flags));
  return compile::estimate_prompt_seconds(graph.body, compile_options(model, flags), device,
                                          int64_t{flags.sequences} * flags.input_length, chunk);
}

Result<Json> report_head(const char* what, const model::LoadedModel& model, const BenchFlags& flags) {
  std::string device = "cpu";
  if (flags.device == DeviceKind::kCuda) {
    TS_ASSIGN_OR_RETURN(device, gpu_name());
  }
  const char* dtype = uses_fp8(model, flags) ? "fp8" : flags.model.dtype == "float32" ? "float32" : "bfloat16";
  Json head = {{"bench", what}, {"model", flags.model.model}, {"device", device}, {"dtype", dtype}};
  if (flags.model.tensor_parallel > 1) {
    head["tensor_parallel_size"] = flags.model.tensor_parallel;
    head["rank_only"] = flags.model.rank;
    head["collectives"] = "left out";
  }
  head["batch_size"] = flags.sequences;
  head["input_len"] = flags.input_length;
  return head;
}

void print_report(const Json& report, bool json) {
  if (json) {
    fmt::print("{}\n", report.dump());
    return;
  }
  for (const auto& [key, value] : report.items()) {
    const std::string text = value.is_number_float() ? fmt::format("{:.6g}", value.get<double>())
                             : value.is_string()     ? value.get<std::string>()
                                                     : value.dump();
    fmt::print("{:<24}{}\n", key, text);
  }
}

Result<Json> profile(runtime::Runner& runner, const BenchFlags& flags, const compile::Cost& cost, BenchBatch& batch,
                     bool prefill) {
  std::vector<PhaseTime> phases;
  batch.run_steps_with(
      [&](std::span<const runtime::SequenceStep> steps, std::vector<runtime::SequenceResult>* results) -> Status {
        TS_ASSIGN_OR_RETURN(phases, profile_step(runner, flags.device, steps, results));
        return {};
      });
  for (int i = 0; i < 2; ++i) {  // the first one loads what single launches need
    if (prefill) batch.restart();
    TS_RETURN_IF_ERROR((prefill ? batch.prefill() : batch.decode()).status());
  }
  double all = 0;
  for (const PhaseTime& phase : phases) all += phase.seconds;
  Json table = Json::array();
  for (const PhaseTime& phase : phases) {
    double bytes = 0;
    for (const runtime::OperationPart& part : phase.parts) {
      bytes += part.share * static_cast<double>(cost.operations[static_cast<size_t>(part.operation)].bytes());
    }
    table.push_back({{"phase", phase.name},
                     {"launches", phase.launches},
                     {"us", phase.seconds * 1e6},
                     {"mb", bytes * 1e-6},
                     {"gb_s", bytes / phase.seconds * 1e-9},
                     {"time_fraction", phase.seconds / all}});
  }
  return table;
}

void print_profile(const Json& table) {
  double us = 0;
  fmt::print("\n{:<36} {:>8} {:>10} {:>10} {:>8} {:>7}\n", "phase (every launch alone)", "launches", "us", "MB", "GB/s",
             "% time");
  for (const Json& row : table) {
    us += row["us"].get<double>();
    fmt::print("{:<36} {:>8} {:>10.1f} {:>10.2f} {:>8.0f} {:>7.1f}\n", row["phase"].get<std::string>(),
               row["launches"].get<int>(), row["us"].get<double>(), row["mb"].get<double>(), row["gb_s"].get<double>(),
               100 * row["time_fraction"].get<double>());
  }
  fmt::print("{:<36} {:>8} {:>10.1f}\n", "all", "", us);
}

}  // namespace tokenspeed::app
