#include "kernels/cuda/launch.h"

namespace tokenspeed::kernels::cuda {

Status cuda_status(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return {};
  return internal_error(std::string(op) + ": CUDA error " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                        ")");
}

int multiprocessors() {
  static const int count = [] {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    return value > 0 ? value : 1;
  }();
  return count;
}

}  // namespace tokenspeed::kernels::cuda
