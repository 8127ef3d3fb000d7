#include "kernels/memory_bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>

#include "kernels/cpu/cpu_features.h"
#include "kernels/cpu/memory_read.h"

namespace tokenspeed::kernels::cpu {
namespace {

constexpr int64_t kChunkBytes = int64_t{1} << 20;

}  // namespace

double measure_read_bandwidth(int64_t bytes, int repetitions, ThreadPool& pool) {
  const int64_t chunks = std::max<int64_t>(1, bytes / kChunkBytes);
  const size_t size = static_cast<size_t>(chunks * kChunkBytes);
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  madvise(memory, size, MADV_HUGEPAGE);  // as weights are held
  std::byte* data = static_cast<std::byte*>(memory);
  pool.parallel_for(chunks, [&](int64_t i) { std::memset(data + i * kChunkBytes, 1, kChunkBytes); });
  const auto read = instruction_set() == InstructionSet::kAvx2 ? &read_memory_avx2 : &read_memory_avx512;
  double best = 0;
  std::atomic<int64_t> sink{0};
  for (int i = 0; i < repetitions; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool.parallel_for(chunks, [&](int64_t chunk) { sink += read(data + chunk * kChunkBytes, kChunkBytes); });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(size) / elapsed.count() / 1e9);
  }
  munmap(memory, size);
  return best;
}

}  // namespace tokenspeed::kernels::cpu
