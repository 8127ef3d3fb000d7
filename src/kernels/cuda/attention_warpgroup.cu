// Causal attention over paged keys and values, head_dim 256, for many query rows: a block has 128 rows (token, head of
// the group), 64 per warpgroup. One warp fetches blocks of 64 keys and values with the copy engine; S = Q K^T of the
// next block runs while the softmax of this one is computed, and O += P V takes P from registers.
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/warpgroup.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kHeadDim = 256;
constexpr int kConsumers = 2;
constexpr int kRows = 64 * kConsumers;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerRegisters = 240;
constexpr int kProducerRegisters = 24;
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= (kConsumers + 1) * (65536 / kThreads / 8 * 8));
constexpr int kStages = 2;
constexpr int kColumns = 64;  // of a part, 128 bytes
constexpr int kParts = kHeadDim / kColumns;
constexpr int kPartBytes = kAttentionBlock * kColumns * 2;
constexpr int kBlockBytes = kParts * kPartBytes;
constexpr int kScores = kAttentionBlock / 2;  // of a thread
constexpr int kSums = kHeadDim / 2;

struct Shared {
  bf16 query[kParts][kRows][kColumns];  // at the end the gates, then the result
  bf16 keys[kStages][kParts][kAttentionBlock][kColumns];
  bf16 values[kStages][kParts][kAttentionBlock][kColumns];
  alignas(8) uint64_t keys_full[kStages];
  alignas(8) uint64_t keys_empty[kStages];
  alignas(8) uint64_t values_full[kStages];
  alignas(8) uint64_t values_empty[kStages];
};

// The block's place in the batch.
struct Work {
  int first_token;
  int context;
  int kv_head;
  int group;
  int first_row;
  int rows;
  int key_count;  // that the last row sees
  const int32_t* table;
};

// Lane (run, part) fetches a run of rows within one page, 64 of their columns.
__device__ inline void fetch(const PagedAttention& args, const CUtensorMap& key_map, const CUtensorMap& value_map,
                             Shared& shared, const Work& work) {
  const int lane = threadIdx.x % kWarp;
  const int page_size = args.pages.page_size;
  const int run_rows = min(page_size, kAttentionBlock);
  const int runs = kAttentionBlock / run_rows;
  const int run = lane / kParts;
  const int part = lane % kParts;
  const int column = work.kv_head * kHeadDim + part * kColumns;
  const int blocks = (work.key_count + kAttentionBlock - 1) / kAttentionBlock;
  for (int b = 0; b < blocks; ++b) {
    const int s = b % kStages;
    const uint32_t parity = (b / kStages + 1) % 2;
    // Runs behind the last key repeat its page: what they bring is masked.
    const int wanted = b * kAttentionBlock + run * run_rows;
    const int position = min(wanted, (work.key_count - 1) / run_rows * run_rows);
    const int row = run < runs ? work.table[position / page_size] * page_size + position % page_size : 0;
    const uint32_t to = part * kPartBytes + run * run_rows * kColumns * 2;
    const auto copy = [&](uint32_t stage, uint64_t* full, uint64_t* empty, const CUtensorMap& map) {
      barrier_wait(shared_address(empty), parity);
      if (lane == 0) barrier_arrive_expecting(shared_address(full), kBlockBytes);
      __syncwarp();
      if (run < runs) tile_copy(stage + to, map, row, column, shared_address(full));
    };
    copy(shared_address(shared.keys[s]), &shared.keys_full[s], &shared.keys_empty[s], key_map);
    copy(shared_address(shared.values[s]), &shared.values_full[s], &shared.values_empty[s], value_map);
  }
}

// A barrier of one warpgroup.
__device__ inline void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// 64 rows of the queries or gates, a warp its own 16: head h of token t at t * stride + h * head_stride.
__device__ inline void load_rows(const Rows& from, int64_t head_stride, Shared& shared, const Work& work,
                                 int warp_row) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 4
  for (int i = 0; i < 16; ++i) {
    const int row = work.first_row + warp_row + i;
    const bool inside = row < work.rows;
    const bf16* at = static_cast<const bf16*>(from.data) + (work.first_token + row / work.group) * from.stride +
                     (work.kv_head * work.group + row % work.group) * head_stride + lane * 8;
    copy16_async(shared_address(shared.query[lane / 8]) + swizzled<kColumns * 2>(warp_row + i, lane % 8),
                 inside ? at : nullptr, inside);
  }
  commit_copies();
}

__device__ inline void score(float (&s)[kScores], uint32_t query, uint32_t keys) {
  warpgroup_begin();
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const int part = k / 4;
    multiply_bf16(s, tile_descriptor(query + part * kRows * kColumns * 2) + k % 4 * 2,
                  tile_descriptor(keys + part * kPartBytes) + k % 4 * 2, k > 0);
  }
  warpgroup_commit();
}

// The values behind the last key may be anything: zeros instead. Each warpgroup does it for itself.
__device__ inline void clear_values(Shared& shared, int stage, int keys, int warpgroup) {
  const int count = (kAttentionBlock - keys) * kColumns / 8;
  for (int part = 0; part < kParts; ++part) {
    uint4* const rows = reinterpret_cast<uint4*>(&shared.values[stage][part][keys][0]);
    for (int i = threadIdx.x % kWarpgroup; i < count; i += kWarpgroup) rows[i] = uint4{};
  }
  publish_shared();
  warpgroup_sync(warpgroup);
}

__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Scores to probabilities (against the running maximum) and the running sums; how much older sums shrink.
__device__ inline void soften(float (&s)[kScores], float (&maximum)[2], float (&sum)[2], float (&shrink)[2], int first,
                              const int (&limit)[2], bool masked, float scale) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = maximum[i];
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = s[4 * n + 2 * i + j];
        if (masked && first + n * 8 + lane % 4 * 2 + j > limit[i]) x = -INFINITY;
        top = fmaxf(top, x);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    shrink[i] = power_of_two((maximum[i] - top) * scale);
    maximum[i] = top;
    const float offset = top * scale;
    float part = 0;
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = s[4 * n + 2 * i + j];
        x = power_of_two(fmaf(x, scale, -offset));
        part += x;
      }
    }
    sum[i] = sum[i] * shrink[i] + part;
  }
}

// This warp's 16 rows: divided by their sums, times the gates, rounded, out.
__device__ inline void finish_rows(const PagedAttention& args, float (&o)[kSums], float (&sum)[2], Shared& shared,
                                   const Work& work, int warp_row) {
  const int lane = threadIdx.x % kWarp;
  const bool gated = args.gate.data != nullptr;
  if (gated) {
    load_rows(args.gate, args.gate_head_stride, shared, work, warp_row);
    wait_copies<0>();
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
    sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
    const float inverse = 1.0f / sum[i];
    const int row = warp_row + lane / 4 + 8 * i;
#pragma unroll
    for (int n = 0; n < kSums / 4; ++n) {
      unsigned char* const at =
          reinterpret_cast<unsigned char*>(shared.query[n / 8]) + swizzled<kColumns * 2>(row, n % 8) + lane % 4 * 4;
      float x = o[4 * n + 2 * i] * inverse;
      float y = o[4 * n + 2 * i + 1] * inverse;
      if (gated) {
        const float2 g = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(at));
        x *= sigmoid(g.x);
        y *= sigmoid(g.y);
      }
      *reinterpret_cast<uint32_t*>(at) = pack_bf16(x, y);
    }
  }
  __syncwarp();
  for (int i = 0; i < 16; ++i) {
    const int row = work.first_row + warp_row + i;
    if (row >= work.rows) break;
    bf16* const to = static_cast<bf16*>(args.out.data) + (work.first_token + row / work.group) * args.out.stride +
                     (work.kv_head * work.group + row % work.group) * kHeadDim + lane * 8;
    *reinterpret_cast<uint4*>(to) =
        *reinterpret_cast<const uint4*>(reinterpret_cast<const unsigned char*>(shared.query[lane / 8]) +
                                        swizzled<kColumns * 2>(warp_row + i, lane % 8));
  }
}

__device__ inline void attend(const PagedAttention& args, Shared& shared, const Work& work) {
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int lane = threadIdx.x % kWarp;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * 16;
  load_rows(args.query, kHeadDim, shared, work, warp_row);
  int limit[2];  // greatest key position each of this lane's two rows sees
#pragma unroll
  for (int i = 0; i < 2; ++i)
    limit[i] = work.context + min(work.first_row + warp_row + lane / 4 + 8 * i, work.rows - 1) / work.group;
  const int first_limit = work.context + min(work.first_row + warpgroup * 64, work.rows - 1) / work.group;
  const float scale = 1.4426950408889634f / 16.0f;  // exp2 instead of exp, 1 / sqrt(256)
  wait_copies<0>();
  publish_shared();
  warpgroup_sync(warpgroup);

  const uint32_t query = shared_address(shared.query) + warpgroup * 64 * kColumns * 2;
  const int blocks = (work.key_count + kAttentionBlock - 1) / kAttentionBlock;
  const auto release = [&](uint64_t* empty) {
    if (lane == 0) barrier_arrive(shared_address(empty));
  };
  float o[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) o[i] = 0;
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
  float s[kScores];
  barrier_wait(shared_address(&shared.keys_full[0]), 0);
  score(s, query, shared_address(shared.keys[0]));
  warpgroup_wait<0>();
  settle(s);
  release(&shared.keys_empty[0]);
  for (int b = 0; b < blocks; ++b) {
    float next[kScores];
    const int ahead = (b + 1) % kStages;
    const bool more = b + 1 < blocks;
    if (more) {
      barrier_wait(shared_address(&shared.keys_full[ahead]), (b + 1) / kStages % 2);
      score(next, query, shared_address(shared.keys[ahead]));
    }
    float shrink[2];
    const int first = b * kAttentionBlock;
    soften(s, maximum, sum, shrink, first, limit, first + kAttentionBlock - 1 > first_limit, scale);
    if (__any_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) o[i] *= shrink[i / 2 % 2];
    }
    uint32_t p[kAttentionBlock / 16][4];
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
    barrier_wait(shared_address(&shared.values_full[b % kStages]), b / kStages % 2);
    if (work.key_count - first < kAttentionBlock) clear_values(shared, b % kStages, work.key_count - first, warpgroup);
    settle(o);
    warpgroup_begin();
#pragma unroll
    for (int k = 0; k < kAttentionBlock / 16; ++k) {
      multiply_add_bf16(
          o, p[k],
          transposed_descriptor(shared_address(shared.values[b % kStages]) + k * 16 * kColumns * 2, kPartBytes));
    }
    warpgroup_commit();
    if (more) {
      warpgroup_wait<1>();
      settle(next);
      release(&shared.keys_empty[ahead]);
    }
    warpgroup_wait<0>();
    settle(o);
    release(&shared.values_empty[b % kStages]);
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = next[i];
  }
  warpgroup_sync(warpgroup);
  finish_rows(args, o, sum, shared, work, warp_row);
}

__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(PagedAttention args, const __grid_constant__ CUtensorMap key_map,
                     const __grid_constant__ CUtensorMap value_map) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const SequenceBatch& batch = args.batch;
  Work work;
  work.group = static_cast<int>(args.shape.query_heads / args.shape.kv_heads);
  QueryTile tile;
  // Late tiles see the most keys: they start first.
  if (!find_query_tile<kRows>(batch, work.group, static_cast<int>(gridDim.y - 1 - blockIdx.y), &tile)) return;
  work.first_token = batch.token_begin[tile.sequence];
  work.context = batch.context[tile.sequence];
  work.kv_head = blockIdx.x;
  work.first_row = tile.first_row;
  work.rows = tile.rows;
  work.key_count = work.context + (min(tile.first_row + kRows, tile.rows) - 1) / work.group + 1;
  work.table = batch.page_table + tile.sequence * batch.page_table_stride;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(shared_address(&shared.keys_full[s]), 1);
      barrier_init(shared_address(&shared.values_full[s]), 1);
      barrier_init(shared_address(&shared.keys_empty[s]), kConsumers * kWarpgroup / kWarp);
      barrier_init(shared_address(&shared.values_empty[s]), kConsumers * kWarpgroup / kWarp);
    }
  }
  publish_barriers();
  __syncthreads();
  if (threadIdx.x >= kConsumers * kWarpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    if (threadIdx.x < kConsumers * kWarpgroup + kWarp) fetch(args, key_map, value_map, shared, work);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    attend(args, shared, work);
  }
}

}  // namespace

bool attends_by_warpgroups(const PagedAttention& args) {
  const int32_t page = args.pages.page_size;
  return args.shape.head_dim == kHeadDim && args.pages.dtype == DType::kBFloat16 &&
         (page == 8 || page == 16 || page == 32 || page % kAttentionBlock == 0);
}

void warpgroup_attention(const PagedAttention& args, cudaStream_t stream) {
  const int64_t group = args.shape.query_heads / args.shape.kv_heads;
  const int64_t tiles = args.batch.tokens * group / kRows + args.batch.sequences;
  const int run_rows = args.pages.page_size < kAttentionBlock ? args.pages.page_size : kAttentionBlock;
  constexpr int64_t kAnyRows = int64_t{1} << 31;  // how many pages there are only the page table knows
  const int64_t columns = int64_t{args.pages.heads} * kHeadDim;
  const auto map = [&](const void* pages) {
    return tensor_map(pages, DType::kBFloat16, kAnyRows, columns, columns * 2, run_rows, kColumns);
  };
  cudaFuncSetAttribute(attention_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  const dim3 grid(static_cast<unsigned>(args.shape.kv_heads), static_cast<unsigned>(tiles));
  attention_kernel<<<grid, kThreads, sizeof(Shared), stream>>>(args, map(args.pages.keys), map(args.pages.values));
}

}  // namespace tokenspeed::kernels::cuda
