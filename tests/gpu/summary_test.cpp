// The last line of the GPU test program: on which GPU, how many tests ran, passed, failed. Where there is no usable
// GPU, one line says why instead of a failure per test.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "runtime/cuda/device.h"

namespace tokenspeed::runtime {
namespace {

std::string gpu;
bool complete = false;

void print_summary() {
  if (!complete) return;  // the process of a death test, or one that was ended early
  const testing::UnitTest& all = *testing::UnitTest::GetInstance();
  printf("GPU tests: %d passed, %d failed, %d skipped of %d in %lld s on %s\n", all.successful_test_count(),
         all.failed_test_count(), all.skipped_test_count(), all.test_to_run_count(),
         static_cast<long long>((all.elapsed_time() + 999) / 1000), gpu.c_str());
}

class Summary : public testing::Environment {
 public:
  void SetUp() override {
    const Result<Device> device = open_device(0);
    if (!device.ok()) {
      printf("GPU tests: none ran: %s\n", device.status().message().c_str());
      exit(1);
    }
    int driver = 0;
    cudaDriverGetVersion(&driver);
    gpu = device->name + ", CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
          std::to_string(CUDART_VERSION % 1000 / 10) + ", driver for CUDA " + std::to_string(driver / 1000) + "." +
          std::to_string(driver % 1000 / 10);
    atexit(print_summary);  // after gtest's own lines
  }
  void TearDown() override { complete = true; }
};

[[maybe_unused]] testing::Environment* const summary = testing::AddGlobalTestEnvironment(new Summary);

}  // namespace
}  // namespace tokenspeed::runtime
