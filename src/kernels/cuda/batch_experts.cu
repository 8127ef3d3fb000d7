// Routed and shared experts of a step of 9 to 64 rows in one launch.
//
// Work is items of 128 weight rows: 64 gate rows beside the 64 up rows that belong to them, or 128 rows of down. Every
// block walks over its share of the gate/up items and then of the down items; a down item waits until its entry's
// activations are stored, which is long ago for all but the last. A slot of a block's ring is a chunk of 128 bytes
// along k of an item's weight rows, one tiled copy that one thread asks for, and of the entry's rows, staged by four
// warps in turn. Two warpgroups multiply 64 weight rows each.
#include <string>

#include "kernels/cuda/batch_experts_stage.cuh"
#include "kernels/cuda/tensor_map.h"

namespace tokenspeed::kernels::cuda {
namespace {

using namespace batch_experts_parts;

struct Maps {
  const CUtensorMap& gate_up;
  const CUtensorMap& down;
  const CUtensorMap& shared_gate_up;
  const CUtensorMap& shared_down;
};

// Weights into the ring.
template <bool kFp8>
__device__ inline void fetch_weights(const ExpertsParameters& p, const Maps& maps, Shared& shared) {
  constexpr int kElements = kChunkElements<kFp8>;
  if (threadIdx.x % kWarp != 0) return;
  Schedule<kFp8> schedule(p, shared.list);
  Item item;
  int number = 0;
  while (schedule.next(&item)) {
    const int expert = entry_expert(item.packed);
    const bool is_shared = expert == p.experts;
    for (int step = 0; step < item.steps; ++step, ++number) {
      const int s = number % kSlots;
      const uint32_t full = shared_address(&shared.full[s]);
      const uint32_t to = shared_address(shared.weights[s]);
      barrier_wait(shared_address(&shared.empty[s]), (number / kSlots + 1) % 2);
      barrier_arrive_expecting(full, kWeightBytes);
      if (item.down) {
        tile_copy(to, is_shared ? maps.shared_down : maps.down,
                  (is_shared ? 0 : expert * p.hidden) + item.tile * kItemRows, step * kElements, full);
      } else {
        paired_tile_copy(to, is_shared ? maps.shared_gate_up : maps.gate_up, is_shared ? 0 : expert,
                         item.tile * (kPairedRows / 8), step * kElements, full);
      }
    }
  }
}

// One item for an entry of at most kColumns columns.
template <bool kFp8, int kColumns>
__device__ inline void consume(const ExpertsParameters& p, const Item& item, Shared& shared, int done) {
  using Sums = RowSums<kFp8, kColumns>;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int warp = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Sums sums = {};
  float part[kColumns / 2];
  for (int step = 0; step < item.steps; ++step) {
    const int number = done + step;
    const int s = number % kSlots;
    barrier_wait(shared_address(&shared.full[s]), number / kSlots % 2);
    warpgroup_begin();
    multiply_chunk<kFp8, kColumns>(part, shared_address(shared.weights[s]) + warpgroup * kBatchTile,
                                   shared_address(shared.rows[s]), !kFp8 && step > 0);
    warpgroup_commit();
    float weight_scale[2];
    if constexpr (kFp8) {
      weight_scale[0] = shared.weight_scale[s][0];
      weight_scale[1] = shared.weight_scale[s][1];
    }
    warpgroup_wait<0>();
    settle(part);
    if constexpr (kFp8) add_scaled(sums, part, shared.row_scale[s], weight_scale[0], weight_scale[1]);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&shared.empty[s]));
  }
  if constexpr (!kFp8) {
#pragma unroll
    for (int i = 0; i < Sums::kRows; ++i) {
      sums.at[i][0] = part[i / 2 * 4 + i % 2];
      sums.at[i][1] = part[i / 2 * 4 + 2 + i % 2];
    }
  }
  const int first = entry_first(item.packed);
  const int rows = entry_rows(item.packed);
  const uint32_t* const places = shared.list + 4 + p.list.entry_capacity;
#pragma unroll
  for (int i = 0; i < Sums::kRows; ++i) {
    const int row = Sums::row_of(i);
    if (row >= rows) continue;
    if (item.down) {
      float* const to = p.results + static_cast<int64_t>(places[first + row] & 0xffff) * p.hidden +
                        item.tile * kItemRows + warpgroup * 64 + warp * 16 + lane / 4;
      to[0] = sums.at[i][0];
      to[8] = sums.at[i][1];
    } else {
      const int column = item.tile * kPairedRows + (warpgroup * 4 + warp) * 8 + lane / 4;
      p.activations[(first + row) * p.activation_stride + column] =
          __float2bfloat16_rn(silu(sums.at[i][0]) * sums.at[i][1]);
    }
  }
  if (!item.down) {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
    if (threadIdx.x % kWarpgroup == 0) {
      __threadfence();
      atomicAdd(p.arrived + item.entry, 1u);
    }
  }
}

template <bool kFp8>
__device__ inline void consume_all(const ExpertsParameters& p, Shared& shared) {
  Schedule<kFp8> schedule(p, shared.list);
  Item item;
  for (int done = 0; schedule.next(&item); done += item.steps) {
    const int columns = entry_rows(item.packed) * kColumnsPerRow<kFp8>;
    if (columns <= 8) {
      consume<kFp8, 8>(p, item, shared, done);
    } else if (columns <= 16) {
      consume<kFp8, 16>(p, item, shared, done);
    } else if (columns <= 32) {
      consume<kFp8, 32>(p, item, shared, done);
    } else {
      consume<kFp8, kMostColumns<kFp8>>(p, item, shared, done);
    }
  }
}

template <bool kFp8>
__global__ void __launch_bounds__(kThreads, 1)
    experts_kernel(const __grid_constant__ ExpertsParameters p, const __grid_constant__ CUtensorMap gate_up,
                   const __grid_constant__ CUtensorMap down, const __grid_constant__ CUtensorMap shared_gate_up,
                   const __grid_constant__ CUtensorMap shared_down) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kSlots; ++s) {
      barrier_init(shared_address(&shared.full[s]), 2);
      barrier_init(shared_address(&shared.empty[s]), kConsumers * kWarpgroup / kWarp);
    }
    prefetch_map(gate_up);
    prefetch_map(down);
  }
  publish_barriers();
  wait_for_predecessor();
  allow_successor();
  for (int i = static_cast<int>(threadIdx.x); i < p.list.word_count() / 4; i += kThreads) {
    reinterpret_cast<uint4*>(shared.list)[i] = __ldcg(reinterpret_cast<const uint4*>(p.list.words) + i);
  }
  __syncthreads();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    consume_all<kFp8>(p, shared);
  } else if (threadIdx.x < kConsumers * kWarpgroup + kStagingWarps * kWarp) {
    stage_rows<kFp8>(p, shared);
  } else {
    fetch_weights<kFp8>(p, {gate_up, down, shared_gate_up, shared_down}, shared);
  }
}

BatchExpertsSpace space_of(const BatchExperts& a) {
  return {a.workspace, a.rows, a.experts, a.top_k, a.hidden, a.width, a.shared_gate_up.data ? a.shared_width : 0};
}

template <bool kFp8>
Status multiply(const BatchExperts& args, const BatchExpertsSpace& space, const Launch& launch) {
  const int64_t shared_width = args.shared_gate_up.data ? args.shared_width : 0;
  const ExpertsParameters p = {space.list,
                               space.arrived,
                               static_cast<const bf16*>(args.x.data),
                               args.x.stride,
                               reinterpret_cast<bf16*>(space.activations),
                               std::max(args.width, shared_width),
                               space.results,
                               {args.gate_up.scale, args.down.scale},
                               {args.shared_gate_up.scale, args.shared_down.scale},
                               static_cast<int>(args.experts),
                               static_cast<int>(args.hidden),
                               static_cast<int>(args.width),
                               static_cast<int>(shared_width)};
  constexpr DType kType = kFp8 ? DType::kFloat8E4M3 : DType::kBFloat16;
  const auto gate_up_map = [&](const Matrix& m, int64_t groups, int64_t width) {
    return paired_tensor_map(m.data, kType, groups, width, args.hidden, kPairedRows / 8);
  };
  const auto down_map = [&](const Matrix& m, int64_t groups, int64_t width) {
    return tensor_map(m.data, kType, groups * args.hidden, width, width * (kFp8 ? 1 : 2), kItemRows,
                      kChunkElements<kFp8>);
  };
  const CUtensorMap gate_up = gate_up_map(args.gate_up, args.experts, args.width);
  const CUtensorMap down = down_map(args.down, args.experts, args.width);
  const CUtensorMap shared_gate_up = shared_width > 0 ? gate_up_map(args.shared_gate_up, 1, shared_width) : gate_up;
  const CUtensorMap shared_down = shared_width > 0 ? down_map(args.shared_down, 1, shared_width) : down;
  return launch_kernel("batch_experts", launch, experts_kernel<kFp8>, dim3(multiprocessors()), kThreads,
                       sizeof(Shared) + static_cast<size_t>(space.list.word_count()) * 4, 1, p, gate_up, down,
                       shared_gate_up, shared_down);
}

}  // namespace

int64_t batch_experts_workspace_bytes(int64_t rows, int64_t experts, int64_t top_k, int64_t hidden, int64_t width,
                                      int64_t shared_width) {
  return BatchExpertsSpace(nullptr, rows, experts, top_k, hidden, width, shared_width).bytes;
}

bool batch_experts_fits(const BatchExperts& a) {
  const DType dtype = a.gate_up.dtype;
  const bool fp8 = dtype == DType::kFloat8E4M3;
  const int64_t unit = fp8 ? 128 : 64;
  const bool same = a.down.dtype == dtype &&
                    (!a.shared_gate_up.data || (a.shared_gate_up.dtype == dtype && a.shared_down.dtype == dtype));
  return (fp8 || dtype == DType::kBFloat16) && same && a.experts >= a.top_k && a.experts <= kBatchExperts &&
         a.top_k >= 1 && a.top_k <= kBatchTopK && a.hidden >= 128 && a.hidden % 128 == 0 && a.width >= unit &&
         a.width % unit == 0 && (!a.shared_gate_up.data || (a.shared_width >= unit && a.shared_width % unit == 0));
}

Status batch_experts(const BatchExperts& args, const Launch& launch) {
  if (args.rows < 1 || args.rows > kBatchTokens)
    return invalid_argument("batch_experts: rows is " + std::to_string(args.rows) + ", the limit is 64");
  if (!batch_experts_fits(args)) {
    return invalid_argument("batch_experts: hidden " + std::to_string(args.hidden) + ", width " +
                            std::to_string(args.width) + " or their dtypes are not taken; use moe_experts");
  }
  const BatchExpertsSpace space = space_of(args);
  TS_RETURN_IF_ERROR(batch_route(args, space, launch));
  return args.gate_up.dtype == DType::kFloat8E4M3 ? multiply<true>(args, space, launch)
                                                  : multiply<false>(args, space, launch);
}

BatchExpertsOutput batch_experts_output(const BatchExperts& args) {
  const BatchExpertsSpace space = space_of(args);
  return {space.results, space.weights};
}

}  // namespace tokenspeed::kernels::cuda
