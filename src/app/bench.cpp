#include <fmt/core.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "app/command_line.h"
#include "app/commands.h"
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
  int32_t sequences = 1;
  int32_t input_length = 0;
  int32_t output_length = 0;
  int32_t rounds = 3;
  bool json = false;
};

constexpr int64_t kBandwidthBytes = int64_t{1} << 30;
constexpr int kBandwidthRounds = 5;
constexpr int kWarmUpSteps = 3;

double read_bandwidth(int32_t threads) {
  ThreadPool pool(threads, true);
  return kernels::cpu::measure_read_bandwidth(kBandwidthBytes, kBandwidthRounds, pool);
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

// Bytes and FLOPs of one step, from the same model that `plan` prints.
Result<compile::OperationCost> step_cost(const model::LoadedModel& model, const ModelFlags& flags, int64_t tokens,
                                         int64_t sequences, int64_t context) {
  TS_ASSIGN_OR_RETURN(compile::ModelGraph graph, model::build_graph(model.config));
  compile::CompileOptions options;
  options.tokens = tokens;
  options.logit_rows = sequences;
  if (flags.dtype == "float32") options.weights = options.activation = options.kv = DType::kFloat32;
  TS_ASSIGN_OR_RETURN(const compile::Program program, compile::compile_program(std::move(graph.body), options));
  TS_ASSIGN_OR_RETURN(const compile::DeviceSpec device, compile::find_device("cpu"));
  TS_ASSIGN_OR_RETURN(const compile::Cost cost,
                      compile::estimate_cost(program, device, {.sequences = sequences, .context = context}));
  return cost.total;
}

Json report_head(const char* what, const BenchFlags& flags) {
  return {{"bench", what},
          {"model", flags.model.model},
          {"device", "cpu"},
          {"dtype", flags.model.dtype == "float32" ? "float32" : "bfloat16"},
          {"batch_size", flags.sequences},
          {"input_len", flags.input_length}};
}

Status run_decode(BenchFlags flags) {
  flags.model.max_sequences = flags.sequences;
  const double bandwidth = read_bandwidth(flags.model.threads);
  TS_ASSIGN_OR_RETURN(const model::LoadedModel model, load_model(flags.model));
  TS_ASSIGN_OR_RETURN(const auto runner, make_runner(model, flags.model));
  TS_ASSIGN_OR_RETURN(BenchBatch batch, BenchBatch::create(runner.get(), flags.sequences, flags.input_length,
                                                           kWarmUpSteps + flags.output_length));
  TS_RETURN_IF_ERROR(batch.prefill().status());
  for (int i = 0; i < kWarmUpSteps; ++i) TS_RETURN_IF_ERROR(batch.decode().status());
  std::vector<double> seconds;
  for (int32_t i = 0; i < flags.output_length; ++i) {
    TS_ASSIGN_OR_RETURN(const double one, batch.decode());
    seconds.push_back(one);
  }
  const double step = median(seconds);
  const int64_t context = flags.input_length + kWarmUpSteps + flags.output_length / 2;
  TS_ASSIGN_OR_RETURN(const compile::OperationCost cost,
                      step_cost(model, flags.model, flags.sequences, flags.sequences, context));
  const auto bytes = static_cast<double>(cost.weight_bytes + cost.cache_bytes);
  Json report = report_head("decode", flags);
  report["output_len"] = flags.output_length;
  report["tokens_per_s"] = flags.sequences / step;
  report["ms_per_step"] = step * 1e3;
  report["bytes_per_token"] = bytes / flags.sequences;
  report["read_bandwidth_gb_s"] = bandwidth;
  report["bandwidth_fraction"] = bytes / step / (bandwidth * 1e9);
  print_report(report, flags.json);
  return {};
}

Status run_prefill(BenchFlags flags) {
  flags.model.max_sequences = flags.sequences;
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
  TS_ASSIGN_OR_RETURN(const compile::OperationCost cost, step_cost(model, flags.model, tokens, flags.sequences, 0));
  Json report = report_head("prefill", flags);
  report["tokens_per_s"] = static_cast<double>(tokens) / time;
  report["time_to_first_token_ms"] = time * 1e3;
  report["gflop_per_s"] = cost.flops / time / 1e9;
  print_report(report, flags.json);
  return {};
}

CLI::App* add_model_bench(CLI::App* bench, const char* name, const char* description,
                          const std::shared_ptr<BenchFlags>& flags) {
  CLI::App* command = bench->add_subcommand(name, description);
  command->add_option("--model", flags->model.model, "Directory of a checkpoint, or the name of a preset")->required();
  command->add_option("--batch-size", flags->sequences, "Sequences run together")->check(CLI::Range(1, 4096));
  command->add_option("--input-len", flags->input_length, "Tokens of each prompt")->check(CLI::PositiveNumber);
  command->add_flag("--json", flags->json, "Print one JSON object");
  add_model_flags(command, &flags->model);
  return command;
}

void add_membw(CLI::App* bench, int* exit_code) {
  const auto flags = std::make_shared<BenchFlags>();
  CLI::App* command = bench->add_subcommand("membw", "Read bandwidth of memory, all threads");
  command->add_option("--threads", flags->model.threads, "CPU threads; 0: one per CPU")->check(CLI::Range(0, 1024));
  command->add_flag("--json", flags->json, "Print one JSON object");
  set_action(command, exit_code, [flags]() -> Status {
    print_report({{"bench", "membw"}, {"device", "cpu"}, {"read_bandwidth_gb_s", read_bandwidth(flags->model.threads)}},
                 flags->json);
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
  set_action(command, exit_code, [decode] { return run_decode(*decode); });
  const auto prefill = std::make_shared<BenchFlags>();
  prefill->input_length = 512;
  command = add_model_bench(bench, "prefill", "Time to first token and GFLOP/s of a prompt", prefill);
  command->add_option("--rounds", prefill->rounds, "Timed repetitions; the median counts")->check(CLI::Range(1, 1000));
  set_action(command, exit_code, [prefill] { return run_prefill(*prefill); });
  add_membw(bench, exit_code);
}

}  // namespace tokenspeed::app
