#include <algorithm>

#include "kernels/cuda/launch.h"

namespace tokenspeed::kernels::cuda {

Status cuda_status(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return {};
  return internal_error(std::string(op) + ": CUDA error " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                        ")");
}

namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

}  // namespace

int multiprocessors() {
  static const int count = std::max(attribute(cudaDevAttrMultiProcessorCount), 1);
  return count;
}

double memory_cycles(double bytes) {
  static const double cycles_per_byte = [] {
    // kHz; two transfers a cycle of as many bits.
    const double memory = 2.0 * attribute(cudaDevAttrMemoryClockRate) * attribute(cudaDevAttrGlobalMemoryBusWidth) / 8;
    return memory > 0 ? multiprocessors() * static_cast<double>(attribute(cudaDevAttrClockRate)) / memory : 0.0;
  }();
  return bytes * cycles_per_byte;
}

}  // namespace tokenspeed::kernels::cuda
