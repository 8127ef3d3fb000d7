// Anonymous memory of the host: zero, page-aligned, and only backed by RAM where it is touched. Move-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/status.h"

namespace tokenspeed::runtime {

class HostMemory {
 public:
  HostMemory() = default;
  // resource_exhausted names `purpose` and the size when the system refuses. Zero bytes give an empty object.
  static Result<HostMemory> allocate(int64_t bytes, const std::string& purpose);
  ~HostMemory();
  HostMemory(HostMemory&& other) noexcept;
  HostMemory& operator=(HostMemory&& other) noexcept;

  std::byte* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

// Bytes the process may still use without swapping, as the kernel estimates it, within its control group's limit.
int64_t available_host_memory();

}  // namespace tokenspeed::runtime
