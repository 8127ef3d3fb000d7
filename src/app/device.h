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

// Has a fault of the GPU name its operation. Before anything else is asked of the GPU.
void arm_gpu_fault_dump();

// When the GPU began the runner's last step and had the tokens of the step before, by its own clock in ns.
Result<std::pair<uint64_t, uint64_t>> gpu_step_times(const runtime::Runner& runner);

struct PhaseTime;
// Of a runner of make_gpu_runner; app/phase_time.h has the functions for either device.
Result<std::vector<PhaseTime>> profile_gpu_step(runtime::Runner& runner,
                                                std::span<const runtime::SequenceStep> sequences,
                                                std::vector<runtime::SequenceResult>* results);
Result<std::vector<PhaseTime>> time_gpu_kinds(runtime::Runner& runner, std::span<const runtime::SequenceStep> sequences,
                                              int32_t rounds);

}  // namespace tokenspeed::app
