// Causal attention over paged keys and values, head_dim 256, for many query rows: a block has 128 rows (token, head of
// the group), 64 per warpgroup. One warp fetches blocks of 64 keys and values with the copy engine; S = Q K^T of the
// next block runs while the softmax of this one is computed, and O += P V takes P from registers. FP8 pages are fetched
// to a block of their own, from which the fetching warpgroup makes float16 tiles; queries and P are then float16 too.
#include <type_traits>

#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/fp8_pages.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/warpgroup.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kHeadDim = 256;
constexpr int kConsumers = 2;
constexpr int kRows = 64 * kConsumers;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
template <bool kFp8>
constexpr int kConsumerRegisters = kFp8 ? 232 : 240;
template <bool kFp8>
constexpr int kProducerRegisters = kFp8 ? 40 : 24;
template <bool kFp8>
constexpr bool kRegistersFit = kConsumers* kConsumerRegisters<kFp8> + kProducerRegisters<kFp8> <=
                               (kConsumers + 1) * (65536 / kThreads / 8 * 8);
static_assert(kRegistersFit<false> && kRegistersFit<true>);
constexpr int kStages = 2;
constexpr int kColumns = 64;  // of a part, 128 bytes
constexpr int kParts = kHeadDim / kColumns;
constexpr int kPartBytes = kAttentionBlock * kColumns * 2;
constexpr int kBlockBytes = kParts * kPartBytes;
constexpr int kScores = kAttentionBlock / 2;  // of a thread
constexpr int kSums = kHeadDim / 2;
constexpr int kRawColumns = 128;  // of an FP8 part, 128 bytes
constexpr int kRawParts = kHeadDim / kRawColumns;
constexpr int kRawPartBytes = kAttentionBlock * kRawColumns;
constexpr int kConvertBarrier = kConsumers + 1;  // of the fetching warpgroup

struct Shared {
  bf16 query[kParts][kRows][kColumns];  // at the end the gates, then the result
  bf16 keys[kStages][kParts][kAttentionBlock][kColumns];
  bf16 values[kStages][kParts][kAttentionBlock][kColumns];
  alignas(8) uint64_t keys_full[kStages];
  alignas(8) uint64_t keys_empty[kStages];
  alignas(8) uint64_t values_full[kStages];
  alignas(8) uint64_t values_empty[kStages];
};
struct RawShared : Shared {
  alignas(1024) uint8_t raw[2][kRawParts][kAttentionBlock][kRawColumns];  // keys, values
  alignas(8) uint64_t raw_full[2];
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

// One block of FP8 keys (tensor 0) or values: the runs of lane (run, part), of 128 columns.
__device__ inline void fetch_raw(const PagedAttention& args, const CUtensorMap& map, RawShared& shared,
                                 const Work& work, int tensor, int block) {
  const int lane = threadIdx.x % kWarp;
  const int page_size = args.pages.page_size;
  const int run_rows = min(page_size, kAttentionBlock);
  const int run = lane / kRawParts;
  const int part = lane % kRawParts;
  const uint32_t full = shared_address(&shared.raw_full[tensor]);
  if (lane == 0) barrier_arrive_expecting(full, kRawParts * kRawPartBytes);
  __syncwarp();
  if (run >= kAttentionBlock / run_rows) return;
  const int position = min(block * kAttentionBlock + run * run_rows, (work.key_count - 1) / run_rows * run_rows);
  const int row = work.table[position / page_size] * page_size + position % page_size;
  tile_copy(shared_address(shared.raw[tensor][part]) + run * run_rows * kRawColumns, map, row,
            work.kv_head * kHeadDim + part * kRawColumns, full);
}

// 64 rows of FP8 to float16 tiles, by the fetching warpgroup.
__device__ inline void convert(const uint8_t (&raw)[kRawParts][kAttentionBlock][kRawColumns],
                               bf16 (&to)[kParts][kAttentionBlock][kColumns]) {
  const int thread = threadIdx.x % kWarpgroup;
  const int chunk = thread % 8;
#pragma unroll 2
  for (int i = 0; i < kRawParts * kAttentionBlock * 8 / kWarpgroup; ++i) {
    const int row = (thread / 8 + i * (kWarpgroup / 8)) % kAttentionBlock;
    const int part = i / (kAttentionBlock / (kWarpgroup / 8));
    const uint4 from = *reinterpret_cast<const uint4*>(&raw[part][0][0] + swizzled<kRawColumns>(row, chunk));
    uint8_t* const tile = reinterpret_cast<uint8_t*>(to[part * 2 + chunk / 4]);
    *reinterpret_cast<uint4*>(tile + swizzled<kColumns * 2>(row, chunk % 4 * 2)) = {
        half_pair(from.x, false), half_pair(from.x, true), half_pair(from.y, false), half_pair(from.y, true)};
    *reinterpret_cast<uint4*>(tile + swizzled<kColumns * 2>(row, chunk % 4 * 2 + 1)) = {
        half_pair(from.z, false), half_pair(from.z, true), half_pair(from.w, false), half_pair(from.w, true)};
  }
}

__device__ inline void fetch_and_convert(const PagedAttention& args, const CUtensorMap& key_map,
                                         const CUtensorMap& value_map, RawShared& shared, const Work& work) {
  const bool fetches = threadIdx.x / kWarp == kConsumers * kWarpgroup / kWarp;
  const int blocks = (work.key_count + kAttentionBlock - 1) / kAttentionBlock;
  if (fetches) {
    fetch_raw(args, key_map, shared, work, 0, 0);
    fetch_raw(args, value_map, shared, work, 1, 0);
  }
  for (int b = 0; b < blocks; ++b) {
    const int s = b % kStages;
#pragma unroll
    for (int tensor = 0; tensor < 2; ++tensor) {
      barrier_wait(shared_address(&shared.raw_full[tensor]), b % 2);
      barrier_wait(shared_address(tensor == 0 ? &shared.keys_empty[s] : &shared.values_empty[s]),
                   (b / kStages + 1) % 2);
      convert(shared.raw[tensor], tensor == 0 ? shared.keys[s] : shared.values[s]);
      publish_shared();
      __syncwarp();
      asm volatile("bar.sync %0, 128;" ::"n"(kConvertBarrier) : "memory");
      if (!fetches) continue;
      if (threadIdx.x % kWarp == 0)
        barrier_arrive(shared_address(tensor == 0 ? &shared.keys_full[s] : &shared.values_full[s]));
      if (b + 1 < blocks) fetch_raw(args, tensor == 0 ? key_map : value_map, shared, work, tensor, b + 1);
    }
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

// This warp's 16 rows of queries from bfloat16 to float16.
__device__ inline void queries_to_half(Shared& shared, int warp_row) {
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < 16; ++i) {
    unsigned char* const at =
        reinterpret_cast<unsigned char*>(shared.query[lane / 8]) + swizzled<kColumns * 2>(warp_row + i, lane % 8);
    const uint4 x = *reinterpret_cast<const uint4*>(at);
    *reinterpret_cast<uint4*>(at) = {half_from_bf16(x.x), half_from_bf16(x.y), half_from_bf16(x.z),
                                     half_from_bf16(x.w)};
  }
}

template <bool kFp8>
__device__ inline void score(float (&s)[kScores], uint32_t query, uint32_t keys) {
  warpgroup_begin();
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const uint64_t a = tile_descriptor(query + k / 4 * kRows * kColumns * 2) + k % 4 * 2;
    const uint64_t b = tile_descriptor(keys + k / 4 * kPartBytes) + k % 4 * 2;
    kFp8 ? multiply_half(s, a, b, k > 0) : multiply_bf16(s, a, b, k > 0);
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

template <bool kFp8>
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
  if constexpr (kFp8) {
    __syncwarp();
    queries_to_half(shared, warp_row);
  }
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
  score<kFp8>(s, query, shared_address(shared.keys[0]));
  warpgroup_wait<0>();
  settle(s);
  release(&shared.keys_empty[0]);
  for (int b = 0; b < blocks; ++b) {
    float next[kScores];
    const int ahead = (b + 1) % kStages;
    const bool more = b + 1 < blocks;
    if (more) {
      barrier_wait(shared_address(&shared.keys_full[ahead]), (b + 1) / kStages % 2);
      score<kFp8>(next, query, shared_address(shared.keys[ahead]));
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
    for (int i = 0; i < kScores / 2; ++i)
      p[i / 4][i % 4] = kFp8 ? pack_half(s[2 * i], s[2 * i + 1]) : pack_bf16(s[2 * i], s[2 * i + 1]);
    barrier_wait(shared_address(&shared.values_full[b % kStages]), b / kStages % 2);
    if (work.key_count - first < kAttentionBlock) clear_values(shared, b % kStages, work.key_count - first, warpgroup);
    settle(o);
    warpgroup_begin();
#pragma unroll
    for (int k = 0; k < kAttentionBlock / 16; ++k) {
      const uint64_t v =
          transposed_descriptor(shared_address(shared.values[b % kStages]) + k * 16 * kColumns * 2, kPartBytes);
      kFp8 ? multiply_add_half(o, p[k], v) : multiply_add_bf16(o, p[k], v);
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

template <bool kFp8>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(PagedAttention args, const __grid_constant__ CUtensorMap key_map,
                     const __grid_constant__ CUtensorMap value_map) {
  extern __shared__ __align__(1024) unsigned char memory[];
  using Memory = std::conditional_t<kFp8, RawShared, Shared>;
  Memory& shared = *reinterpret_cast<Memory*>(memory);
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
    if constexpr (kFp8) {
      for (uint64_t& full : shared.raw_full) barrier_init(shared_address(&full), 1);
    }
  }
  publish_barriers();
  __syncthreads();
  if (threadIdx.x >= kConsumers * kWarpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters<kFp8>));
    if constexpr (kFp8) {
      fetch_and_convert(args, key_map, value_map, shared, work);
    } else {
      if (threadIdx.x < kConsumers * kWarpgroup + kWarp) fetch(args, key_map, value_map, shared, work);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters<kFp8>));
    attend<kFp8>(args, shared, work);
  }
}

template <bool kFp8>
void launch(const PagedAttention& args, cudaStream_t stream) {
  const int64_t group = args.shape.query_heads / args.shape.kv_heads;
  const int64_t tiles = args.batch.tokens * group / kRows + args.batch.sequences;
  const int run_rows = args.pages.page_size < kAttentionBlock ? args.pages.page_size : kAttentionBlock;
  constexpr int64_t kAnyRows = int64_t{1} << 31;  // how many pages there are only the page table knows
  const int64_t columns = int64_t{args.pages.heads} * kHeadDim;
  const auto map = [&](const void* pages) {
    return tensor_map(pages, args.pages.dtype, kAnyRows, columns, columns * (kFp8 ? 1 : 2), run_rows,
                      kFp8 ? kRawColumns : kColumns);
  };
  constexpr int kBytes = kFp8 ? sizeof(RawShared) : sizeof(Shared);
  cudaFuncSetAttribute(attention_kernel<kFp8>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const dim3 grid(static_cast<unsigned>(args.shape.kv_heads), static_cast<unsigned>(tiles));
  attention_kernel<kFp8><<<grid, kThreads, kBytes, stream>>>(args, map(args.pages.keys), map(args.pages.values));
}

}  // namespace

bool attends_by_warpgroups(const PagedAttention& args) {
  const int32_t page = args.pages.page_size;
  return args.shape.head_dim == kHeadDim && (page == 8 || page == 16 || page == 32 || page % kAttentionBlock == 0);
}

void warpgroup_attention(const PagedAttention& args, cudaStream_t stream) {
  args.pages.dtype == DType::kFloat8E4M3 ? launch<true>(args, stream) : launch<false>(args, stream);
}

}  // namespace tokenspeed::kernels::cuda
