// The device a model runs on: which one --device means here, runners on the GPU, and what the benchmarks ask of it.
// In a build without CUDA the GPU's functions answer with failed_precondition and say what is missing.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "app/model_setup.h"
#include "base/status.h"
#include "model/loader.h"
#include "runtime/runner.h"

namespace tokenspeed::app {

enum class DeviceKind { kCpu, kCuda };

// What --device names: cpu; cuda, or why there is no usable GPU; auto: cuda where that is possible, else cpu, with one
// line in the log that says why.
Result<DeviceKind> choose_device(const std::string& name);

// "NVIDIA H200". failed_precondition: no GPU, or its driver or itself is too old; each says what to do.
Result<std::string> gpu_name();
// Bytes per second of the GPU's memory, measured now over several GB.
Result<double> gpu_read_bandwidth();
// on_fault is told once when the GPU has failed: every request will fail from then on, the process should end.
Result<std::unique_ptr<runtime::Runner>> make_gpu_runner(const model::LoadedModel& model, const ModelFlags& flags,
                                                         std::function<void(const Status&)> on_fault);

// One kind of launch over all layers of a step.
struct PhaseTime {
  std::string name;  // "linear in_proj_qkv+in_proj_z"
  int32_t launches = 0;
  double seconds = 0;
  std::vector<std::pair<int32_t, double>> parts;  // operations of the Program and the share of each
};
// Runs the step on a runner of make_gpu_runner, every launch timed alone.
Result<std::vector<PhaseTime>> profile_step(runtime::Runner& runner, std::span<const runtime::SequenceStep> sequences,
                                            std::vector<runtime::SequenceResult>* results);

}  // namespace tokenspeed::app
