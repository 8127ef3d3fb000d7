// The router's choice for the step's rows, made again in every block that needs it: top-k of the softmax, and the list
// of distinct experts with who chose them.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_stream.cuh"

namespace tokenspeed::kernels::cuda {

struct RouterParameters {
  const float* logits;  // null: no routed experts
  int64_t stride;
  int experts;
  int top_k;
  bool normalize;
};

inline constexpr int kRoutingPairs = kDecodeTokens * kDecodeTopK;

// In shared memory. slot[d][t] is the place of distinct expert d among row t's choices, or -1.
struct Routing {
  int first_pair[kDecodeExperts];
  int index_of_pair[kRoutingPairs];
  int ids[kRoutingPairs];  // [t][i] at t * top_k + i
  float weights[kRoutingPairs];
  int distinct[kRoutingPairs];
  int8_t slot[kRoutingPairs][kDecodeTokens];
  int count;  // distinct experts
};

// Row t's logits are warp t's. Ties go to the lower id. kPerLane * 32 >= experts.
template <int kPerLane>
__device__ inline void choose_experts(const RouterParameters& router, Routing& routing, int t) {
  const int lane = threadIdx.x % kWarp;
  const float* const logits = router.logits + t * router.stride;
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarp + lane;
    keys[i] = expert < router.experts ? ordered_bits(__ldcg(logits + expert)) : 0;
  }
  float greatest = 0;
  float mine = 0;  // lane i: exp(logit of choice i - greatest)
  for (int choice = 0; choice < router.top_k; ++choice) {
    uint32_t best[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best[i] = keys[i];
#pragma unroll
    for (int width = kPerLane / 2; width > 0; width /= 2) {
#pragma unroll
      for (int i = 0; i < width; ++i) best[i] = max(best[i], best[i + width]);
    }
    const uint32_t key = __reduce_max_sync(~0u, best[0]);
    int found = kDecodeExperts;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) found = keys[i] == key ? i * kWarp + lane : found;
    const int id = min(__reduce_min_sync(~0u, found), router.experts - 1);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (id == i * kWarp + lane) keys[i] = 0;
    }
    const float logit = __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
    if (choice == 0) greatest = logit;
    if (lane == choice) mine = __expf(logit - greatest);
    if (lane == 0) routing.ids[t * router.top_k + choice] = id;
  }
  float sum = warp_sum(mine);
  if (!router.normalize) {
    sum = 0;
    for (int i = lane; i < router.experts; i += kWarp) sum += __expf(__ldcg(logits + i) - greatest);
    sum = warp_sum(sum);
  }
  if (lane < router.top_k) routing.weights[t * router.top_k + lane] = mine / sum;
}
__device__ inline void choose_experts(const RouterParameters& router, Routing& routing, int t) {
  if (router.experts <= 256) {
    choose_experts<8>(router, routing, t);
  } else {
    choose_experts<kDecodeExperts / kWarp>(router, routing, t);
  }
}

// By the warp that chose for the only row: all choices are distinct.
__device__ inline void list_one_row(const RouterParameters& router, Routing& routing) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
  if (lane < router.top_k) {
    const int id = routing.ids[lane];
    routing.distinct[lane] = id;
    routing.first_pair[id] = lane;
    routing.index_of_pair[lane] = lane;
    routing.slot[lane][0] = static_cast<int8_t>(lane);
  }
  if (lane == 0) routing.count = router.top_k;
  __syncwarp();
}

// All threads of the block (at least kDecodeTokens warps); ends with a barrier. The order of `distinct` is that of
// first choice; nothing that is computed depends on it.
__device__ inline void route_rows(const RouterParameters& router, int rows, Routing& routing) {
  const int warp = threadIdx.x / kWarp;
  const int pairs = rows * router.top_k;
  if (rows > 1) {
    for (int i = threadIdx.x; i < router.experts; i += kStreamThreads) routing.first_pair[i] = kRoutingPairs;
    for (int i = threadIdx.x; i < kRoutingPairs * kDecodeTokens / 4; i += kStreamThreads) {
      reinterpret_cast<int*>(routing.slot)[i] = -1;
    }
  }
  if (warp < rows) choose_experts(router, routing, warp);
  if (rows == 1) {
    if (warp == 0) list_one_row(router, routing);
    stream_barrier();
    return;
  }
  stream_barrier();
  for (int pair = threadIdx.x; pair < pairs; pair += kStreamThreads)
    atomicMin(&routing.first_pair[routing.ids[pair]], pair);
  stream_barrier();
  if (warp == 0) {
    const int lane = threadIdx.x % kWarp;
    int count = 0;
    for (int begin = 0; begin < pairs; begin += kWarp) {
      const int pair = begin + lane;
      const bool first = pair < pairs && routing.first_pair[routing.ids[pair]] == pair;
      const unsigned mask = __ballot_sync(~0u, first);
      const int index = count + __popc(mask & ((1u << lane) - 1));
      if (first) {
        routing.distinct[index] = routing.ids[pair];
        routing.index_of_pair[pair] = index;
      }
      count += __popc(mask);
    }
    __syncwarp();
    for (int pair = lane; pair < pairs; pair += kWarp) {
      const int index = routing.index_of_pair[routing.first_pair[routing.ids[pair]]];
      routing.slot[index][pair / router.top_k] = static_cast<int8_t>(pair % router.top_k);
    }
    if (lane == 0) routing.count = count;
  }
  stream_barrier();
}

}  // namespace tokenspeed::kernels::cuda
