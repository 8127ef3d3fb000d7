#include "kernels/memory_bandwidth.h"

#include <emmintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>

namespace tokenspeed::kernels::cpu {
namespace {

constexpr int64_t kChunkBytes = int64_t{1} << 20;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kPrefetchBytes = 4096;

// Touches every byte; the result only keeps the loads alive. 16-byte loads need a quarter of a core's load slots at the
// rates of memory, so wider ones would measure the same.
uint32_t read_chunk(const std::byte* data, int64_t bytes) {
  __m128i sums[4] = {};
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
    __builtin_prefetch(data + i + kPrefetchBytes);
    for (int j = 0; j < 4; ++j) {
      sums[j] = _mm_xor_si128(sums[j], _mm_load_si128(reinterpret_cast<const __m128i*>(data + i) + j));
    }
  }
  const __m128i all = _mm_xor_si128(_mm_xor_si128(sums[0], sums[1]), _mm_xor_si128(sums[2], sums[3]));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(all));
}

}  // namespace

double measure_read_bandwidth(int64_t bytes, int repetitions, ThreadPool& pool) {
  const int64_t chunks = std::max<int64_t>(1, bytes / kChunkBytes);
  const size_t size = static_cast<size_t>(chunks * kChunkBytes);
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  madvise(memory, size, MADV_HUGEPAGE);  // as weights are held
  std::byte* data = static_cast<std::byte*>(memory);
  pool.parallel_for(chunks, [&](int64_t i) { std::memset(data + i * kChunkBytes, 1, kChunkBytes); });
  double best = 0;
  std::atomic<uint32_t> sink{0};
  for (int i = 0; i < repetitions; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool.parallel_for(chunks, [&](int64_t chunk) { sink += read_chunk(data + chunk * kChunkBytes, kChunkBytes); });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(size) / elapsed.count() / 1e9);
  }
  munmap(memory, size);
  return best;
}

}  // namespace tokenspeed::kernels::cpu
