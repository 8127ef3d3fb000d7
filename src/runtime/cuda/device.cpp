#include "runtime/cuda/device.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/cuda/cublas_library.h"
#include "runtime/gpu_support.h"

namespace tokenspeed::runtime {
namespace {

std::atomic<int32_t> allocations_until_failure{-1};
bool fails_in_test() { return allocations_until_failure >= 0 && allocations_until_failure-- == 0; }

}  // namespace

Status cuda_check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return internal_error(std::string(what) + ": CUDA error " + cudaGetErrorName(error) + " (" +
                        cudaGetErrorString(error) + ")");
}

Result<Device> open_device(int32_t ordinal) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    TS_RETURN_IF_ERROR(check_driver(driver, CUDART_VERSION));
  }
  if (error != cudaSuccess || count == 0) {
    return failed_precondition(std::string("no NVIDIA GPU was found (") + cudaGetErrorString(error) +
                               "); run with --device cpu");
  }
  if (ordinal < 0 || ordinal >= count) {
    return not_found("there is no GPU " + std::to_string(ordinal) + "; this machine has " + std::to_string(count) +
                     ", counted from 0");
  }
  cudaDeviceProp properties = {};
  TS_RETURN_IF_ERROR(cuda_check(cudaGetDeviceProperties(&properties, ordinal), "reading the GPU's properties"));
  TS_RETURN_IF_ERROR(check_capability(ordinal, properties.name, properties.major, properties.minor));
  TS_RETURN_IF_ERROR(kernels::cuda::find_cublas());
  TS_RETURN_IF_ERROR(cuda_check(cudaSetDevice(ordinal), "choosing the GPU"));
  return Device{ordinal, properties.name, properties.multiProcessorCount,
                static_cast<int64_t>(properties.totalGlobalMem), free_device_memory()};
}

int64_t free_device_memory() {
  size_t free = 0;
  size_t total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? static_cast<int64_t>(free) : 0;
}

Result<Stream> make_stream() {
  cudaStream_t stream = nullptr;
  TS_RETURN_IF_ERROR(cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream"));
  return Stream(stream);
}

Result<CudaEvent> make_event(bool timed) {
  cudaEvent_t event = nullptr;
  TS_RETURN_IF_ERROR(cuda_check(cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming),
                                "creating an event"));
  return CudaEvent(event);
}

void fail_allocation(int32_t n) { allocations_until_failure = n; }

Result<DeviceMemory> DeviceMemory::allocate(int64_t bytes, const std::string& purpose) {
  DeviceMemory memory;
  memory.size_ = bytes;
  if (bytes == 0) return memory;
  void* data = nullptr;
  const cudaError_t error = fails_in_test() ? cudaErrorMemoryAllocation : cudaMalloc(&data, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky: the next launch must not report it
    return resource_exhausted("the GPU has no " + gigabytes(bytes) + " for " + purpose + "; " +
                              gigabytes(free_device_memory()) + " are free");
  }
  TS_RETURN_IF_ERROR(cuda_check(error, "allocating GPU memory"));
  memory.memory_ = CudaOwner<void*, cudaFree>(data);
  // The clearing is done before this returns: streams made by make_stream() do not wait for it, and would find what
  // they wrote cleared away later.
  TS_RETURN_IF_ERROR(cuda_check(cudaMemset(data, 0, static_cast<size_t>(bytes)), "clearing GPU memory"));
  TS_RETURN_IF_ERROR(cuda_check(cudaStreamSynchronize(cudaStreamLegacy), "clearing GPU memory"));
  return memory;
}

Result<PinnedMemory> PinnedMemory::allocate(int64_t bytes, const std::string& purpose) {
  PinnedMemory memory;
  memory.size_ = bytes;
  if (bytes == 0) return memory;
  void* data = nullptr;
  const cudaError_t error =
      fails_in_test() ? cudaErrorMemoryAllocation
                      : cudaHostAlloc(&data, static_cast<size_t>(bytes), cudaHostAllocMapped | cudaHostAllocPortable);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return resource_exhausted("the system has no " + gigabytes(bytes) + " of page-locked memory for " + purpose +
                              "; raise the memory limit of this process");
  }
  TS_RETURN_IF_ERROR(cuda_check(error, "allocating page-locked memory"));
  memory.memory_ = CudaOwner<void*, cudaFreeHost>(data);
  std::memset(data, 0, static_cast<size_t>(bytes));
  return memory;
}

}  // namespace tokenspeed::runtime
