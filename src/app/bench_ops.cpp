// `bench ops`: every kind of operation of one step alone, against the floor of its bytes and FLOPs and beside the cost
// model's prediction. Its JSON is what scripts/calibrate.py fits the model's constants to.
#include <fmt/core.h>

#include <algorithm>

#include "app/bench.h"
#include "app/phase_time.h"
#include "compile/print.h"

namespace tokenspeed::app {
namespace {

constexpr int kTimedSteps = 20;
constexpr int kTimedPrompts = 3;

// Sums over the operations that a kind's launches carry out.
struct Work {
  double bytes = 0;
  double flops = 0;
  double byte_seconds = 0;  // at the preset's rates, as the constants are
  double flop_seconds = 0;
  double phases = 0;
  double predicted = 0;
};

Work work_of(const PhaseTime& phase, const compile::Cost& cost) {
  Work work;
  for (const runtime::OperationPart& part : phase.parts) {
    const compile::OperationCost& one = cost.operations[static_cast<size_t>(part.operation)];
    work.bytes += part.share * static_cast<double>(one.bytes());
    work.flops += part.share * one.flops;
    work.byte_seconds += part.share * one.byte_seconds;
    work.flop_seconds += part.share * one.flop_seconds;
    work.phases += part.share * one.phases;
    work.predicted += part.share * one.seconds;
  }
  return work;
}

// Of the operation that moves most of the kind's bytes.
compile::OpFamily family_of(const PhaseTime& phase, const StepModel& model) {
  const auto bytes = [&](const runtime::OperationPart& part) {
    return part.share * static_cast<double>(model.cost.operations[static_cast<size_t>(part.operation)].bytes());
  };
  const auto heaviest = std::max_element(phase.parts.begin(), phase.parts.end(),
                                         [&](const auto& one, const auto& other) { return bytes(one) < bytes(other); });
  return compile::family_of(model.program.operations[static_cast<size_t>(heaviest->operation)].kind);
}

Json row_of(const PhaseTime& phase, const StepModel& model, double bandwidth) {
  const Work work = work_of(phase, model.cost);
  Json row = {{"operation", phase.name}};
  if (!phase.parts.empty()) {
    const auto& first = model.program.operations[static_cast<size_t>(phase.parts[0].operation)];
    row["family"] = compile::family_name(family_of(phase, model));
    row["shape"] = compile::operation_shape(model.program, first);
  }
  row["launches"] = phase.launches;
  row["us"] = phase.seconds * 1e6;
  row["mb"] = work.bytes * 1e-6;
  row["gb_s"] = work.bytes / phase.seconds * 1e-9;
  row["bandwidth_fraction"] = work.bytes / phase.seconds / bandwidth;
  row["gflop"] = work.flops * 1e-9;
  row["floor_us"] = std::max(work.bytes / bandwidth, model.known_device ? work.flop_seconds : 0) * 1e6;
  if (!model.known_device) return row;
  row["phases"] = work.phases;
  row["preset_byte_us"] = work.byte_seconds * 1e6;
  row["preset_flop_us"] = work.flop_seconds * 1e6;
  row["predicted_us"] = work.predicted * 1e6;
  return row;
}

double sum_of(const Json& table, const char* key) {
  double sum = 0;
  for (const Json& row : table) sum += row.value(key, 0.0);
  return sum;
}

void print_table(const Json& report) {
  const Json& table = report["operations"];
  fmt::print("\n{:<30} {:<22} {:>8} {:>8} {:>10} {:>10} {:>7} {:>6} {:>10} {:>10}\n", "operation", "shape", "launches",
             "us each", "us", "MB", "GB/s", "% bw", "floor us", "predicted");
  for (const Json& row : table) {
    const int launches = row["launches"].get<int>();
    const double us = row["us"].get<double>();
    fmt::print("{:<30.30} {:<22.22} {:>8} {:>8.2f} {:>10.1f} {:>10.2f} {:>7.0f} {:>6.1f} {:>10.1f} {:>10.1f}\n",
               row["operation"].get<std::string>(), row.value("shape", ""), launches, us / launches, us,
               row["mb"].get<double>(), row["gb_s"].get<double>(), 100 * row["bandwidth_fraction"].get<double>(),
               row["floor_us"].get<double>(), row.value("predicted_us", 0.0));
  }
  fmt::print("{:<30} {:<22} {:>8} {:>8} {:>10.1f} {:>10.2f} {:>7} {:>6} {:>10.1f} {:>10.1f}\n", "all, each alone", "",
             "", "", sum_of(table, "us"), sum_of(table, "mb"), "", "", sum_of(table, "floor_us"),
             sum_of(table, "predicted_us"));
  fmt::print("{:<30} {:<22} {:>8} {:>8} {:>10.1f} {:>10} {:>7} {:>6} {:>10} {:>10.1f}\n", "the whole step, as it runs",
             "", "", "", report["step_us"].get<double>(), "", "", "", "", report.value("predicted_step_us", 0.0));
}

// Seconds of the step as it runs.
Result<double> time_step(BenchBatch* batch, bool prefill) {
  std::vector<double> seconds;
  for (int i = 0; i < (prefill ? kTimedPrompts : kTimedSteps); ++i) {
    if (prefill) batch->restart();
    TS_ASSIGN_OR_RETURN(const double one, prefill ? batch->prefill() : batch->decode());
    seconds.push_back(one);
  }
  return median(std::move(seconds));
}

Result<std::vector<PhaseTime>> time_operations(runtime::Runner& runner, const BenchFlags& flags, BenchBatch* batch) {
  std::vector<PhaseTime> phases;
  batch->run_steps_with(
      [&](std::span<const runtime::SequenceStep> steps, std::vector<runtime::SequenceResult>* results) -> Status {
        TS_ASSIGN_OR_RETURN(phases, time_kinds(runner, flags.device, steps, flags.rounds));
        results->assign(steps.size(), {});
        return {};
      });
  if (flags.prefill) batch->restart();
  TS_RETURN_IF_ERROR((flags.prefill ? batch->prefill() : batch->decode()).status());
  return phases;
}

}  // namespace

Status run_ops(BenchFlags flags) {
  TS_RETURN_IF_ERROR(resolve_device(&flags));
  flags.model.max_sequences = flags.sequences;
  TS_ASSIGN_OR_RETURN(const double bandwidth, read_bandwidth(flags.device, flags.model.threads));
  TS_ASSIGN_OR_RETURN(const model::LoadedModel model, load_model(flags.model));
  TS_ASSIGN_OR_RETURN(const auto runner, make_runner(model, flags.model));
  const int64_t prompts = int64_t{flags.sequences} * flags.input_length;
  if (flags.prefill && prompts > runner->capacity().max_step_tokens) {
    return invalid_argument("bench ops times one step, and the prompts have " + std::to_string(prompts) +
                            " tokens; raise --max-num-batched-tokens to as many");
  }
  const int32_t steps = kWarmUpSteps + kTimedSteps + 1;
  TS_ASSIGN_OR_RETURN(BenchBatch batch,
                      BenchBatch::create(runner.get(), flags.sequences, flags.input_length, flags.prefill ? 1 : steps));
  TS_RETURN_IF_ERROR(batch.prefill().status());
  for (int i = 0; !flags.prefill && i < kWarmUpSteps; ++i) TS_RETURN_IF_ERROR(batch.decode().status());
  TS_ASSIGN_OR_RETURN(const double step, time_step(&batch, flags.prefill));
  TS_ASSIGN_OR_RETURN(const StepModel modelled,
                      flags.prefill ? model_step(model, flags, prompts, 0)
                                    : model_step(model, flags, flags.sequences, flags.input_length + steps - 1));
  TS_ASSIGN_OR_RETURN(const std::vector<PhaseTime> phases, time_operations(*runner, flags, &batch));

  TS_ASSIGN_OR_RETURN(Json report, report_head("ops", model, flags));
  report["step"] = flags.prefill ? "prefill" : "decode";
  report["regime"] = compile::regime_name(compile::regime_of(modelled.program.tokens));
  report["read_bandwidth_gb_s"] = bandwidth * 1e-9;
  report["step_us"] = step * 1e6;
  if (modelled.known_device) {
    report["preset"] = modelled.device.name;
    report["preset_operation_us"] = modelled.device.operation_seconds * 1e6;
    report["predicted_step_us"] = modelled.cost.total.seconds * 1e6;
    report["predicted_step_fixed_us"] =
        modelled.device.calibration.step_seconds[static_cast<size_t>(compile::regime_of(modelled.program.tokens))] *
        1e6;
  }
  Json table = Json::array();
  for (const PhaseTime& phase : phases) table.push_back(row_of(phase, modelled, bandwidth));
  if (flags.json) {
    report["operations"] = std::move(table);
    print_report(report, true);
    return {};
  }
  print_report(report, false);
  report["operations"] = std::move(table);
  print_table(report);
  return {};
}

}  // namespace tokenspeed::app
