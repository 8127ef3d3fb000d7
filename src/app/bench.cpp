#include "app/bench.h"

#include <fmt/core.h>

#include <chrono>

#include "app/command_line.h"
#include "app/commands.h"
#include "app/step_overheads.h"

namespace tokenspeed::app {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void finish_report(const Json& report, const Json& table, const BenchFlags& flags) {
  Json whole = report;
  if (flags.json && flags.profile) whole["profile"] = table;
  print_report(whole, flags.json);
  if (!flags.json && flags.profile) print_profile(table);
}

Status run_decode(BenchFlags flags) {
  TS_RETURN_IF_ERROR(resolve_device(&flags));
  flags.model.max_sequences = flags.sequences;
  TS_ASSIGN_OR_RETURN(const double bandwidth, read_bandwidth(flags.device, flags.model.threads));
  const auto start = std::chrono::steady_clock::now();
  TS_ASSIGN_OR_RETURN(const model::LoadedModel model, load_model(flags.model));
  TS_ASSIGN_OR_RETURN(const auto runner, make_runner(model, flags.model));
  const double load_seconds = seconds_since(start);
  TS_ASSIGN_OR_RETURN(BenchBatch batch,
                      BenchBatch::create(runner.get(), flags.sequences, flags.input_length,
                                         2 * kWarmUpSteps + 2 * kOverheadSteps + flags.output_length));
  batch.set_temperature(flags.temperature);
  TS_RETURN_IF_ERROR(batch.prefill().status());
  const double first_token_seconds = seconds_since(start);
  for (int i = 0; i < kWarmUpSteps; ++i) TS_RETURN_IF_ERROR(batch.decode().status());
  TS_ASSIGN_OR_RETURN(std::vector<double> seconds,
                      batch.decode(flags.output_length, BenchBatch::calls_of(runner.get())));
  const double step = median(std::move(seconds));
  StepOverheads overheads(runner.get());
  if (flags.device == DeviceKind::kCuda) {
    TS_RETURN_IF_ERROR(batch.decode(kOverheadSteps, overheads.noting_gaps()).status());
    TS_RETURN_IF_ERROR(batch.decode(kOverheadSteps, overheads.noting_host_time(step)).status());
  }
  const int64_t context = flags.input_length + kWarmUpSteps + flags.output_length / 2;
  TS_ASSIGN_OR_RETURN(const StepModel modelled, model_step(model, flags, flags.sequences, context));
  const compile::Cost& cost = modelled.cost;
  const auto bytes = static_cast<double>(cost.total.weight_bytes + cost.total.cache_bytes);
  TS_ASSIGN_OR_RETURN(Json report, report_head("decode", model, flags));
  report["output_len"] = flags.output_length;
  report["tokens_per_s"] = flags.sequences / step;
  report["ms_per_step"] = step * 1e3;
  report["bytes_per_token"] = bytes / flags.sequences;
  report["read_bandwidth_gb_s"] = bandwidth * 1e-9;
  report["bandwidth_fraction"] = bytes / step / bandwidth;
  if (modelled.known_device) report["predicted_ms_per_step"] = cost.total.seconds * 1e3;
  if (flags.device == DeviceKind::kCuda) {
    report["host_us_per_step"] = overheads.host() * 1e6;
    report["gap_us"] = overheads.gap() * 1e6;
  }
  report["load_s"] = load_seconds;
  report["start_to_first_token_s"] = first_token_seconds;
  Json table;
  if (flags.profile) {
    TS_ASSIGN_OR_RETURN(table, profile(*runner, flags, cost, batch, false));
  }
  finish_report(report, table, flags);
  return {};
}

Status run_prefill(BenchFlags flags) {
  TS_RETURN_IF_ERROR(resolve_device(&flags));
  flags.model.max_sequences = flags.sequences;
  TS_ASSIGN_OR_RETURN(const model::LoadedModel model, load_model(flags.model));
  TS_ASSIGN_OR_RETURN(const auto runner, make_runner(model, flags.model));
  TS_ASSIGN_OR_RETURN(BenchBatch batch,
                      BenchBatch::create(runner.get(), flags.sequences, flags.context_length + flags.input_length, 1));
  TS_RETURN_IF_ERROR(batch.prefill().status());  // warms caches and pages
  std::vector<double> seconds;
  for (int32_t i = 0; i < flags.rounds; ++i) {
    batch.restart();
    if (flags.context_length > 0) TS_RETURN_IF_ERROR(batch.prefill(flags.context_length).status());
    TS_ASSIGN_OR_RETURN(const double one, batch.prefill());
    seconds.push_back(one);
  }
  const double time = median(seconds);
  const int64_t tokens = int64_t{flags.sequences} * flags.input_length;
  TS_ASSIGN_OR_RETURN(const StepModel modelled, model_step(model, flags, tokens, flags.context_length));
  const compile::Cost& cost = modelled.cost;
  TS_ASSIGN_OR_RETURN(Json report, report_head("prefill", model, flags));
  if (flags.context_length > 0) report["context_len"] = flags.context_length;
  report["tokens_per_s"] = static_cast<double>(tokens) / time;
  report["time_to_first_token_ms"] = time * 1e3;
  report["gflop_per_s"] = cost.total.flops / time / 1e9;
  if (modelled.known_device && flags.context_length == 0) {
    TS_ASSIGN_OR_RETURN(const double predicted,
                        predict_prompt(model, flags, modelled.device, runner->capacity().max_step_tokens));
    report["predicted_ms"] = predicted * 1e3;
  }
  Json table;
  if (flags.profile) {
    if (flags.context_length > 0) return invalid_argument("--profile times a whole prompt; leave out --context-len");
    if (tokens > runner->capacity().max_step_tokens) {
      return invalid_argument("--profile times one step, and the prompts have " + std::to_string(tokens) +
                              " tokens; raise --max-num-batched-tokens to as many");
    }
    TS_ASSIGN_OR_RETURN(table, profile(*runner, flags, cost, batch, true));
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

void add_profile(CLI::App* command, BenchFlags* flags) {
  command->add_flag("--profile", flags->profile, "Then time each kind of operation of a step, launch by launch");
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
  CLI::App* bench = program.add_subcommand("bench", "Measure this machine: decode, prefill, ops or membw");
  bench->require_subcommand(1);
  const auto decode = std::make_shared<BenchFlags>();
  decode->input_length = 32;
  decode->output_length = 64;
  CLI::App* command = add_model_bench(bench, "decode", "Tokens per second and share of the read bandwidth", decode);
  command->add_option("--output-len", decode->output_length, "Timed steps")->check(CLI::PositiveNumber);
  command->add_option("--temperature", decode->temperature, "Of the sampled tokens; 0: greedy")
      ->check(CLI::NonNegativeNumber);
  add_profile(command, decode.get());
  set_action(command, exit_code, [decode] { return run_decode(*decode); });
  const auto prefill = std::make_shared<BenchFlags>();
  prefill->input_length = 512;
  command = add_model_bench(bench, "prefill", "Time to first token and GFLOP/s of a prompt", prefill);
  command->add_option("--context-len", prefill->context_length, "Tokens before each prompt that are in memory already")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--rounds", prefill->rounds, "Timed repetitions; the median counts")->check(CLI::Range(1, 1000));
  add_profile(command, prefill.get());
  set_action(command, exit_code, [prefill] { return run_prefill(*prefill); });
  const auto ops = std::make_shared<BenchFlags>();
  ops->input_length = 32;
  ops->rounds = 11;
  command = add_model_bench(bench, "ops", "Each kind of operation of a step alone against its floor", ops);
  command->add_flag("--prefill", ops->prefill, "Of the step that computes the prompts, not of one that decodes");
  command->add_option("--rounds", ops->rounds, "Timed repetitions; the median counts")->check(CLI::Range(1, 1000));
  set_action(command, exit_code, [ops] { return run_ops(*ops); });
  add_membw(bench, exit_code);
}

}  // namespace tokenspeed::app
