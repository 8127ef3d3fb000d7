// Times of a step by kind of operation, whichever runner measured them.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "app/device.h"
#include "base/status.h"
#include "compile/program.h"
#include "runtime/launch_time.h"
#include "runtime/runner.h"

namespace tokenspeed::app {

// One kind of launch over all layers of a step.
struct PhaseTime {
  std::string name;  // "linear in_proj_qkv+in_proj_z"; sampling
  int32_t launches = 0;
  double seconds = 0;
  std::vector<runtime::OperationPart> parts;  // of the Program
};

// Launches of the same first operation are one kind; kinds in the order in which they first come.
std::vector<PhaseTime> collect_phases(const compile::Program& program, std::span<const runtime::LaunchTime> launches);

// Runs the step on a runner of make_runner for this device, with a time for every launch.
Result<std::vector<PhaseTime>> profile_step(runtime::Runner& runner, DeviceKind device,
                                            std::span<const runtime::SequenceStep> sequences,
                                            std::vector<runtime::SequenceResult>* results);

// Times each kind of launch of a step that has run before, medians over `rounds`. GPU: alone, all layers one after the
// other (runtime/cuda/cuda_runner.h); CPU: within the step, where operations run one at a time anyway.
Result<std::vector<PhaseTime>> time_kinds(runtime::Runner& runner, DeviceKind device,
                                          std::span<const runtime::SequenceStep> sequences, int32_t rounds);

}  // namespace tokenspeed::app
