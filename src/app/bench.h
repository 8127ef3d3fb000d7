// What the bench commands share: flags, the cost model's view of the measured step, and reports.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "app/device.h"
#include "app/model_setup.h"
#include "app/runner_bench.h"
#include "base/status.h"
#include "compile/cost.h"
#include "compile/device.h"
#include "compile/program.h"
#include "model/loader.h"

namespace tokenspeed::app {

using Json = nlohmann::ordered_json;

struct BenchFlags {
  ModelFlags model;
  DeviceKind device = DeviceKind::kCpu;
  bool profile = false;
  bool prefill = false;
  int32_t sequences = 1;
  int32_t input_length = 0;
  int32_t context_length = 0;  // tokens of each prompt that are in memory already
  int32_t output_length = 0;
  int32_t rounds = 3;
  float temperature = 0;
  bool json = false;
};

inline constexpr int kWarmUpSteps = 3;
inline constexpr int kOverheadSteps = 25;  // whose gaps are taken, and as many whose CPU time is

// Resolves the device that the flags name, in both places.
Status resolve_device(BenchFlags* flags);
// Bytes per second.
Result<double> read_bandwidth(DeviceKind device, int32_t threads);
double median(std::vector<double> values);

// A measured step as the cost model sees it.
struct StepModel {
  compile::Program program;
  compile::DeviceSpec device;  // of `plan --device`; any, where the GPU is none of them
  bool known_device = false;   // so predictions mean something
  compile::Cost cost;
};
// `tokens` over all sequences, each after `context` others.
Result<StepModel> model_step(const model::LoadedModel& model, const BenchFlags& flags, int64_t tokens, int64_t context);
// Seconds predicted for a prompt in chunks of the runner's greatest step.
Result<double> predict_prompt(const model::LoadedModel& model, const BenchFlags& flags,
                              const compile::DeviceSpec& device, int64_t chunk);

Result<Json> report_head(const char* what, const model::LoadedModel& model, const BenchFlags& flags);
// One JSON object, or a line per entry.
void print_report(const Json& report, bool json);

// Repeats one step of the batch (or a prompt) with a time for every launch.
Result<Json> profile(runtime::Runner& runner, const BenchFlags& flags, const compile::Cost& cost, BenchBatch& batch,
                     bool prefill);
void print_profile(const Json& table);

// `bench ops`: every kind of operation of one step alone, against its floor.
Status run_ops(BenchFlags flags);

}  // namespace tokenspeed::app
