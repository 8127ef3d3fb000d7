#include "app/device.h"

#include "base/log.h"

namespace tokenspeed::app {

Result<DeviceKind> choose_device(const std::string& name) {
  if (name == "cpu") return DeviceKind::kCpu;
  const Result<std::string> gpu = gpu_name();
  if (gpu.ok()) return DeviceKind::kCuda;
  if (name == "cuda") return gpu.status();
  spdlog::info("--device auto takes the CPU: {}", gpu.status().message());
  return DeviceKind::kCpu;
}

}  // namespace tokenspeed::app
