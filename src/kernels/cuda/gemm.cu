// 128 x 128 tiles, one block per multiprocessor walking over many of them. A warpgroup fetches: weights and contiguous
// rows by the copy engine, gathered rows and scales by its threads. Two warpgroups multiply 64 rows each, add up in
// registers and write through shared memory, so that rows leave in whole lines.
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/warpgroup.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerRegisters = 224;
constexpr int kProducerRegisters = 56;
// The block starts with the greatest multiple of 8 that all threads can have; consumers wait for what the others give.
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= (kConsumers + 1) * (65536 / kThreads / 8 * 8));
constexpr int kHalfTile = kGemmTile / 2;
constexpr int kRowBytes = 128;  // of a tile along k
constexpr int kHalfBytes = kHalfTile * kRowBytes;
constexpr int kStages = 5;
constexpr int kLag = 2;                        // steps whose thread copies may be outstanding
constexpr int kSlots = 8;                      // tiles between producer and consumers: more than stages
constexpr int kRaster = 8;                     // row tiles that share the weights' tiles in the L2 cache
constexpr int kOutPitch = kGemmTile * 2 + 16;  // bytes; eight rows' equal columns in different banks
static_assert(kSlots > kStages, "a step may be a whole tile");

// What the producer finds out about a tile.
struct Slot {
  GemmTile tile;
  int32_t column_tile;
  int32_t to[kGemmTile];  // y's row of each row
};

struct Shared {
  unsigned char a[kStages][2 * kHalfBytes];
  unsigned char b[kStages][2 * kHalfBytes];
  unsigned char out[kConsumers][kHalfTile][kOutPitch];
  float a_scale[kStages][kGemmTile];
  float b_scale[kStages][4];  // of the two halves of the columns
  Slot slots[kSlots];
  alignas(8) uint64_t full[kStages];
  alignas(8) uint64_t empty[kStages];
};

__device__ inline int count_row_tiles(const TileGemm& args) {
  return args.tiles ? *args.tile_count : static_cast<int>((args.rows + kGemmTile - 1) / kGemmTile);
}

// A tile and what the producer's thread i knows of its row i.
struct Place {
  GemmTile tile;
  int column_tile;
  int from;  // a_rows' entry
  int to;
};

// Tile number `index`: bands of kRaster row tiles, in each the columns one after the other.
__device__ inline bool find_tile(const TileGemm& args, int index, int row_tiles, int column_tiles, Place* place) {
  if (index >= row_tiles * column_tiles) return false;
  const int band = index / (kRaster * column_tiles);
  const int band_rows = min(kRaster, row_tiles - band * kRaster);
  const int in_band = index - band * kRaster * column_tiles;
  const int row_tile = band * kRaster + in_band % band_rows;
  place->column_tile = in_band / band_rows;
  place->tile = args.tiles ? args.tiles[row_tile] : GemmTile{0, row_tile * kGemmTile, static_cast<int32_t>(args.rows)};
  return true;
}
__device__ inline void find_row(const TileGemm& args, int thread, Place* place) {
  const int row = min(place->tile.first + thread, place->tile.end - 1);
  place->from = args.a_rows ? args.a_rows[row] : row;
  place->to = args.y_rows ? args.y_rows[row] : row;
}

// The weight's row that is the first of half `half` of the tile's columns: with swiglu gate and up rows.
template <bool kSwiGlu>
__device__ inline int64_t first_weight_row(const TileGemm& args, int column_tile, int half) {
  if constexpr (kSwiGlu) return int64_t{column_tile} * kHalfTile + half * (args.n / 2);
  return int64_t{column_tile} * kGemmTile + half * kHalfTile;
}

template <bool kFp8, bool kSwiGlu, bool kGather>
__device__ inline void produce(const TileGemm& args, const CUtensorMap& a_map, const CUtensorMap& b_map, Shared& shared,
                               int column_tiles, int group_rows) {
  constexpr int kElement = kFp8 ? 1 : 2;
  constexpr int kStepColumns = kRowBytes / kElement;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int lane = thread % kWarp;
  const int64_t k_bytes = args.k * kElement;
  const int steps = static_cast<int>((k_bytes + kRowBytes - 1) / kRowBytes);
  const int row_tiles = count_row_tiles(args);
  int done = 0;  // steps over all tiles
  // The next tile is looked up while this one is fetched: its rows are two dependent loads away.
  Place next;
  bool more = find_tile(args, blockIdx.x, row_tiles, column_tiles, &next);
  if (more) find_row(args, thread, &next);
  for (int number = 0; more; ++number) {
    const GemmTile tile = next.tile;
    const int column_tile = next.column_tile;
    const int from = args.a_rows ? next.from / args.a_divisor : next.from;
    Slot& slot = shared.slots[number % kSlots];
    slot.to[thread] = next.to;
    if (thread == 0) {
      slot.tile = tile;
      slot.column_tile = column_tile;
    }
    const float* scale = nullptr;
    const float* block_scale = nullptr;
    if constexpr (kFp8) {
      scale = args.a_scale + static_cast<int64_t>(from) * steps;
      block_scale = args.b_scale + tile.group * args.b_scale_group_stride +
                    first_weight_row<kSwiGlu>(args, column_tile, thread % 2) / 128 * steps;
    }
    const bool both_halves = tile.end - tile.first > kHalfTile;
    uint32_t pieces[8];  // of 16 bytes, from the beginning of a to this lane's columns of eight rows
    if constexpr (kGather) {
      const uint32_t row_pieces = static_cast<uint32_t>(args.a_stride * kElement / 16);
#pragma unroll
      for (int i = 0; i < 8; ++i) pieces[i] = __shfl_sync(~0u, from, 4 * i + lane / 8) * row_pieces + lane % 8;
    }
    for (int step = 0; step < steps; ++step, ++done) {
      const int s = done % kStages;
      const uint32_t full = shared_address(&shared.full[s]);
      barrier_wait(shared_address(&shared.empty[s]), (done / kStages + 1) % 2);
      if (thread == 0) {
        const int a_halves = kGather ? 0 : both_halves ? 2 : 1;
        barrier_arrive_expecting(full, (a_halves + 2) * kHalfBytes);
        for (int half = 0; half < a_halves; ++half) {
          tile_copy(shared_address(shared.a[s]) + half * kHalfBytes, a_map, tile.first + half * kHalfTile,
                    step * kStepColumns, full);
        }
        for (int half = 0; half < 2; ++half) {
          const int64_t weight_row =
              int64_t{tile.group} * group_rows + first_weight_row<kSwiGlu>(args, column_tile, half);
          tile_copy(shared_address(shared.b[s]) + half * kHalfBytes, b_map, static_cast<int>(weight_row),
                    step * kStepColumns, full);
        }
      }
      if constexpr (kGather) {
        const uint32_t to = shared_address(shared.a[s]) + thread / kWarp * 32 * kRowBytes;
        const bool inside = step * kRowBytes + lane % 8 * 16 < k_bytes;
        const uint4* const a = static_cast<const uint4*>(args.a) + step * (kRowBytes / 16);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          copy16_async(to + swizzled<kRowBytes>(4 * i + lane / 8, lane % 8), a + pieces[i], inside);
      }
      if constexpr (kFp8) {
        copy4_async(shared_address(&shared.a_scale[s][thread]), scale + step);
        if (thread < 2) copy4_async(shared_address(&shared.b_scale[s][thread]), block_scale + step);
      }
      commit_copies();
      if (step == 0) {
        more = find_tile(args, blockIdx.x + (number + 1) * gridDim.x, row_tiles, column_tiles, &next);
      }
      if (step == min(1, steps - 1) && more) find_row(args, thread, &next);
      if (done >= kLag) {
        wait_copies<kLag>();
        if constexpr (kGather) publish_shared();
        barrier_arrive(shared_address(&shared.full[(done - kLag) % kStages]));
      }
    }
  }
  wait_copies<0>();
  if constexpr (kGather) publish_shared();
  for (int step = max(0, done - kLag); step < done; ++step)
    barrier_arrive(shared_address(&shared.full[step % kStages]));
}

__device__ inline void store_pair(const TileGemm& args, int64_t row, int64_t column, int64_t columns, float x,
                                  float y) {
  const int64_t at = row * args.y_stride + column;
  if (args.y_dtype == DType::kFloat32) {
    float* out = static_cast<float*>(args.y) + at;
    out[0] = args.accumulate ? out[0] + x : x;
    if (column + 1 < columns) out[1] = args.accumulate ? out[1] + y : y;
    return;
  }
  __nv_bfloat162* out = reinterpret_cast<__nv_bfloat162*>(static_cast<bf16*>(args.y) + at);
  const float2 old = __bfloat1622float2(*out);
  *out = __floats2bfloat162_rn(x + old.x, y + old.y);
}

// This warpgroup's 64 rows of a tile to y.
template <bool kSwiGlu>
__device__ inline void store_tile(const TileGemm& args, const Slot& slot, Shared& shared, float (&d)[kAccumulators]) {
  constexpr int kGroups = kSwiGlu ? kAccumulators / 8 : kAccumulators / 4;  // of 8 columns
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int lane = thread % kWarp;
  if constexpr (kSwiGlu) {
#pragma unroll
    for (int i = 0; i < kAccumulators / 2; ++i) d[i] = silu(d[i]) * d[i + kAccumulators / 2];
  }
  const int64_t columns = kSwiGlu ? args.n / 2 : args.n;
  const int64_t first_column = int64_t{slot.column_tile} * (kGroups * 8);
  const int rows = min(kHalfTile, slot.tile.end - slot.tile.first - warpgroup * kHalfTile);
  const int first_row = thread / kWarp * 16 + lane / 4;
  if (args.y_dtype == DType::kFloat32 || args.accumulate) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first_row + 8 * i >= rows) continue;
      const int64_t to = slot.to[warpgroup * kHalfTile + first_row + 8 * i];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        const int64_t column = first_column + j * 8 + lane % 4 * 2;
        if (column < columns) store_pair(args, to, column, columns, d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
      }
    }
    return;
  }
  // Every warp reads back the 16 rows it wrote itself.
  unsigned char* const out = &shared.out[warpgroup][thread / kWarp * 16][0];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      *reinterpret_cast<uint32_t*>(out + (lane / 4 + 8 * i) * kOutPitch + j * 16 + lane % 4 * 4) =
          pack_bf16(d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kGroups / 2; ++i) {
    const int piece = i * kWarp + lane;
    const int row = piece / kGroups;
    const int64_t column = first_column + piece % kGroups * 8;
    const int in_half = thread / kWarp * 16 + row;
    if (in_half >= rows || column >= columns) continue;
    const uint4 value = *reinterpret_cast<const uint4*>(out + row * kOutPitch + piece % kGroups * 16);
    *reinterpret_cast<uint4*>(static_cast<bf16*>(args.y) + slot.to[warpgroup * kHalfTile + in_half] * args.y_stride +
                              column) = value;
  }
  __syncwarp();
}

template <bool kFp8, bool kSwiGlu>
__device__ inline void consume(const TileGemm& args, Shared& shared, int column_tiles) {
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = static_cast<int>(threadIdx.x) % (2 * kWarpgroup) / kWarp * 16 + lane / 4;
  const int steps = static_cast<int>((args.k * (kFp8 ? 1 : 2) + kRowBytes - 1) / kRowBytes);
  const int row_tiles = count_row_tiles(args);
  int done = 0;
  const auto release = [&](int step) { warp_arrive(shared_address(&shared.empty[step % kStages])); };
  for (int number = 0; static_cast<int>(blockIdx.x + number * gridDim.x) < row_tiles * column_tiles; ++number) {
    const Slot& slot = shared.slots[number % kSlots];
    barrier_wait(shared_address(&shared.full[done % kStages]), done / kStages % 2);
    if (slot.tile.end - slot.tile.first <= warpgroup * kHalfTile) {
      for (int step = 0; step < steps; ++step, ++done) {
        barrier_wait(shared_address(&shared.full[done % kStages]), done / kStages % 2);
        release(done);
      }
      continue;
    }
    float total[kAccumulators];
    float part[kFp8 ? kAccumulators : 1];
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) total[i] = 0;
    for (int step = 0; step < steps; ++step, ++done) {
      const int s = done % kStages;
      barrier_wait(shared_address(&shared.full[s]), done / kStages % 2);
      const uint64_t a_tile = tile_descriptor(shared_address(shared.a[s]) + warpgroup * kHalfBytes);
      const uint64_t b_tile = tile_descriptor(shared_address(shared.b[s]));
      warpgroup_begin();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kFp8) {
          multiply_fp8(part, a_tile + 2 * i, b_tile + 2 * i, i > 0);
        } else {
          multiply_bf16(total, a_tile + 2 * i, b_tile + 2 * i, true);
        }
      }
      warpgroup_commit();
      if constexpr (kFp8) {
        float scales[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) scales[i][j] = shared.a_scale[s][row + 8 * i] * shared.b_scale[s][j];
        }
        warpgroup_wait<0>();
        settle(part);
        release(done);
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) total[i] += part[i] * scales[i / 2 % 2][i >= kAccumulators / 2];
      } else {
        // The products before this one are complete: their stage is free.
        warpgroup_wait<1>();
        if (step > 0) release(done - 1);
      }
    }
    if constexpr (!kFp8) {
      warpgroup_wait<0>();
      settle(total);
      release(done - 1);
    }
    store_tile<kSwiGlu>(args, slot, shared, total);
  }
}

template <bool kFp8, bool kSwiGlu, bool kGather>
__global__ void __launch_bounds__(kThreads, 1)
    tile_gemm_kernel(TileGemm args, const __grid_constant__ CUtensorMap a_map,
                     const __grid_constant__ CUtensorMap b_map, int column_tiles, int group_rows) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(shared_address(&shared.full[s]), kWarpgroup + 1);
      barrier_init(shared_address(&shared.empty[s]), kConsumers * kWarpgroup / kWarp * kWarpArrivals);
    }
  }
  publish_barriers();
  __syncthreads();
  if (threadIdx.x >= kConsumers * kWarpgroup) {
    give_registers<kProducerRegisters>();
    produce<kFp8, kSwiGlu, kGather>(args, a_map, b_map, shared, column_tiles, group_rows);
  } else {
    take_registers<kConsumerRegisters>();
    consume<kFp8, kSwiGlu>(args, shared, column_tiles);
  }
}

template <bool kFp8, bool kSwiGlu, bool kGather>
void launch(const TileGemm& args, cudaStream_t stream) {
  constexpr int kElement = kFp8 ? 1 : 2;
  constexpr DType kType = kFp8 ? DType::kFloat8E4M3 : DType::kBFloat16;
  const int64_t row_tiles = args.tiles ? args.max_tiles : ceil_div(args.rows, kGemmTile);
  const int64_t column_tiles = ceil_div(args.n, kGemmTile);
  const int64_t group_rows = args.groups > 1 ? args.b_group_stride / (args.k * kElement) : args.n;
  const int64_t blocks = row_tiles * column_tiles < multiprocessors() ? row_tiles * column_tiles : multiprocessors();
  const CUtensorMap b_map = tensor_map(args.b, kType, (args.groups - 1) * group_rows + args.n, args.k,
                                       args.k * kElement, kHalfTile, kRowBytes / kElement);
  const CUtensorMap a_map =
      kGather ? b_map
              : tensor_map(args.a, kType, args.rows, args.k, args.a_stride * kElement, kHalfTile, kRowBytes / kElement);
  cudaFuncSetAttribute(tile_gemm_kernel<kFp8, kSwiGlu, kGather>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       sizeof(Shared));
  tile_gemm_kernel<kFp8, kSwiGlu, kGather><<<static_cast<unsigned>(blocks), kThreads, sizeof(Shared), stream>>>(
      args, a_map, b_map, static_cast<int>(column_tiles), static_cast<int>(group_rows));
}

}  // namespace

void tile_gemm(const TileGemm& args, cudaStream_t stream) {
  const bool gather = args.a_rows != nullptr;
  if (args.dtype == DType::kFloat8E4M3) {
    if (args.swiglu) return gather ? launch<true, true, true>(args, stream) : launch<true, true, false>(args, stream);
    return launch<true, false, false>(args, stream);
  }
  if (args.swiglu) return gather ? launch<false, true, true>(args, stream) : launch<false, true, false>(args, stream);
  launch<false, false, false>(args, stream);
}

}  // namespace tokenspeed::kernels::cuda
