// In place of kernels/cuda/bulk_copy.cuh: what the kernels that the machine runs use of it.
#pragma once

#include <cstdint>

#include "emulation/box_copy.h"
#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda {

inline constexpr int kWarpArrivals = 1;

inline void barrier_init(uint32_t barrier, int arrivals, emulation::Place place = emulation::Place::current()) {
  emulation::barrier_init(barrier, arrivals, place);
}
inline void publish_barriers() {}
inline void barrier_arrive(uint32_t barrier, emulation::Place place = emulation::Place::current()) {
  emulation::barrier_arrive(barrier, 0, place);
}
inline void warp_arrive(uint32_t barrier, emulation::Place place = emulation::Place::current()) {
  __syncwarp(~0u, place);
  if (threadIdx.x % kWarp < kWarpArrivals) emulation::barrier_arrive(barrier, 0, place);
}
inline void warp_release(uint32_t barrier, emulation::Place place = emulation::Place::current()) {
  warp_arrive(barrier, place);
}
inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes,
                                     emulation::Place place = emulation::Place::current()) {
  emulation::barrier_arrive(barrier, bytes, place);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity, emulation::Place place = emulation::Place::current()) {
  emulation::barrier_wait(barrier, parity, place);
}

inline bool barrier_test(uint32_t barrier, uint32_t parity, emulation::Place place = emulation::Place::current()) {
  return emulation::barrier_test(barrier, parity, place);
}

inline void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier,
                      emulation::Place place = emulation::Place::current()) {
  emulation::bulk_copy(shared, global, bytes, barrier, place);
}
inline void box_copy(uint32_t shared, const CUtensorMap& map, int row, int outer, int turn, int chunk, uint32_t barrier,
                     emulation::Place place = emulation::Place::current()) {
  emulation::box_copy(shared, map, row, outer, turn, chunk, barrier, place);
}
inline void prefetch_map(const CUtensorMap&) {}

}  // namespace tokenspeed::kernels::cuda
