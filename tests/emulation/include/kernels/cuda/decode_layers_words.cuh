// In place of kernels/cuda/decode_layers_words.cuh.
#pragma once

#include <cstdint>

#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda {

inline uint8_t* dynamic_shared() { return emulation::shared_memory(); }
inline void named_barrier(int id, int threads, emulation::Place place = emulation::Place::current()) {
  emulation::block_barrier(id, threads, "named_barrier", place);
}
// Time goes on where it is looked at.
inline uint32_t cycle_count() {
  static uint32_t cycles = 0xffffff00;
  return cycles += 8;
}
inline int read_lane() { return static_cast<int>(threadIdx.x % 32); }

inline uint2 load_word(const uint2* p, emulation::Place place = emulation::Place::current()) {
  uint64_t word;
  emulation::load_words(p, 1, &word, place);
  return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
}
inline uint4 load_words2(const uint2* p, emulation::Place place = emulation::Place::current()) {
  uint64_t words[2];
  emulation::load_words(p, 2, words, place);
  return {static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[0] >> 32), static_cast<uint32_t>(words[1]),
          static_cast<uint32_t>(words[1] >> 32)};
}
inline void store_word(uint2* p, uint32_t value, uint32_t flag) {
  emulation::store_word(p, static_cast<uint64_t>(flag) << 32 | value);
}

}  // namespace tokenspeed::kernels::cuda
