// Reading memory as fast as a core can. The width of the loads counts: 16-byte ones reach two thirds of 64-byte ones on
// Zen 4, so each instruction set has its own loop.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenspeed::kernels::cpu {

// Reads `bytes` (a multiple of 512) from a 64-byte aligned address; the result only keeps the loads alive.
int64_t read_memory_avx512(const std::byte* data, int64_t bytes);
int64_t read_memory_avx2(const std::byte* data, int64_t bytes);

namespace {

// The loop of both, internal to the file of each instruction set.
template <typename Vector>
int64_t read_memory(const std::byte* data, int64_t bytes) {
  constexpr int64_t kStreams = 4;
  Vector sums[kStreams] = {};
  for (int64_t i = 0; i < bytes; i += kStreams * static_cast<int64_t>(sizeof(Vector))) {
    const Vector* from = reinterpret_cast<const Vector*>(data + i);
    for (int64_t j = 0; j < kStreams; ++j) sums[j] ^= from[j];
  }
  sums[0] ^= sums[1] ^ sums[2] ^ sums[3];
  int64_t all = 0;
  for (size_t i = 0; i < sizeof(Vector) / sizeof(all); ++i) all ^= sums[0][i];
  return all;
}

}  // namespace
}  // namespace tokenspeed::kernels::cpu
