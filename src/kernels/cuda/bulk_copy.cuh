// Shared-memory barriers that count bytes (mbarrier) and bulk copies that complete on them (sm_90 and newer).
//
// A barrier's phases alternate in parity: wait(parity) returns when the phase of that parity has completed, and a fresh
// barrier's wait(1) returns at once.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda {

// Copies, and the matrix units of warpgroup products, are another proxy of shared memory: orders this thread's ordinary
// accesses before theirs that a barrier lets follow.
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barrier_init and before other threads or the copy engine use the barriers; a __syncthreads must follow.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  publish_shared();
}
__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// For a whole warp, whose accesses before it are ordered by it: kWarpArrivals of the barrier's count. One lane arrives
// for all; race checkers, which do not see that, want a build in which every lane does.
#ifdef TOKENSPEED_EVERY_LANE_ARRIVES
inline constexpr int kWarpArrivals = kWarp;
#else
inline constexpr int kWarpArrivals = 1;
#endif
__device__ inline void warp_arrive(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % kWarp < kWarpArrivals) barrier_arrive(barrier);
}
// The same where copies may then overwrite what the warp has read or written, which the arrival alone does not order
// behind accesses that have been issued: seen as loads that got what came later.
__device__ inline void warp_release(uint32_t barrier) {
  publish_shared();
  warp_arrive(barrier);
}
// Arrives and adds `bytes` that copies will bring before the phase completes.
__device__ inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Whether a barrier_wait() would return at once.
__device__ inline bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// `bytes` (a multiple of 16) from 16-byte aligned global to 16-byte aligned shared memory.
__device__ inline void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

// kCount floats (2, or a multiple of 4) to the shared memory of a block of the cluster, whose barrier counts the bytes.
template <int kCount>
__device__ inline void send(uint32_t to, const float (&v)[kCount], uint32_t barrier) {
  static_assert(kCount == 2 || kCount % 4 == 0, "what an instruction stores");
  if constexpr (kCount == 2) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "f"(v[0]), "f"(v[1]), "r"(barrier)
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                       to + i * 4),
                   "f"(v[i]), "f"(v[i + 1]), "f"(v[i + 2]), "f"(v[i + 3]), "r"(barrier)
                   : "memory");
    }
  }
}
// barrier_wait() for what blocks of the cluster send.
__device__ inline void wait_for_sent(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The tile whose first element is (row, column) of the mapped matrix, to shared memory aligned to its swizzle's 1024
// (or 512) bytes.
__device__ inline void tile_copy(uint32_t shared, const CUtensorMap& map, int row, int column, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// A tile of a paired_tensor_map().
__device__ inline void paired_tile_copy(uint32_t shared, const CUtensorMap& map, int group, int eight, int column,
                                        uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %3, %4, %5}], [%6];" ::"r"(shared),
      "l"(&map), "r"(column), "r"(0), "r"(eight), "r"(group), "r"(barrier)
      : "memory");
}
// A box of a box_map(): its rows `row` on of the `outer`-th on, chunks `chunk` on of that turn. Fetched once, so first
// to leave L2.
__device__ inline void box_copy(uint32_t shared, const CUtensorMap& map, int row, int outer, int turn, int chunk,
                                uint32_t barrier) {
  constexpr uint64_t kEvictFirst = 0x12F0000000000000;  // what createpolicy makes of evict_first for all
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(shared),
      "l"(&map), "r"(0), "r"(row), "r"(outer), "r"(turn), "r"(chunk), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace tokenspeed::kernels::cuda
