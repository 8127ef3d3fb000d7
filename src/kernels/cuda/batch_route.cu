// One cluster: a warp chooses the experts of a row, then the first block sorts the pairs by expert. (One block for all
// rows takes 4 us longer at 32 rows: a choice is some 500 instructions per warp.)
#include "kernels/cuda/batch_experts.cuh"
#include "kernels/cuda/common.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kRouteThreads = 512;
constexpr int kRouteWarps = kRouteThreads / kWarp;
constexpr int kRouteBlocks = 8;
static_assert(kRouteThreads >= kBatchExperts && kRouteThreads >= kBatchTokens);

struct RouteParameters {
  const float* logits;
  int64_t stride;
  int rows, experts, top_k;
  bool normalize, shared;
  ExpertList list;
  uint32_t* arrived;
  float* weights;
};

// The warp's row: ids to the first block's shared memory, weights to global. Ties go to the lower id; a NaN counts as
// the greatest.
template <int kPerLane>
__device__ inline void choose_row(const RouteParameters& p, int row, uint32_t ids) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float* const logits = p.logits + row * p.stride;
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarp + lane;
    keys[i] = expert < p.experts ? ordered_bits(logits[expert]) : 0;
  }
  float greatest = 0;
  float mine = 0;  // lane i: exp(logit of choice i - greatest)
  for (int choice = 0; choice < p.top_k; ++choice) {
    uint32_t best = keys[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) best = max(best, keys[i]);
    best = __reduce_max_sync(~0u, best);
    int found = kBatchExperts;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) found = keys[i] == best ? i * kWarp + lane : found;
    const int id = min(__reduce_min_sync(~0u, found), p.experts - 1);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (id == i * kWarp + lane) keys[i] = 0;
    }
    const float logit = __uint_as_float(best & 0x80000000u ? best & 0x7fffffffu : ~best);
    if (choice == 0) greatest = logit;
    if (lane == choice) mine = __expf(logit - greatest);
    if (lane == 0) {
      asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(ids + choice * 2), "h"(static_cast<uint16_t>(id))
                   : "memory");
    }
  }
  float sum = warp_sum(mine);
  if (!p.normalize) {
    sum = 0;
    for (int i = lane; i < p.experts; i += kWarp) sum += __expf(logits[i] - greatest);
    sum = warp_sum(sum);
  }
  if (lane < p.top_k) p.weights[row * p.top_k + lane] = mine / sum;
}

__global__ void __launch_bounds__(kRouteThreads) route_kernel(const __grid_constant__ RouteParameters p) {
  __shared__ uint16_t ids[kBatchTokens * kBatchTopK];
  __shared__ int count[kBatchExperts];
  __shared__ int next[kBatchExperts];
  __shared__ int2 warp_sums[kBatchExperts / kWarp];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  if (thread < kBatchExperts) count[thread] = 0;
  // The first block's memory may be written once it runs.
  cluster_arrive();
  cluster_wait();
  wait_for_predecessor();
  allow_successor();
  const uint32_t first_ids = on_rank(shared_address(ids), 0);
  for (int row = static_cast<int>(blockIdx.x) + warp * kRouteBlocks; row < p.rows; row += kRouteBlocks * kRouteWarps) {
    if (p.experts <= 256) {
      choose_row<8>(p, row, first_ids + row * p.top_k * 2);
    } else {
      choose_row<kBatchExperts / kWarp>(p, row, first_ids + row * p.top_k * 2);
    }
  }
  cluster_arrive();
  cluster_wait();
  if (blockIdx.x != 0) return;
  for (int i = thread; i < p.list.entry_capacity; i += kRouteThreads) p.arrived[i] = 0;
  const int pairs = p.rows * p.top_k;
  for (int pair = thread; pair < pairs; pair += kRouteThreads) atomicAdd(&count[ids[pair]], 1);
  __syncthreads();
  // Inclusive sums over the experts of rows (x) and entries (y).
  int2 until = {0, 0};
  int own_rows = 0;
  if (thread < kBatchExperts) {
    own_rows = count[thread];
    until = {own_rows, (own_rows + kEntryRows - 1) / kEntryRows};
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int x = __shfl_up_sync(~0u, until.x, offset);
      const int y = __shfl_up_sync(~0u, until.y, offset);
      if (lane >= offset) until = {until.x + x, until.y + y};
    }
    if (lane == kWarp - 1) warp_sums[warp] = until;
  }
  __syncthreads();
  const int shared_entries = p.shared ? (p.rows + kEntryRows - 1) / kEntryRows : 0;
  const int shared_rows = p.shared ? p.rows : 0;
  uint32_t* const entries = p.list.words + 4;
  uint32_t* const places = entries + p.list.entry_capacity;
  if (thread < kBatchExperts) {
    for (int w = 0; w < warp; ++w) until = {until.x + warp_sums[w].x, until.y + warp_sums[w].y};
    const int first = shared_rows + until.x - own_rows;
    next[thread] = first;
    const int own_entries = (own_rows + kEntryRows - 1) / kEntryRows;
    for (int i = 0; i < own_entries; ++i) {
      entries[shared_entries + until.y - own_entries + i] =
          pack_entry(thread, first + i * kEntryRows, min(kEntryRows, own_rows - i * kEntryRows));
    }
    if (thread == kBatchExperts - 1) {
      p.list.words[0] = shared_entries + until.y;
      p.list.words[1] = shared_entries;
    }
  }
  if (thread < shared_entries) {
    entries[thread] = pack_entry(p.experts, thread * kEntryRows, min(kEntryRows, p.rows - thread * kEntryRows));
  }
  if (thread < shared_rows) places[thread] = pack_place(pairs + thread, thread);
  __syncthreads();
  for (int pair = thread; pair < pairs; pair += kRouteThreads) {
    places[atomicAdd(&next[ids[pair]], 1)] = pack_place(pair, pair / p.top_k);
  }
}

}  // namespace

Status batch_route(const BatchExperts& args, const BatchExpertsSpace& space, const Launch& launch) {
  const RouteParameters p = {args.router_logits,
                             args.router_stride,
                             static_cast<int>(args.rows),
                             static_cast<int>(args.experts),
                             static_cast<int>(args.top_k),
                             args.normalize,
                             args.shared_gate_up.data != nullptr,
                             space.list,
                             space.arrived,
                             space.weights};
  return launch_kernel("batch_route", launch, route_kernel, dim3(kRouteBlocks), kRouteThreads, 0, kRouteBlocks, p);
}

}  // namespace tokenspeed::kernels::cuda
