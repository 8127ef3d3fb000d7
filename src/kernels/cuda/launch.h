// Launching kernels: stream, programmatic dependent launch, errors that name the op.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "base/status.h"

namespace tokenspeed::kernels::cuda {

struct Launch {
  cudaStream_t stream = nullptr;
  // The kernel may start before its predecessor ends (its weights are fetched meanwhile). Off: plain stream order.
  bool dependent = true;
};

// ok, or internal_error "OP: CUDA error NAME (text)".
Status cuda_status(cudaError_t error, const char* op);

// Multiprocessors of the current device; read once per process (all devices of a process are alike).
int multiprocessors();

// Cycles of a multiprocessor in which each gets so many bytes when all read memory at the bandwidth that its clock and
// width give, of the current device; read once per process.
double memory_cycles(double bytes);

// Launches `kernel` with `cluster` blocks per cluster along x (1: none) and dynamic shared memory, raising its limit
// first. resource_exhausted-like misuse (more shared memory than the device has) comes back as the op's error.
template <typename... Parameters, typename... Arguments>
Status launch_kernel(const char* op, const Launch& launch, void (*kernel)(Parameters...), dim3 grid, int threads,
                     size_t shared_bytes, int cluster, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (launch.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cuda_status(error, op);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), op);
}

}  // namespace tokenspeed::kernels::cuda
