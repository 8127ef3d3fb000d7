// The router's choice for the step's rows, made again in every block that needs it: top-k of the softmax, and the list
// of distinct experts with who chose them.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/decode.h"

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
    keys[i] = expert < router.experts ? ordered_bits(logits[expert]) : 0;
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
    for (int i = lane; i < router.experts; i += kWarp) sum += __expf(logits[i] - greatest);
    sum = warp_sum(sum);
  }
  if (lane < router.top_k) routing.weights[t * router.top_k + lane] = mine / sum;
}

// All threads of the block (at least kDecodeTokens warps); ends with a barrier. The order of `distinct` is that of
// first choice; nothing that is computed depends on it.
__device__ inline void route_rows(const RouterParameters& router, int rows, Routing& routing) {
  const int warp = threadIdx.x / kWarp;
  const int pairs = rows * router.top_k;
  for (int i = threadIdx.x; i < router.experts; i += blockDim.x) routing.first_pair[i] = kRoutingPairs;
  for (int i = threadIdx.x; i < kRoutingPairs * kDecodeTokens / 4; i += blockDim.x) {
    reinterpret_cast<int*>(routing.slot)[i] = -1;
  }
  if (warp < rows) {
    if (router.experts <= 256) {
      choose_experts<8>(router, routing, warp);
    } else {
      choose_experts<kDecodeExperts / kWarp>(router, routing, warp);
    }
  }
  __syncthreads();
  for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x)
    atomicMin(&routing.first_pair[routing.ids[pair]], pair);
  __syncthreads();
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
  __syncthreads();
}

}  // namespace tokenspeed::kernels::cuda
