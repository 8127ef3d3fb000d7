#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "app/command_line.h"
#include "app/commands.h"
#include "app/device.h"
#include "app/model_setup.h"
#include "app/runner_bench.h"
#include "base/thread_pool.h"
#include "compile/cost.h"
#include "compile/program.h"
#include "kernels/memory_bandwidth.h"
#include "model/architecture.h"

namespace tokenspeed::app {
namespace {

using Json = nlohmann::ordered_json;

struct BenchFlags {
  ModelFlags model;
  DeviceKind device = DeviceKind::kCpu;
  bool profile = false;
  int32_t sequences = 1;
  int32_t input_length = 0;
  int32_t output_length = 0;
  int32_t rounds = 3;
  float temperature = 0;
  bool json = false;
};

constexpr int64_t kBandwidthBytes = int64_t{1} << 30;
constexpr int kBandwidthRounds = 5;
constexpr int kWarmUpSteps = 3;

// Bytes per second.
Result<double> read_bandwidth(DeviceKind device, int32_t threads) {
  if (device == DeviceKind::kCuda) return gpu_read_bandwidth();
  ThreadPool pool(threads, true);
  return kernels::cpu::measure_read_bandwidth(kBandwidthBytes, kBandwidthRounds, pool) * 1e9;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// One JSON object, or a line per entry.
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

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// As the GPU's runner decides.
bool uses_fp8(const model::LoadedModel& model, const BenchFlags& flags) {
  return flags.device == DeviceKind::kCuda && model.config.fp8_blocks && flags.model.dtype != "bfloat16";
}

// Bytes and FLOPs of a step and its operations, from the same model that `plan` prints.
Result<compile::Cost> step_cost(const model::LoadedModel& model, const BenchFlags& flags, int64_t tokens,
                                int64_t context) {
  TS_ASSIGN_OR_RETURN(compile::ModelGraph graph,
                      model::build_graph(model.config, {.tensor_parallel = flags.model.tensor_parallel}));
  compile::CompileOptions options;
  options.rank = flags.model.rank;
  options.tokens = tokens;
  options.logit_rows = flags.sequences;
  if (flags.model.dtype == "float32") options.weights = options.activation = options.kv = DType::kFloat32;
  if (uses_fp8(model, flags)) options.weights = DType::kFloat8E4M3;
  TS_ASSIGN_OR_RETURN(const compile::Program program, compile::compile_program(std::move(graph.body), options));
  TS_ASSIGN_OR_RETURN(const compile::DeviceSpec device, compile::find_device("cpu"));
  return compile::estimate_cost(program, device, {flags.sequences, context});
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

// Repeats one step of the batch (or a prompt) with a time for every launch. Bytes are the cost model's.
Result<Json> profile(runtime::Runner& runner, const compile::Cost& cost, BenchBatch& batch, bool prefill) {
  std::vector<PhaseTime> phases;
  batch.run_steps_with(
      [&](std::span<const runtime::SequenceStep> steps, std::vector<runtime::SequenceResult>* results) -> Status {
        TS_ASSIGN_OR_RETURN(phases, profile_step(runner, steps, results));
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
    for (const auto& [operation, share] : phase.parts) {
      bytes += share * static_cast<double>(cost.operations[static_cast<size_t>(operation)].bytes());
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

void finish_report(const Json& report, const Json& table, const BenchFlags& flags) {
  Json whole = report;
  if (flags.json && flags.profile) whole["profile"] = table;
  print_report(whole, flags.json);
  if (!flags.json && flags.profile) print_profile(table);
}

Status prepare(BenchFlags* flags) {
  flags->model.max_sequences = flags->sequences;
  TS_ASSIGN_OR_RETURN(flags->device, choose_device(flags->model.device));
  flags->model.device = flags->device == DeviceKind::kCuda ? "cuda" : "cpu";
  if (flags->device == DeviceKind::kCpu && (flags->profile || flags->model.tensor_parallel > 1)) {
    return unimplemented("--profile and --tensor-parallel-size are for a GPU; leave them out on the CPU");
  }
  return {};
}

Status run_decode(BenchFlags flags) {
  TS_RETURN_IF_ERROR(prepare(&flags));
  TS_ASSIGN_OR_RETURN(const double bandwidth, read_bandwidth(flags.device, flags.model.threads));
  const auto start = std::chrono::steady_clock::now();
  TS_ASSIGN_OR_RETURN(const model::LoadedModel model, load_model(flags.model));
  TS_ASSIGN_OR_RETURN(const auto runner, make_runner(model, flags.model));
  const double load_seconds = seconds_since(start);
  TS_ASSIGN_OR_RETURN(BenchBatch batch, BenchBatch::create(runner.get(), flags.sequences, flags.input_length,
                                                           2 * kWarmUpSteps + flags.output_length));
  batch.set_temperature(flags.temperature);
  TS_RETURN_IF_ERROR(batch.prefill().status());
  const double first_token_seconds = seconds_since(start);
  for (int i = 0; i < kWarmUpSteps; ++i) TS_RETURN_IF_ERROR(batch.decode().status());
  std::vector<double> seconds;
  for (int32_t i = 0; i < flags.output_length; ++i) {
    TS_ASSIGN_OR_RETURN(const double one, batch.decode());
    seconds.push_back(one);
  }
  const double step = median(seconds);
  const int64_t context = flags.input_length + kWarmUpSteps + flags.output_length / 2;
  TS_ASSIGN_OR_RETURN(const compile::Cost cost, step_cost(model, flags, flags.sequences, context));
  const auto bytes = static_cast<double>(cost.total.weight_bytes + cost.total.cache_bytes);
  TS_ASSIGN_OR_RETURN(Json report, report_head("decode", model, flags));
  report["output_len"] = flags.output_length;
  report["tokens_per_s"] = flags.sequences / step;
  report["ms_per_step"] = step * 1e3;
  report["bytes_per_token"] = bytes / flags.sequences;
  report["read_bandwidth_gb_s"] = bandwidth * 1e-9;
  report["bandwidth_fraction"] = bytes / step / bandwidth;
  report["load_s"] = load_seconds;
  report["start_to_first_token_s"] = first_token_seconds;
  Json table;
  if (flags.profile) {
    TS_ASSIGN_OR_RETURN(table, profile(*runner, cost, batch, false));
  }
  finish_report(report, table, flags);
  return {};
}

Status run_prefill(BenchFlags flags) {
  TS_RETURN_IF_ERROR(prepare(&flags));
  TS_ASSIGN_OR_RETURN(const model::LoadedModel model, load_model(flags.model));
  TS_ASSIGN_OR_RETURN(const auto runner, make_runner(model, flags.model));
  TS_ASSIGN_OR_RETURN(BenchBatch batch, BenchBatch::create(runner.get(), flags.sequences, flags.input_length, 1));
  TS_RETURN_IF_ERROR(batch.prefill().status());  // warms caches and pages
  std::vector<double> seconds;
  for (int32_t i = 0; i < flags.rounds; ++i) {
    batch.restart();
    TS_ASSIGN_OR_RETURN(const double one, batch.prefill());
    seconds.push_back(one);
  }
  const double time = median(seconds);
  const int64_t tokens = int64_t{flags.sequences} * flags.input_length;
  TS_ASSIGN_OR_RETURN(const compile::Cost cost, step_cost(model, flags, tokens, 0));
  TS_ASSIGN_OR_RETURN(Json report, report_head("prefill", model, flags));
  report["tokens_per_s"] = static_cast<double>(tokens) / time;
  report["time_to_first_token_ms"] = time * 1e3;
  report["gflop_per_s"] = cost.total.flops / time / 1e9;
  Json table;
  if (flags.profile) {
    if (tokens > runner->capacity().max_step_tokens) {
      return invalid_argument("--profile times one step, and the prompts have " + std::to_string(tokens) +
                              " tokens; raise --max-num-batched-tokens to as many");
    }
    TS_ASSIGN_OR_RETURN(table, profile(*runner, cost, batch, true));
  }
  finish_report(report, table, flags);
  return {};
}

CLI::App* add_model_bench(CLI::App* bench, const char* name, const char* description,
                          const std::shared_ptr<BenchFlags>& flags) {
  CLI::App* command = bench->add_subcommand(name, description);
  command->add_option("--model", flags->model.model, "Directory of a checkpoint, demo, or the name of a preset")
      ->required();
  command->add_option("--batch-size", flags->sequences, "Sequences run together")->check(CLI::Range(1, 4096));
  command->add_option("--input-len", flags->input_length, "Tokens of each prompt")->check(CLI::PositiveNumber);
  command->add_flag("--json", flags->json, "Print one JSON object");
  command->add_flag("--profile", flags->profile, "Then time each kind of operation of a step alone (GPU)");
  add_model_flags(command, &flags->model);
  CLI::Option* ranks = command->add_option("--tensor-parallel-size,--tp", flags->model.tensor_parallel,
                                           "Ranks of a layout of which one is measured (GPU)");
  command
      ->add_option("--rank-only", flags->model.rank,
                   "That rank; the work of the others and the collectives are left out")
      ->check(CLI::NonNegativeNumber)
      ->needs(ranks);
  ranks->check(CLI::Range(1, 64));
  return command;
}

void add_membw(CLI::App* bench, int* exit_code) {
  const auto flags = std::make_shared<BenchFlags>();
  flags->model.device = "cpu";
  CLI::App* command = bench->add_subcommand("membw", "Read bandwidth of memory, all threads");
  command->add_option("--device", flags->model.device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}));
  command->add_option("--threads", flags->model.threads, "CPU threads; 0: one per CPU")->check(CLI::Range(0, 1024));
  command->add_flag("--json", flags->json, "Print one JSON object");
  set_action(command, exit_code, [flags]() -> Status {
    TS_ASSIGN_OR_RETURN(const DeviceKind device, choose_device(flags->model.device));
    TS_ASSIGN_OR_RETURN(const double bandwidth, read_bandwidth(device, flags->model.threads));
    std::string name = "cpu";
    if (device == DeviceKind::kCuda) {
      TS_ASSIGN_OR_RETURN(name, gpu_name());
    }
    print_report({{"bench", "membw"}, {"device", name}, {"read_bandwidth_gb_s", bandwidth * 1e-9}}, flags->json);
    return {};
  });
}

}  // namespace

void add_bench_command(CLI::App& program, int* exit_code) {
  CLI::App* bench = program.add_subcommand("bench", "Measure this machine: decode, prefill or membw");
  bench->require_subcommand(1);
  const auto decode = std::make_shared<BenchFlags>();
  decode->input_length = 32;
  decode->output_length = 64;
  CLI::App* command = add_model_bench(bench, "decode", "Tokens per second and share of the read bandwidth", decode);
  command->add_option("--output-len", decode->output_length, "Timed steps")->check(CLI::PositiveNumber);
  command->add_option("--temperature", decode->temperature, "Of the sampled tokens; 0: greedy")
      ->check(CLI::NonNegativeNumber);
  set_action(command, exit_code, [decode] { return run_decode(*decode); });
  const auto prefill = std::make_shared<BenchFlags>();
  prefill->input_length = 512;
  command = add_model_bench(bench, "prefill", "Time to first token and GFLOP/s of a prompt", prefill);
  command->add_option("--rounds", prefill->rounds, "Timed repetitions; the median counts")->check(CLI::Range(1, 1000));
  set_action(command, exit_code, [prefill] { return run_prefill(*prefill); });
  add_membw(bench, exit_code);
}

}  // namespace tokenspeed::app
