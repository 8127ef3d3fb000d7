#include "runtime/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <utility>

namespace tokenspeed::runtime {

Result<HostMemory> HostMemory::allocate(int64_t bytes, const std::string& purpose) {
  HostMemory memory;
  if (bytes == 0) return memory;
  void* data = bytes < 0 ? MAP_FAILED
                         : mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    return resource_exhausted("cannot allocate " + std::to_string(bytes) + " bytes for " + purpose + ": " +
                              std::strerror(errno) + "; choose a smaller model or fewer pages and state slots");
  }
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // fewer TLB misses while streaming weights; only a hint
  memory.data_ = static_cast<std::byte*>(data);
  memory.size_ = bytes;
  return memory;
}

HostMemory::~HostMemory() {
  if (data_) munmap(data_, static_cast<size_t>(size_));
}

HostMemory::HostMemory(HostMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

HostMemory& HostMemory::operator=(HostMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

int64_t available_host_memory() {
  int64_t available = std::numeric_limits<int64_t>::max();
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key, unit; meminfo >> key;) {
    int64_t kibibytes = 0;
    if (key == "MemAvailable:" && meminfo >> kibibytes) available = kibibytes * 1024;
    std::getline(meminfo, unit);
  }
  int64_t limit = 0;
  if (std::ifstream group("/sys/fs/cgroup/memory.max"); group >> limit) available = std::min(available, limit);
  return available;
}

}  // namespace tokenspeed::runtime
