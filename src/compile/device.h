// What the cost model knows of a device: its memory and the rates at which it reads, multiplies and talks to its peers.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "compile/calibration.h"

namespace tokenspeed::compile {

// Rates a program reaches, not those of the data sheet, where a measurement exists; a caller that has measured its own
// device may overwrite any of them.
struct DeviceSpec {
  std::string name = {};
  int64_t memory_bytes = 0;
  double read_bandwidth = 0;        // bytes per second
  double bf16_flops = 0;            // per second, dense, fp32 accumulation
  double fp8_flops = 0;             // bf16's where the device has no FP8 units
  double operation_seconds = 0;     // of a dependent operation over its bytes: launch, ramp and tail
  double collective_seconds = 0;    // of a small collective
  double collective_bandwidth = 0;  // bytes per second a device sends to its peers
  Calibration calibration = {};
};

// The preset of this name: cpu (memory: this machine's), a100, h100, h200, b200, l40s, rtx4090, rtx5090.
// not_found lists the names.
Result<DeviceSpec> find_device(std::string_view name);
std::vector<std::string> device_names();
// The preset of a GPU by the name its driver gives: h200 of "NVIDIA H200". not_found: none is in that name.
Result<DeviceSpec> find_gpu(std::string_view driver_name);

}  // namespace tokenspeed::compile
