#include "compile/device.h"

#include <unistd.h>

#include <array>

namespace tokenspeed::compile {
namespace {

// Measured on one H100: 3.1 TB/s of the data sheet's 3.35, and 1.3 us per dependent node of a CUDA graph; on one H200
// 4.54 TB/s of 4.8. The other GPUs are taken to reach the H100's share of their data sheet and to cost the same per
// node.
constexpr double kReadShare = 3.1 / 3.35;
constexpr double kNodeSeconds = 1.3e-6;

constexpr double kMebi = 1024.0 * 1024.0;

struct Preset {
  const char* name;
  double memory_mebibytes;  // as the driver reports it
  double read_bandwidth;    // bytes per second
  double bf16_flops;
  double fp8_flops;
  double collective_seconds;  // one-shot over NVLink, or through host memory over PCIe
  double collective_bandwidth;
};

constexpr std::array<Preset, 7> kGpus = {{
    {"a100", 81920, 2.039e12 * kReadShare, 312e12, 312e12, 7e-6, 300e9},
    {"h100", 81559, 3.1e12, 989e12, 1979e12, 5e-6, 450e9},
    {"h200", 143771, 4.54e12, 989e12, 1979e12, 5e-6, 450e9},
    {"b200", 183359, 8.0e12 * kReadShare, 2250e12, 4500e12, 5e-6, 900e9},
    {"l40s", 46068, 0.864e12 * kReadShare, 362e12, 733e12, 20e-6, 25e9},
    {"rtx4090", 24564, 1.008e12 * kReadShare, 165e12, 330e12, 20e-6, 25e9},
    {"rtx5090", 32607, 1.792e12 * kReadShare, 209.5e12, 419e12, 20e-6, 50e9},
}};

// Two cores with AVX-512-BF16 and two channels of DDR5; `bench membw` measures the machine at hand.
DeviceSpec cpu() {
  return {.name = "cpu",
          .memory_bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE),
          .read_bandwidth = 50e9,
          .bf16_flops = 0.4e12,
          .fp8_flops = 0.4e12,
          .operation_seconds = 3e-6,
          .collective_seconds = 10e-6,
          .collective_bandwidth = 10e9};
}

}  // namespace

std::vector<std::string> device_names() {
  std::vector<std::string> names = {"cpu"};
  for (const Preset& gpu : kGpus) names.push_back(gpu.name);
  return names;
}

Result<DeviceSpec> find_device(std::string_view name) {
  if (name == "cpu") return cpu();
  for (const Preset& gpu : kGpus) {
    if (name != gpu.name) continue;
    return DeviceSpec{.name = gpu.name,
                      .memory_bytes = static_cast<int64_t>(gpu.memory_mebibytes * kMebi),
                      .read_bandwidth = gpu.read_bandwidth,
                      .bf16_flops = gpu.bf16_flops,
                      .fp8_flops = gpu.fp8_flops,
                      .operation_seconds = kNodeSeconds,
                      .collective_seconds = gpu.collective_seconds,
                      .collective_bandwidth = gpu.collective_bandwidth,
                      .calibration = kH200Calibration};
  }
  std::string known;
  for (const std::string& device : device_names()) known += (known.empty() ? "" : ", ") + device;
  return not_found("there is no device '" + std::string(name) + "'; the known ones are " + known);
}

Result<DeviceSpec> find_gpu(std::string_view driver_name) {
  std::string letters;
  for (const char c : driver_name) {
    if (c != ' ') letters += static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  }
  for (const Preset& gpu : kGpus) {
    if (letters.find(gpu.name) != std::string::npos) return find_device(gpu.name);
  }
  return not_found("no known device is in the name '" + std::string(driver_name) + "'");
}

}  // namespace tokenspeed::compile
