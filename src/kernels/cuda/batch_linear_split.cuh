// How batch_linear.cu divides its work: clusters, runs of k, shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/batch.h"
#include "kernels/cuda/batch_tiles.cuh"

namespace tokenspeed::kernels::cuda::batch_linear_parts {

inline constexpr int kConsumers = 2;  // warpgroups
inline constexpr int kConsumerThreads = kConsumers * kWarpgroup;
inline constexpr int kThreads = kConsumerThreads + kWarp;
inline constexpr int kMostSlots = 16;
inline constexpr int kLeastSlots = 4;
inline constexpr int kTileRows = 64;
inline constexpr int kLeastCluster = 2;  // asynchronous stores need one
inline constexpr int kMostCluster = 8;
inline constexpr int kMostTiles = 64;  // of one cluster
inline constexpr size_t kSharedBytes = 227 * 1024;

// Shared memory: staged rows, ring, then this with the sums of two tiles behind it.
struct alignas(16) Control {
  uint64_t full[kMostSlots];
  uint64_t empty[kMostSlots];
  uint64_t sums[2];
  uint64_t rows;  // split rows have arrived
  float weight_scale[kMostTiles * 8];
};

// A way to split the work; cost in chunks that one block streams.
struct Split {
  int cluster = 0;
  int clusters = 0;
  int fp8_clusters = 0;
  int slots = 0;
  int staged_bytes = 0;
  size_t shared_bytes = 0;
  int64_t cost = 0;
};

struct Work {
  int half_rows;
  int64_t k;
  int fp8_tiles;
  int bf16_tiles;
};

inline Split split_by(const Work& work, int cluster) {
  constexpr int kTileCost = 3;  // of the end of a tile
  Split split = {.cluster = cluster};
  const int64_t fp8_chunks = work.k / 128, bf16_chunks = work.k / 64;
  const int64_t fp8_work = work.fp8_tiles * fp8_chunks, bf16_work = work.bf16_tiles * bf16_chunks;
  // Clusters lie within groups of at least 16 multiprocessors.
  const int blocks = cluster > 2 ? multiprocessors() / 16 * 16 : multiprocessors();
  const int most = std::max(blocks / cluster, 2);
  split.clusters = std::min(most, work.fp8_tiles + work.bf16_tiles);
  if (work.bf16_tiles == 0) {
    split.fp8_clusters = split.clusters;
  } else if (work.fp8_tiles > 0) {
    split.fp8_clusters = static_cast<int>(std::clamp<int64_t>(
        split.clusters - (bf16_work * split.clusters + fp8_work + bf16_work - 1) / (fp8_work + bf16_work), 1,
        split.clusters - 1));
  }
  const auto tiles_each = [](int tiles, int clusters) { return tiles == 0 ? 0 : (tiles + clusters - 1) / clusters; };
  const int fp8_each = tiles_each(work.fp8_tiles, split.fp8_clusters);
  const int bf16_each = tiles_each(work.bf16_tiles, split.clusters - split.fp8_clusters);
  const auto run = [&](int64_t chunks) { return (chunks + cluster - 1) / cluster; };
  split.cost = std::max(fp8_each * (run(fp8_chunks) + kTileCost), bf16_each * (run(bf16_chunks) + kTileCost));
  const int64_t columns = 2 * work.half_rows;
  const int64_t staged =
      std::max(work.fp8_tiles > 0 ? run(fp8_chunks) * 2 : 0, work.bf16_tiles > 0 ? run(bf16_chunks) : 0) * columns *
      kBatchChunk;
  const int64_t fixed = static_cast<int64_t>(sizeof(Control)) + 2 * kTileRows * (columns + 4) * 4 +
                        (work.fp8_tiles > 0 ? run(fp8_chunks) * columns * 4 : 0);
  const int64_t left = static_cast<int64_t>(kSharedBytes) - staged - fixed;
  const int64_t needed = std::max(fp8_each * run(fp8_chunks), bf16_each * run(bf16_chunks));
  split.slots =
      static_cast<int>(std::min({left / kBatchTile, std::max<int64_t>(needed, kLeastSlots), int64_t{kMostSlots}}));
  split.staged_bytes = static_cast<int>(staged);
  split.shared_bytes = static_cast<size_t>(staged + fixed + int64_t{split.slots} * kBatchTile);
  const bool scales_fit = fp8_each * run(fp8_chunks) <= kMostTiles * 8;
  const bool enough_chunks = (work.fp8_tiles > 0 ? fp8_chunks : bf16_chunks) >= cluster;
  if (left < 0 || split.slots < kLeastSlots || !scales_fit || !enough_chunks) split.cluster = 0;
  return split;
}

// cluster 0: none fits.
inline Split best_split(const Work& work) {
  Split best;
  for (int cluster = kLeastCluster; cluster <= kMostCluster; cluster *= 2) {
    const Split split = split_by(work, cluster);
    if (split.cluster > 0 && (best.cluster == 0 || split.cost < best.cost)) best = split;
  }
  return best;
}

inline Work work_of(const BatchLinear& args) {
  Work work = {args.rows <= 16 ? 8 : args.rows <= 32 ? 16 : 32, args.segments[0].weight.k, 0, 0};
  for (int i = 0; i < args.segment_count; ++i) {
    const Matrix& w = args.segments[i].weight;
    (w.dtype == DType::kFloat8E4M3 ? work.fp8_tiles : work.bf16_tiles) +=
        static_cast<int>((w.n + kTileRows - 1) / kTileRows);
  }
  return work;
}

}  // namespace tokenspeed::kernels::cuda::batch_linear_parts
