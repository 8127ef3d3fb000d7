// The list of experts that a step of 9 to 64 rows needs, made by batch_route() and read by the kernel that multiplies.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/batch.h"

namespace tokenspeed::kernels::cuda {

// At most this many rows meet a weight tile at once; an expert with more has several entries.
inline constexpr int kEntryRows = 32;

// In memory: a header of four words (number of entries, how many of them belong to the shared expert), the entries, the
// places, whose pairs the entries' rows are. Entries of the shared expert come first.
struct ExpertList {
  uint32_t* words = nullptr;
  int64_t entry_capacity = 0;  // multiples of 4
  int64_t place_capacity = 0;

  __host__ __device__ int64_t word_count() const { return 4 + entry_capacity + place_capacity; }
};
__host__ __device__ constexpr uint32_t pack_entry(uint32_t expert, uint32_t first, uint32_t rows) {
  return expert | first << 10 | rows << 22;
}
__host__ __device__ constexpr int entry_expert(uint32_t entry) { return static_cast<int>(entry & 1023); }
__host__ __device__ constexpr int entry_first(uint32_t entry) { return static_cast<int>(entry >> 10 & 4095); }
__host__ __device__ constexpr int entry_rows(uint32_t entry) { return static_cast<int>(entry >> 22); }
__host__ __device__ constexpr uint32_t pack_place(uint32_t pair, uint32_t row) { return pair | row << 16; }

// The parts of a BatchExperts' workspace.
struct BatchExpertsSpace {
  ExpertList list;
  uint32_t* arrived = nullptr;  // per entry: warpgroups that have stored their activations
  float* weights = nullptr;     // [T, top_k]
  std::byte* activations = nullptr;
  float* results = nullptr;
  int64_t bytes = 0;

  BatchExpertsSpace(void* memory, int64_t rows, int64_t experts, int64_t top_k, int64_t hidden, int64_t width,
                    int64_t shared_width) {
    const int64_t pairs = rows * top_k;
    const int64_t all = pairs + (shared_width > 0 ? rows : 0);
    const auto fours = [](int64_t n) { return (n + 3) / 4 * 4; };
    list.entry_capacity = fours(std::min(pairs, experts) + pairs / kEntryRows + rows / kEntryRows + 1);
    list.place_capacity = fours(all);
    const auto take = [&](int64_t size) {
      std::byte* const at = static_cast<std::byte*>(memory) + bytes;
      bytes += (size + 255) / 256 * 256;
      return at;
    };
    list.words = reinterpret_cast<uint32_t*>(take(list.word_count() * 4));
    arrived = reinterpret_cast<uint32_t*>(take(list.entry_capacity * 4));
    weights = reinterpret_cast<float*>(take(pairs * 4));
    activations = take(all * std::max(width, shared_width) * 2);
    results = reinterpret_cast<float*>(take(all * hidden * 4));
  }
};

// Chooses the experts of every row, as MoeRouter defines it, and lists them.
Status batch_route(const BatchExperts& args, const BatchExpertsSpace& space, const Launch& launch);

}  // namespace tokenspeed::kernels::cuda
