// Projections of 9 to 64 rows. A tile is 64 weight rows; the blocks of a cluster share it, each has its own run of k,
// for which it stages the step's rows once. One thread asks for the weights, chunk after chunk of 128 bytes along k,
// through a ring. Two warpgroups multiply the same weights by half of the rows each. Rank r of the cluster adds the
// sums of 64 / cluster of the tile's rows, which all ranks write into its shared memory, in the order of the ranks.
#include <string>

#include "kernels/cuda/batch_linear_split.cuh"
#include "kernels/cuda/tensor_map.h"

namespace tokenspeed::kernels::cuda {
namespace {

using namespace batch_linear_parts;

struct Segment {
  const float* scale;
  void* y;
  int64_t y_stride;
  int n;
  int tile_end;  // first tile of the next segment
  bool fp8;
  bool y_float;
  bool accumulate;
};

struct LinearParameters {
  const bf16* x;
  int64_t x_stride;
  const void* split;
  int rows;
  int k;
  int cluster;
  int slots;
  int segment_count;
  int first_bf16;    // segment; FP8 ones come first
  int fp8_clusters;  // of the grid's; the others have the bfloat16 tiles
  int clusters;
  int staged_bytes;
  Segment segments[kBatchSegments];
};

// The tiles of this cluster: first, first + step, ... below end, and its dtype.
struct Share {
  bool fp8;
  int first, step, end;

  __device__ explicit Share(const LinearParameters& p) {
    const int index = static_cast<int>(blockIdx.x) / p.cluster;
    const int fp8_tiles = p.first_bf16 > 0 ? p.segments[p.first_bf16 - 1].tile_end : 0;
    fp8 = index < p.fp8_clusters;
    first = fp8 ? index : fp8_tiles + index - p.fp8_clusters;
    step = fp8 ? p.fp8_clusters : p.clusters - p.fp8_clusters;
    end = fp8 ? fp8_tiles : p.segments[p.segment_count - 1].tile_end;
  }
};

__device__ inline int find_segment(const LinearParameters& p, int tile, int* row) {
  int s = 0;
  while (s + 1 < p.segment_count && tile >= p.segments[s].tile_end) ++s;
  *row = (tile - (s > 0 ? p.segments[s - 1].tile_end : 0)) * kTileRows;
  return s;
}

struct Maps {
  CUtensorMap segment[kBatchSegments];
};

// Split rows of this block's run of k. Clusters begin at different chunks, so that not all read the same at once.
__device__ inline void fetch_rows(const LinearParameters& p, int begin, int end, uint32_t staged, uint32_t scales,
                                  Control& control) {
  const SplitRows split(p.split, p.rows, p.k);
  const int run = end - begin;
  const int turn = static_cast<int>(blockIdx.x) / p.cluster;
  const uint32_t barrier = shared_address(&control.rows);
  barrier_arrive_expecting(barrier, run * (split.tile_bytes() + split.padded * 4));
  for (int i = 0; i < run; ++i) {
    const int chunk = (i + turn) % run;
    bulk_copy(staged + chunk * split.tile_bytes(), split.tile(begin + chunk), split.tile_bytes(), barrier);
  }
  if (run > 0) bulk_copy(scales, split.scales(begin), run * split.padded * 4, barrier);
}

__device__ inline void fetch_weights(const LinearParameters& p, const Maps& maps, const Share& share, int begin,
                                     int end, uint32_t staged, uint32_t scales, uint32_t ring, Control& control) {
  const int elements = share.fp8 ? kChunkElements<true> : kChunkElements<false>;
  bool rows_missing = share.fp8 && p.split != nullptr;
  const auto fetch_missing_rows = [&] {
    if (!rows_missing) return;
    rows_missing = false;
    wait_for_predecessor();
    fetch_rows(p, begin, end, staged, scales, control);
  };
  int number = 0;
  int s = 0;
  for (int tile = share.first; tile < share.end; tile += share.step) {
    int row;
    const int segment = find_segment(p, tile, &row);
    for (int chunk = begin; chunk < end; ++chunk, ++number) {
      const uint32_t full = shared_address(&control.full[s]);
      if (number == p.slots) fetch_missing_rows();  // the weights before do not depend on the predecessor
      barrier_wait(shared_address(&control.empty[s]), (number / p.slots + 1) % 2);
      barrier_arrive_expecting(full, kBatchTile);
      tile_copy(ring + s * kBatchTile, maps.segment[segment], row, chunk * elements, full);
      if (++s == p.slots) s = 0;
    }
  }
  fetch_missing_rows();
}

// The step's rows over this block's run of k; columns of rows that are not there are left as they are.
template <bool kFp8, int kHalfRows>
__device__ inline void stage(const LinearParameters& p, int begin, int end, uint32_t staged, float* scales) {
  constexpr int kLanes = kLanesPerRow<kFp8>;
  constexpr int kRowsAtOnce = kWarp / kLanes;
  constexpr int kBurst = 8;
  constexpr int kGroups = 2 * kHalfRows / kRowsAtOnce;
  constexpr int kTileBytes = 2 * kHalfRows * kColumnsPerRow<kFp8> * kBatchChunk;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int pieces = (end - begin) * kGroups;
  for (int first = warp * kBurst; first < pieces; first += kConsumers * 4 * kBurst) {
    uint4 raw[kBurst];
#pragma unroll
    for (int i = 0; i < kBurst; ++i) {
      const int row = (first + i) % kGroups * kRowsAtOnce + lane / kLanes;
      const int chunk = begin + (first + i) / kGroups;
      raw[i] = {};
      if (first + i < pieces && row < p.rows) {
        raw[i] = __ldcg(
            reinterpret_cast<const uint4*>(p.x + row * p.x_stride + chunk * kChunkElements<kFp8> + lane % kLanes * 8));
      }
    }
#pragma unroll
    for (int i = 0; i < kBurst; ++i) {
      if (first + i >= pieces) break;
      const int row = (first + i) % kGroups * kRowsAtOnce + lane / kLanes;
      const int chunk = (first + i) / kGroups;
      stage_piece<kFp8>(raw[i], row, row < p.rows, staged + chunk * kTileBytes, scales + chunk * 2 * kHalfRows);
    }
  }
}

__device__ inline void meet_consumers() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
static_assert(kConsumerThreads == 256, "the number in meet_consumers()");

// Sums of a tile as they are received: [weight row][the step's rows], the latter in the order in which threads hold
// them.
template <int kHalfRows>
constexpr int kPitch = 2 * kHalfRows + 4;
template <int kHalfRows>
constexpr int kReceivedFloats = kTileRows* kPitch<kHalfRows>;

template <bool kFp8, int kHalfRows>
__device__ inline int place_of_row(int row) {
  constexpr int kEach = kHalfRows / 4;  // of a thread
  const int local = row % kHalfRows;
  const int quarter = kFp8 ? local % 4 : local % 8 / 2;
  const int index = kFp8 ? local / 4 : local / 8 * 2 + local % 2;
  return row / kHalfRows * kHalfRows + quarter * kEach + index;
}

// This rank's rows of a tile: the ranks' sums in order, to y.
template <bool kFp8, int kHalfRows>
__device__ inline void store_rows(const LinearParameters& p, int tile, int rank, const float* sums) {
  int first;
  const Segment& s = p.segments[find_segment(p, tile, &first)];
  const int own = kTileRows / p.cluster;
  for (int i = static_cast<int>(threadIdx.x); i < own * p.rows; i += kConsumerThreads) {
    const int local = i % own;
    const int row = i / own;
    const int n = first + rank * own + local;
    if (n >= s.n) continue;
    const float* const from = sums + local * kPitch<kHalfRows> + place_of_row<kFp8, kHalfRows>(row);
    float sum = 0;
    for (int r = 0; r < p.cluster; ++r) sum += from[r * own * kPitch<kHalfRows>];
    const int64_t at = row * s.y_stride + n;
    if (s.y_float) {
      float* const y = static_cast<float*>(s.y) + at;
      *y = s.accumulate ? *y + sum : sum;
    } else {
      bf16* const y = static_cast<bf16*>(s.y) + at;
      *y = __float2bfloat16_rn(s.accumulate ? __bfloat162float(*y) + sum : sum);
    }
  }
}

template <bool kFp8, int kHalfRows>
__device__ inline void multiply(const LinearParameters& p, const Share& share, int begin, int end, int rank,
                                uint32_t staged, uint32_t ring, Control& control, float* row_scales, float* received) {
  constexpr int kColumns = kHalfRows * kColumnsPerRow<kFp8>;
  constexpr int kTileBytes = 2 * kColumns * kBatchChunk;
  constexpr int kTileSums = kTileRows * 2 * kHalfRows * 4;  // bytes
  using Sums = RowSums<kFp8, kColumns>;
  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = thread / kWarpgroup;
  const int lane = thread % kWarp;
  if (kFp8 && p.split != nullptr) {
    barrier_wait(shared_address(&control.rows), 0);
  } else {
    stage<kFp8, kHalfRows>(p, begin, end, staged, row_scales);
    publish_shared();
    meet_consumers();
  }
  const uint32_t own_columns = staged + warpgroup * kColumns * kBatchChunk;
  const int own = kTileRows / p.cluster;
  int slot = 0;
  uint32_t parity = 0;
  int number = 0;  // of the tile
  // A tile's sums are added while those of the next are on their way: two buffers, since a rank sends the sums of tile
  // t + 2 after it has got everybody's of t + 1, and those were sent after the ones of t had been read.
  const auto finish = [&](int finished, int tile) {
    const uint32_t barrier = shared_address(&control.sums[finished % 2]);
    wait_for_sent(barrier, finished / 2 % 2);
    if (thread == 0) barrier_arrive_expecting(barrier, kTileSums);
    store_rows<kFp8, kHalfRows>(p, tile, rank, received + finished % 2 * kReceivedFloats<kHalfRows>);
  };
  for (int tile = share.first; tile < share.end; tile += share.step, ++number) {
    Sums sums = {};
    float part[kColumns / 2];
    for (int chunk = begin; chunk < end; ++chunk) {
      barrier_wait(shared_address(&control.full[slot]), parity);
      warpgroup_begin();
      multiply_chunk<kFp8, kColumns>(part, ring + slot * kBatchTile, own_columns + (chunk - begin) * kTileBytes,
                                     !kFp8 && chunk > begin);
      warpgroup_commit();
      warpgroup_wait<0>();
      settle(part);
      if (lane == 0) barrier_arrive(shared_address(&control.empty[slot]));
      if constexpr (kFp8) {
        const float scale = control.weight_scale[number * (end - begin) + chunk - begin];
        add_scaled(sums, part, row_scales + (chunk - begin) * 2 * kHalfRows + warpgroup * kHalfRows, scale, scale);
      }
      if (++slot == p.slots) {
        slot = 0;
        parity ^= 1;
      }
    }
    if constexpr (!kFp8) {
#pragma unroll
      for (int i = 0; i < Sums::kRows; ++i) {
        sums.at[i][0] = part[i / 2 * 4 + i % 2];
        sums.at[i][1] = part[i / 2 * 4 + 2 + i % 2];
      }
    }
    if (number > 0) finish(number - 1, tile - share.step);
    const uint32_t local = shared_address(received + number % 2 * kReceivedFloats<kHalfRows>);
    const uint32_t barrier = shared_address(&control.sums[number % 2]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = thread % kWarpgroup / kWarp * 16 + lane / 4 + 8 * half;
      const int at = (rank * own + row % own) * kPitch<kHalfRows> + warpgroup * kHalfRows + lane % 4 * Sums::kRows;
      float values[Sums::kRows];
#pragma unroll
      for (int i = 0; i < Sums::kRows; ++i) values[i] = sums.at[i][half];
      send(on_rank(local, row / own) + at * 4, values, on_rank(barrier, row / own));
    }
  }
  if (number > 0) finish(number - 1, share.first + (number - 1) * share.step);
}

template <int kHalfRows>
__global__ void __launch_bounds__(kThreads, 1)
    linear_kernel(const __grid_constant__ LinearParameters p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Share share(p);
  const int rank = static_cast<int>(blockIdx.x) % p.cluster;
  const int chunks = p.k / (share.fp8 ? kChunkElements<true> : kChunkElements<false>);
  const int begin = rank * chunks / p.cluster;
  const int end = (rank + 1) * chunks / p.cluster;
  const uint32_t staged = shared_address(memory);
  const uint32_t ring = staged + p.staged_bytes;
  Control& control = *reinterpret_cast<Control*>(memory + p.staged_bytes + p.slots * kBatchTile);
  float* const received = reinterpret_cast<float*>(&control + 1);
  float* const row_scales = received + 2 * kReceivedFloats<kHalfRows>;
  static_assert(alignof(Control) % 16 == 0 && sizeof(Control) % 16 == 0, "row_scales begin at 16 bytes");
  if (threadIdx.x == kConsumerThreads) {
    for (int s = 0; s < p.segment_count; ++s) prefetch_map(maps.segment[s]);
  }
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.slots; ++s) {
      barrier_init(shared_address(&control.full[s]), 1);
      barrier_init(shared_address(&control.empty[s]), kConsumerThreads / kWarp);
    }
    for (uint64_t& barrier : control.sums) {
      barrier_init(shared_address(&barrier), 1);
      barrier_arrive_expecting(shared_address(&barrier), kTileRows * 2 * kHalfRows * 4);
    }
    barrier_init(shared_address(&control.rows), 1);
  }
  publish_barriers();
  if (share.fp8) {
    int number = 0;
    for (int tile = share.first; tile < share.end; tile += share.step, ++number) {
      int row;
      const float* const scale =
          p.segments[find_segment(p, tile, &row)].scale + static_cast<int64_t>(row / 128) * chunks;
      for (int i = static_cast<int>(threadIdx.x); i < end - begin; i += kThreads)
        control.weight_scale[number * (end - begin) + i] = scale[begin + i];
    }
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x >= kConsumerThreads) {
    if (threadIdx.x == kConsumerThreads)
      fetch_weights(p, maps, share, begin, end, staged, shared_address(row_scales), ring, control);
    return;
  }
  wait_for_predecessor();
  allow_successor();
  if (share.fp8) {
    multiply<true, kHalfRows>(p, share, begin, end, rank, staged, ring, control, row_scales, received);
  } else {
    multiply<false, kHalfRows>(p, share, begin, end, rank, staged, ring, control, row_scales, received);
  }
}

}  // namespace

bool batch_linear_fits(const BatchLinear& args) {
  if (args.rows < 1 || args.rows > kBatchTokens || args.segment_count < 1 || args.segment_count > kBatchSegments)
    return false;
  for (int i = 0; i < args.segment_count; ++i) {
    const Matrix& w = args.segments[i].weight;
    const bool fp8 = w.dtype == DType::kFloat8E4M3;
    if (!fp8 && w.dtype != DType::kBFloat16) return false;
    if (w.layout != MatrixLayout::kRowMajor || w.k != args.segments[0].weight.k || w.k % 128 != 0) return false;
  }
  return best_split(work_of(args)).cluster > 0;
}

Status batch_linear(const BatchLinear& args, const Launch& launch) {
  if (!batch_linear_fits(args)) {
    return invalid_argument("batch_linear: " + std::to_string(args.rows) + " rows of " +
                            std::to_string(args.segments[0].weight.k) + " columns are not taken; use linear");
  }
  const Work work = work_of(args);
  const Split split = best_split(work);
  LinearParameters p = {static_cast<const bf16*>(args.x.data),
                        args.x.stride,
                        args.split,
                        static_cast<int>(args.rows),
                        static_cast<int>(work.k),
                        split.cluster,
                        split.slots,
                        args.segment_count,
                        0,
                        split.fp8_clusters,
                        split.clusters,
                        split.staged_bytes,
                        {}};
  Maps maps = {};
  int placed = 0;
  int tiles = 0;
  for (const bool fp8 : {true, false}) {
    for (int i = 0; i < args.segment_count; ++i) {
      const BatchSegment& s = args.segments[i];
      if ((s.weight.dtype == DType::kFloat8E4M3) != fp8) continue;
      tiles += static_cast<int>((s.weight.n + kTileRows - 1) / kTileRows);
      p.segments[placed] = {
          s.weight.scale, s.y.data, s.y.stride, static_cast<int>(s.weight.n), tiles, fp8, s.y.dtype == DType::kFloat32,
          s.accumulate};
      maps.segment[placed++] = tensor_map(s.weight.data, s.weight.dtype, s.weight.n, s.weight.k,
                                          s.weight.k * (fp8 ? 1 : 2), kTileRows, fp8 ? 128 : 64);
    }
    if (fp8) p.first_bf16 = placed;
  }
  const auto run = [&](auto* kernel) {
    return launch_kernel("batch_linear", launch, kernel, dim3(split.clusters * split.cluster), kThreads,
                         split.shared_bytes, split.cluster, p, maps);
  };
  if (work.half_rows == 8) return run(linear_kernel<8>);
  return work.half_rows == 16 ? run(linear_kernel<16>) : run(linear_kernel<32>);
}

}  // namespace tokenspeed::kernels::cuda
