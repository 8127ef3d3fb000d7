#include "app/phase_time.h"

#include <algorithm>

#include "base/progress.h"
#include "compile/print.h"
#include "runtime/cpu_runner.h"

namespace tokenspeed::app {
namespace {

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

}  // namespace

std::vector<PhaseTime> collect_phases(const compile::Program& program, std::span<const runtime::LaunchTime> launches) {
  std::vector<PhaseTime> phases;
  for (const runtime::LaunchTime& launch : launches) {
    const std::string name =
        launch.parts.empty() ? "sampling" : compile::operation_label(program.operations[launch.parts[0].operation]);
    auto phase = std::find_if(phases.begin(), phases.end(), [&](const PhaseTime& p) { return p.name == name; });
    if (phase == phases.end()) {
      phases.push_back({.name = name});
      phase = phases.end() - 1;
    }
    phase->launches += launch.launches;
    phase->seconds += launch.seconds;
    phase->parts.insert(phase->parts.end(), launch.parts.begin(), launch.parts.end());
  }
  return phases;
}

Result<std::vector<PhaseTime>> profile_step(runtime::Runner& runner, DeviceKind device,
                                            std::span<const runtime::SequenceStep> sequences,
                                            std::vector<runtime::SequenceResult>* results) {
  if (device == DeviceKind::kCuda) return profile_gpu_step(runner, sequences, results);
  auto& cpu = static_cast<runtime::CpuRunner&>(runner);
  TS_ASSIGN_OR_RETURN(const std::vector<runtime::LaunchTime> launches, cpu.profile(sequences, results));
  return collect_phases(cpu.program(), launches);
}

Result<std::vector<PhaseTime>> time_kinds(runtime::Runner& runner, DeviceKind device,
                                          std::span<const runtime::SequenceStep> sequences, int32_t rounds) {
  if (device == DeviceKind::kCuda) return time_gpu_kinds(runner, sequences, rounds);
  std::vector<PhaseTime> phases;
  std::vector<std::vector<double>> seconds;  // by phase and round
  std::vector<runtime::SequenceResult> results;
  Progress progress("timing operations", rounds, "rounds");
  for (int32_t round = 0; round < rounds; ++round) {
    TS_ASSIGN_OR_RETURN(phases, profile_step(runner, device, sequences, &results));
    seconds.resize(phases.size());
    for (size_t i = 0; i < phases.size(); ++i) seconds[i].push_back(phases[i].seconds);
    progress.advance(1);
  }
  for (size_t i = 0; i < phases.size(); ++i) phases[i].seconds = median(std::move(seconds[i]));
  return phases;
}

}  // namespace tokenspeed::app
