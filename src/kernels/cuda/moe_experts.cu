// Routed experts for many rows: sort the (row, expert) pairs by expert, two grouped products, one weighted sum.
#include <cooperative_groups.h>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mlp.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kSortThreads = 1024;
constexpr int kMaxExperts = 512;
constexpr int kSortBlocks = 8;  // a cluster of this many when there is enough for each
constexpr int kSumThreads = 256;

constexpr int64_t kAlignment = 256;
int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
int64_t max_tiles(int64_t pairs, int64_t experts) { return pairs / kGemmTile + (experts < pairs ? experts : pairs); }

// The parts of the workspace, one after the other.
struct Workspace {
  int32_t* sorted = nullptr;  // [pairs] pair numbers by expert
  GemmTile* tiles = nullptr;
  int32_t* tile_count = nullptr;
  std::byte* quantized = nullptr;  // x, then the activations
  float* scale = nullptr;
  bf16* activations = nullptr;  // [pairs, width] in sorted order
  bf16* results = nullptr;      // [pairs, hidden] by pair number
  int64_t bytes = 0;

  Workspace(void* memory, int64_t rows, int64_t experts, int64_t top_k, int64_t hidden, int64_t width) {
    const int64_t pairs = rows * top_k;
    const int64_t operands = rows * hidden > pairs * width ? rows * hidden : pairs * width;
    std::byte* next = static_cast<std::byte*>(memory);
    const auto take = [&](int64_t size) {
      std::byte* at = next + bytes;
      bytes += aligned(size);
      return at;
    };
    sorted = reinterpret_cast<int32_t*>(take(pairs * 4));
    tiles = reinterpret_cast<GemmTile*>(take(max_tiles(pairs, experts) * static_cast<int64_t>(sizeof(GemmTile))));
    tile_count = reinterpret_cast<int32_t*>(take(4));
    quantized = take(operands);
    scale = reinterpret_cast<float*>(take((operands / 128 + 1) * 4));
    activations = reinterpret_cast<bf16*>(take(pairs * width * 2));
    results = reinterpret_cast<bf16*>(take(pairs * hidden * 2));
  }
};

// Inclusive sums over the block's first kMaxExperts threads of two values at once; all threads must call.
__device__ inline int2 sums_until(int2 value) {
  __shared__ int2 warps[kMaxExperts / kWarp];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int x = __shfl_up_sync(~0u, value.x, offset);
    const int y = __shfl_up_sync(~0u, value.y, offset);
    if (lane >= offset) {
      value.x += x;
      value.y += y;
    }
  }
  if (thread < kMaxExperts && lane == kWarp - 1) warps[thread / kWarp] = value;
  __syncthreads();
  if (thread < kMaxExperts) {
    for (int w = 0; w < thread / kWarp; ++w) {
      value.x += warps[w].x;
      value.y += warps[w].y;
    }
  }
  return value;
}

// One cluster; each block counts and places its share of the pairs. Pairs of one expert come in no particular order:
// each row's result is the same anywhere.
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const int32_t* ids, int pairs, int experts, int32_t* sorted, GemmTile* tiles, int32_t* tile_count) {
  __shared__ int count[kMaxExperts];  // read by the other blocks
  __shared__ int next[kMaxExperts];
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks());
  const int rank = static_cast<int>(cluster.block_rank());
  const int thread = static_cast<int>(threadIdx.x);
  const int share = (pairs + blocks - 1) / blocks;
  const int end = min(pairs, (rank + 1) * share);
  if (thread < kMaxExperts) count[thread] = 0;
  __syncthreads();
  for (int i = rank * share + thread; i < end; i += kSortThreads) {
    const int expert = ids[i];
    if (expert >= 0 && expert < experts) atomicAdd(&count[expert], 1);
  }
  cluster.sync();
  int rows = 0;
  int before = 0;  // of this expert, in the blocks before
  if (thread < kMaxExperts) {
    for (int b = 0; b < blocks; ++b) {
      const int theirs = cluster.map_shared_rank(count, b)[thread];
      rows += theirs;
      if (b < rank) before += theirs;
    }
  }
  const int own_tiles = (rows + kGemmTile - 1) / kGemmTile;
  const int2 until = sums_until(make_int2(rows, own_tiles));
  if (thread < kMaxExperts) {
    next[thread] = until.x - rows + before;
    if (rank == 0) {
      for (int i = 0; i < own_tiles; ++i) {
        tiles[until.y - own_tiles + i] = {thread, until.x - rows + i * kGemmTile, until.x};
      }
      if (thread == kMaxExperts - 1) *tile_count = until.y;
    }
  }
  cluster.sync();
  for (int i = rank * share + thread; i < end; i += kSortThreads) {
    const int expert = ids[i];
    if (expert >= 0 && expert < experts) sorted[atomicAdd(&next[expert], 1)] = i;
  }
}

// y[t] = sum_i weight[t, i] results[t, i], in the order of i; experts of other ranks are left out.
__global__ void sum_kernel(MoeExperts args, const bf16* results) {
  const int64_t index = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  if (index >= args.rows * (args.hidden / 8)) return;
  const int64_t row = index / (args.hidden / 8);
  const int64_t column = index % (args.hidden / 8) * 8;
  float sum[8] = {};
  for (int64_t i = 0; i < args.top_k; ++i) {
    const int64_t pair = row * args.top_k + i;
    if (args.expert_ids[pair] < 0 || args.expert_ids[pair] >= args.experts) continue;
    const float weight = args.expert_weights[pair];
    float v[8];
    load8(results + pair * args.hidden + column, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += weight * v[j];
  }
  store8(static_cast<bf16*>(args.y.data) + row * args.y.stride + column, sum);
}

}  // namespace

int64_t moe_experts_workspace_bytes(int64_t rows, int64_t experts, int64_t top_k, int64_t hidden, int64_t width) {
  return Workspace(nullptr, rows, experts, top_k, hidden, width).bytes;
}

void moe_experts(const MoeExperts& args, cudaStream_t stream) {
  const int64_t pairs = args.rows * args.top_k;
  const Workspace space(args.workspace, args.rows, args.experts, args.top_k, args.hidden, args.width);
  const int sort_blocks = pairs >= kSortBlocks * kSortThreads ? kSortBlocks : 1;
  // An error stays the runtime's last error, as those of the other launches.
  (void)launch_kernel("experts", {stream, false}, sort_kernel, dim3(sort_blocks), kSortThreads, 0, sort_blocks,
                      args.expert_ids, static_cast<int>(pairs), static_cast<int>(args.experts), space.sorted,
                      space.tiles, space.tile_count);
  const bool fp8 = args.gate_up.dtype == DType::kFloat8E4M3;
  TileGemm gate_up = {.dtype = args.gate_up.dtype,
                      .n = 2 * args.width,
                      .k = args.hidden,
                      .a = args.x.data,
                      .a_stride = args.x.stride,
                      .a_rows = space.sorted,
                      .a_divisor = static_cast<int32_t>(args.top_k),
                      .b = args.gate_up.data,
                      .groups = args.experts,
                      .b_group_stride = args.gate_up_stride,
                      .tiles = space.tiles,
                      .tile_count = space.tile_count,
                      .max_tiles = max_tiles(pairs, args.experts),
                      .rows = pairs,
                      .swiglu = true,
                      .y = space.activations,
                      .y_stride = args.width};
  TileGemm down = {.dtype = args.down.dtype,
                   .n = args.hidden,
                   .k = args.width,
                   .a = space.activations,
                   .a_stride = args.width,
                   .b = args.down.data,
                   .groups = args.experts,
                   .b_group_stride = args.down_stride,
                   .tiles = space.tiles,
                   .tile_count = space.tile_count,
                   .max_tiles = max_tiles(pairs, args.experts),
                   .rows = pairs,
                   .y = space.results,
                   .y_stride = args.hidden,
                   .y_rows = space.sorted};
  if (fp8) {
    const int64_t blocks = args.hidden / 128 * (args.width / 128);
    quantize_rows(args.x.data, args.x.stride, args.rows, args.hidden, space.quantized, space.scale, stream);
    gate_up.a = space.quantized;
    gate_up.a_stride = args.hidden;
    gate_up.a_scale = down.a_scale = space.scale;
    gate_up.b_scale = args.gate_up.scale;
    gate_up.b_scale_group_stride = 2 * blocks;
    down.a = space.quantized;
    down.b_scale = args.down.scale;
    down.b_scale_group_stride = blocks;
  }
  tile_gemm(gate_up, stream);
  if (fp8) quantize_rows(space.activations, args.width, pairs, args.width, space.quantized, space.scale, stream);
  tile_gemm(down, stream);
  sum_kernel<<<static_cast<unsigned>(ceil_div(args.rows * args.hidden / 8, kSumThreads)), kSumThreads, 0, stream>>>(
      args, space.results);
}

}  // namespace tokenspeed::kernels::cuda
