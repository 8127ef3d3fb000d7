// Primitives of the persistent kernel that are instructions: words between blocks, its shared memory, barriers of some
// of a block's threads.
#pragma once

#include <cstdint>

#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda {

__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t layer_shared_memory[];
  return layer_shared_memory;
}
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The lane, read anew: the compiler would keep what follows from threadIdx over all phases, in local memory.
__device__ __forceinline__ int read_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ uint32_t cycle_count() {
  uint32_t cycles;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(cycles)::"memory");
  return cycles;
}

// {value, flag} words that blocks write for each other; each is read and written as a whole.
__device__ __forceinline__ uint2 load_word(const uint2* p) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(p) : "memory");
  return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
}
// Two words, 16-byte aligned.
__device__ __forceinline__ uint4 load_words2(const uint2* p) {
  uint64_t first, second;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(p) : "memory");
  return {static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), static_cast<uint32_t>(second),
          static_cast<uint32_t>(second >> 32)};
}
__device__ __forceinline__ void store_word(uint2* p, uint32_t value, uint32_t flag) {
  const uint64_t word = static_cast<uint64_t>(flag) << 32 | value;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(word) : "memory");
}

}  // namespace tokenspeed::kernels::cuda
