// The GPU a runner works on, and the few resources of it that have owners: memory, pinned host memory, streams, events.
// All are move-only and released by their destructors. Errors: internal_error with CUDA's name for it, unless said
// otherwise.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "base/status.h"

namespace tokenspeed::runtime {

struct Device {
  int32_t ordinal = 0;
  std::string name;
  int32_t multiprocessors = 0;
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;  // when it was opened
};

// Makes the GPU current for this thread. failed_precondition: there is none, its driver is too old for this program,
// its compute capability is below 9.0, or cuBLASLt is not installed; not_found: no GPU of that ordinal.
Result<Device> open_device(int32_t ordinal);
int64_t free_device_memory();

Status cuda_check(cudaError_t error, const char* what);

// Owns what `Release` frees.
template <typename Handle, cudaError_t (*Release)(Handle)>
class CudaOwner {
 public:
  CudaOwner() = default;
  explicit CudaOwner(Handle handle) : handle_(handle) {}
  ~CudaOwner() {
    if (handle_) Release(handle_);
  }
  CudaOwner(CudaOwner&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  CudaOwner& operator=(CudaOwner&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  Handle get() const { return handle_; }

 private:
  Handle handle_ = nullptr;
};

using Stream = CudaOwner<cudaStream_t, cudaStreamDestroy>;
using CudaEvent = CudaOwner<cudaEvent_t, cudaEventDestroy>;
Result<Stream> make_stream();
Result<CudaEvent> make_event(bool timed);

// Tests only: the n-th allocation of the two classes below from now on (0: the next) fails for want of memory; -1:
// none.
void fail_allocation(int32_t n);

// Zeroed. resource_exhausted names the purpose, the size and what is free.
class DeviceMemory {
 public:
  static Result<DeviceMemory> allocate(int64_t bytes, const std::string& purpose);
  std::byte* data() const { return static_cast<std::byte*>(memory_.get()); }
  int64_t size() const { return size_; }

 private:
  CudaOwner<void*, cudaFree> memory_;
  int64_t size_ = 0;
};

// Page-locked host memory that the device can address at the same address. Zeroed.
class PinnedMemory {
 public:
  static Result<PinnedMemory> allocate(int64_t bytes, const std::string& purpose);
  std::byte* data() const { return static_cast<std::byte*>(memory_.get()); }
  int64_t size() const { return size_; }

 private:
  CudaOwner<void*, cudaFreeHost> memory_;
  int64_t size_ = 0;
};

}  // namespace tokenspeed::runtime
