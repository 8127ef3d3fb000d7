// Causal attention over paged keys and values, head_dim 256, for many query rows: a block has 128 rows (token, head of
// the group), 64 per warpgroup. One warp fetches blocks of 64 keys and values with the copy engine; S = Q K^T of the
// next block runs while the softmax of this one is computed, and O += P V takes P from registers.
//
// FP8 keys are operands as they are: a query row, times a power of two, is the sum of two e4m3 rows (its four leading
// bits, the rest of bfloat16's eight), and S the product with both. The matrix unit adds FP8 products with 13 bits
// behind the leading one, so scores are off by up to 1/500 of the greatest: less than the rounding of the keys to FP8.
// FP8 values are fetched to tiles of their own, each warp of the fetching warpgroup 64 columns, from which it makes
// float16 ones; P is then float16 too. What shared memory moves for 64 keys, at 128 bytes a cycle, where the products
// take 2048 cycles: operands 192 KB and copies 64 KB (bfloat16), 192 and 80 KB (FP8: keys 16, values 16 in, 16 out and
// 32 back in) are 2048 and 2176 cycles; keys turned into float16 would make them 2560.
#include <type_traits>

#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/common.cuh"
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
constexpr int kConsumerRegisters = kFp8 ? 224 : 240;
template <bool kFp8>
constexpr int kProducerRegisters = kFp8 ? 56 : 24;
template <bool kFp8>
constexpr bool kRegistersFit = kConsumers* kConsumerRegisters<kFp8> + kProducerRegisters<kFp8> <=
                               (kConsumers + 1) * (65536 / kThreads / 8 * 8);
static_assert(kRegistersFit<false> && kRegistersFit<true>);
constexpr int kStages = 2;    // of values
constexpr int kColumns = 64;  // of a part, 128 bytes
constexpr int kParts = kHeadDim / kColumns;
constexpr int kPartBytes = kAttentionBlock * kColumns * 2;
constexpr int kBlockBytes = kParts * kPartBytes;
constexpr int kScores = kAttentionBlock / 2;  // of a thread
constexpr int kSums = kHeadDim / 2;
constexpr float kLog2E = 1.4426950408889634f;
// Keys: as many bytes for either type.
template <bool kFp8>
constexpr int kKeyStages = kFp8 ? 4 : 2;
template <bool kFp8>
constexpr int kKeyParts = kFp8 ? 2 : kParts;  // of 128 bytes
template <bool kFp8>
constexpr int kKeyBytes = kKeyParts<kFp8>* kPartBytes;
constexpr int kKeyColumns = kHeadDim / kKeyParts<true>;  // of an FP8 part
// FP8 values before they are float16.
constexpr int kRawStages = 2;
constexpr int kRawBytes = kAttentionBlock * kColumns;  // of a part
static_assert(kRawStages < kKeyStages<true>);

struct Shared {
  bf16 query[kParts][kRows][kColumns];  // at the end the gates, then the result
  alignas(1024) uint8_t keys[kKeyStages<false> * kKeyBytes<false>];
  bf16 values[kStages][kParts][kAttentionBlock][kColumns];
  alignas(8) uint64_t keys_full[kKeyStages<true>];
  alignas(8) uint64_t keys_empty[kKeyStages<true>];
  alignas(8) uint64_t values_full[kStages];
  alignas(8) uint64_t values_empty[kStages];
};
static_assert(sizeof(Shared::keys) == kKeyStages<true> * kKeyBytes<true>);
struct RawShared : Shared {
  alignas(1024) uint8_t raw[kRawStages][kParts][kAttentionBlock][kColumns];
  alignas(8) uint64_t raw_full[kRawStages][kParts];
};

template <bool kFp8>
__device__ inline uint32_t keys_address(const Shared& shared, int stage) {
  return shared_address(shared.keys) + stage * kKeyBytes<kFp8>;
}

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

// A run is rows of a block within one page.
__device__ inline int run_rows(const PagedAttention& args) { return min(args.pages.page_size, kAttentionBlock); }

// Where a run of a block begins in the pages. Runs behind the last key repeat its page: what they bring is masked.
__device__ inline int run_begin(const PagedAttention& args, const Work& work, int block, int run) {
  const int page_size = args.pages.page_size;
  const int rows = run_rows(args);
  const int position = min(block * kAttentionBlock + run * rows, (work.key_count - 1) / rows * rows);
  return work.table[position / page_size] * page_size + position % page_size;
}

// Lane (run, part) fetches a run's 64 columns.
__device__ inline void fetch(const PagedAttention& args, const CUtensorMap& key_map, const CUtensorMap& value_map,
                             Shared& shared, const Work& work) {
  const int lane = threadIdx.x % kWarp;
  const int runs = kAttentionBlock / run_rows(args);
  const int run = lane / kParts;
  const int part = lane % kParts;
  const int column = work.kv_head * kHeadDim + part * kColumns;
  const int blocks = (work.key_count + kAttentionBlock - 1) / kAttentionBlock;
  for (int b = 0; b < blocks; ++b) {
    const int s = b % kStages;
    const uint32_t parity = (b / kStages + 1) % 2;
    const int row = run_begin(args, work, b, run);
    const uint32_t to = part * kPartBytes + run * run_rows(args) * kColumns * 2;
    const auto copy = [&](uint32_t stage, uint64_t* full, uint64_t* empty, const CUtensorMap& map) {
      barrier_wait(shared_address(empty), parity);
      if (lane == 0) barrier_arrive_expecting(shared_address(full), kBlockBytes);
      __syncwarp();
      if (run < runs) tile_copy(stage + to, map, row, column, shared_address(full));
    };
    copy(keys_address<false>(shared, s), &shared.keys_full[s], &shared.keys_empty[s], key_map);
    copy(shared_address(shared.values[s]), &shared.values_full[s], &shared.values_empty[s], value_map);
  }
}

// The FP8 keys of a block: lane (run, part) fetches a run's 128 columns.
__device__ inline void fetch_keys(const PagedAttention& args, const CUtensorMap& map, Shared& shared, const Work& work,
                                  int block) {
  constexpr int kStage = kKeyStages<true>;
  const int lane = threadIdx.x % kWarp;
  const int run = lane / kKeyParts<true>;
  const int part = lane % kKeyParts<true>;
  const int s = block % kStage;
  const uint32_t full = shared_address(&shared.keys_full[s]);
  barrier_wait(shared_address(&shared.keys_empty[s]), (block / kStage + 1) % 2);
  if (lane == 0) barrier_arrive_expecting(full, kKeyBytes<true>);
  __syncwarp();
  if (run >= kAttentionBlock / run_rows(args)) return;
  tile_copy(keys_address<true>(shared, s) + part * kPartBytes + run * run_rows(args) * kKeyColumns, map,
            run_begin(args, work, block, run), work.kv_head * kHeadDim + part * kKeyColumns, full);
}

// One part of a block's FP8 values, by the warp that turns it into float16: lane r fetches run r.
__device__ inline void fetch_values(const PagedAttention& args, const CUtensorMap& map, RawShared& shared,
                                    const Work& work, int part, int block) {
  const int lane = threadIdx.x % kWarp;
  const int s = block % kRawStages;
  const uint32_t full = shared_address(&shared.raw_full[s][part]);
  if (lane == 0) barrier_arrive_expecting(full, kRawBytes);
  __syncwarp();
  if (lane >= kAttentionBlock / run_rows(args)) return;
  tile_copy(shared_address(shared.raw[s][part]) + lane * run_rows(args) * kColumns, map,
            run_begin(args, work, block, lane), work.kv_head * kHeadDim + part * kColumns, full);
}

// One part to float16, by a warp. Eight lanes, which access shared memory together, have four chunks of two rows whose
// numbers differ by 5 in binary places 0 and 2: the chunks lie in different banks when loaded, as do both halves of
// what they become when stored.
__device__ inline void convert(const uint8_t (&raw)[kAttentionBlock][kColumns], bf16 (&to)[kAttentionBlock][kColumns]) {
  constexpr int kLoads = kAttentionBlock / 8;
  constexpr int kRowBytes = kColumns * 2;
  const int lane = threadIdx.x % kWarp;
  const int chunk = lane % 4;
  const int row = lane / 8 ^ lane / 4 % 2 * 5;
  const uint8_t* const from = &raw[row][(chunk ^ row / 2 % 4) * 16];  // a swizzle of 64 bytes
  const uint32_t low = swizzled<kRowBytes>(row, chunk * 2);
  uint8_t* const even = reinterpret_cast<uint8_t*>(to) + low;
  uint8_t* const odd = reinterpret_cast<uint8_t*>(to) + (low ^ 16);
  uint4 x[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) x[i] = *reinterpret_cast<const uint4*>(from + i * 8 * kColumns);
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    *reinterpret_cast<uint4*>(even + i * 8 * kRowBytes) = {half_pair(x[i].x, false), half_pair(x[i].x, true),
                                                           half_pair(x[i].y, false), half_pair(x[i].y, true)};
    *reinterpret_cast<uint4*>(odd + i * 8 * kRowBytes) = {half_pair(x[i].z, false), half_pair(x[i].z, true),
                                                          half_pair(x[i].w, false), half_pair(x[i].w, true)};
  }
}

// The values behind the last key may be anything: zeros instead, in one part, by some of the block's threads.
__device__ inline void clear_rows(bf16 (&part)[kAttentionBlock][kColumns], int keys, int thread, int threads) {
  uint4* const rows = reinterpret_cast<uint4*>(&part[keys][0]);
  for (int i = thread; i < (kAttentionBlock - keys) * kColumns / 8; i += threads) rows[i] = uint4{};
}

// The warpgroup that fetches FP8 pages, each warp a part of the values for itself, the first one the keys too. The keys
// fetched after values b replace those of block b - 1, which have been multiplied when values b - 2 are released.
__device__ inline void fetch_and_convert(const PagedAttention& args, const CUtensorMap& key_map,
                                         const CUtensorMap& value_map, RawShared& shared, const Work& work) {
  constexpr int kAhead = kKeyStages<true> - 1;
  const int warp = threadIdx.x / kWarp - kConsumers * kWarpgroup / kWarp;
  const int blocks = (work.key_count + kAttentionBlock - 1) / kAttentionBlock;
#pragma unroll 1
  for (int b = -kAhead; b < blocks; ++b) {
    if (b >= 0) {
      const int s = b % kStages;
      barrier_wait(shared_address(&shared.raw_full[b % kRawStages][warp]), b / kRawStages % 2);
      barrier_wait(shared_address(&shared.values_empty[s]), (b / kStages + 1) % 2);
      convert(shared.raw[b % kRawStages][warp], shared.values[s][warp]);
      const int keys = work.key_count - b * kAttentionBlock;
      if (keys < kAttentionBlock) {
        __syncwarp();
        clear_rows(shared.values[s][warp], keys, threadIdx.x % kWarp, kWarp);
      }
      publish_shared();
      warp_arrive(shared_address(&shared.values_full[s]));
    }
    const int next = b + kRawStages;
    if (next >= 0 && next < blocks) fetch_values(args, value_map, shared, work, warp, next);
    if (warp == 0 && b + kAhead < blocks) fetch_keys(args, key_map, shared, work, b + kAhead);
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

struct Fp8Terms {
  uint16_t high, low;
};
// A pair of bfloat16 times a factor as sums of two e4m3: exact where its magnitude is within [0.25, 448].
__device__ inline Fp8Terms fp8_terms(uint32_t pair, float factor) {
  const uint32_t value = pack_half(bf16_low(pair) * factor, bf16_high(pair) * factor);
  Fp8Terms terms;
  uint32_t rest;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(terms.high) : "r"(value));
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(rest) : "r"(value), "r"(half_pair(terms.high, false)));
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(terms.low) : "r"(rest));
  return terms;
}

// This warp's 16 rows of queries from bfloat16 to FP8, each times the power of two that brings its greatest element to
// [128, 256): parts 0 and 1 become the second terms, 2 and 3 the first. What is lost is 2^-17 of the greatest. `scale`,
// of rows lane / 4 and lane / 4 + 8, is divided by their power; NaN when an element is not finite.
__device__ inline void split_queries(Shared& shared, int warp_row, float (&scale)[2]) {
  constexpr int kAtOnce = 4;
  const int lane = threadIdx.x % kWarp;
  const auto at = [&](int part, int row, int chunk) {
    return reinterpret_cast<unsigned char*>(shared.query[part]) + swizzled<kColumns * 2>(warp_row + row, chunk);
  };
#pragma unroll 1
  for (int first = 0; first < 16; first += kAtOnce) {
    uint4 x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = *reinterpret_cast<const uint4*>(at(lane / 8, first + i, lane % 8));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t two = __vmaxu2(__vmaxu2(x[i].x & 0x7fff7fffu, x[i].y & 0x7fff7fffu),
                                    __vmaxu2(x[i].z & 0x7fff7fffu, x[i].w & 0x7fff7fffu));
      const uint32_t greatest = __reduce_max_sync(~0u, max(two & 0xffffu, two >> 16));
      const uint32_t exponent = max(greatest >> 7, 8u);
      const float factor = __uint_as_float((261u - exponent) << 23);
      const float inverse = exponent == 255 ? NAN : __uint_as_float((exponent - 7) << 23);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (first + i == lane / 4 + 8 * h) scale[h] *= inverse;
      }
      const Fp8Terms a = fp8_terms(x[i].x, factor), b = fp8_terms(x[i].y, factor), c = fp8_terms(x[i].z, factor),
                     d = fp8_terms(x[i].w, factor);
      const auto store = [&](int part, uint32_t four, uint32_t next) {
        *reinterpret_cast<uint2*>(at(part + lane / 16, first + i, lane % 16 / 2) + lane % 2 * 8) = {four, next};
      };
      store(0, a.low | b.low << 16, c.low | d.low << 16);
      store(2, a.high | b.high << 16, c.high | d.high << 16);
    }
  }
}

// The products with FP8 keys begin with the queries' second terms, while the sums are small and lose least.
template <bool kFp8>
__device__ inline void score(float (&s)[kScores], uint32_t query, uint32_t keys) {
  warpgroup_begin();
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const uint64_t a = tile_descriptor(query + k / 4 * kRows * kColumns * 2) + k % 4 * 2;
    const uint64_t b = tile_descriptor(keys + k / 4 % kKeyParts<kFp8> * kPartBytes) + k % 4 * 2;
    kFp8 ? multiply_fp8(s, a, b, k > 0) : multiply_bf16(s, a, b, k > 0);
  }
  warpgroup_commit();
}

// Values that the copy engine has brought have nobody else to clear them; each warpgroup does it for itself.
__device__ inline void clear_values(Shared& shared, int stage, int keys, int warpgroup) {
  for (auto& part : shared.values[stage]) clear_rows(part, keys, threadIdx.x % kWarpgroup, kWarpgroup);
  publish_shared();
  warpgroup_sync(warpgroup);
}

// Scores to probabilities (against the running maximum) and the running sums; how much older sums shrink.
__device__ inline void soften(float (&s)[kScores], float (&maximum)[2], float (&sum)[2], float (&shrink)[2], int first,
                              const int (&limit)[2], bool masked, const float (&scale)[2]) {
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
    shrink[i] = power_of_two((maximum[i] - top) * scale[i]);
    maximum[i] = top;
    const float offset = top * scale[i];
    float part = 0;
#pragma unroll
    for (int n = 0; n < kScores / 4; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = s[4 * n + 2 * i + j];
        x = power_of_two(fmaf(x, scale[i], -offset));
        part += x;
      }
    }
    sum[i] = sum[i] * shrink[i] + part;
  }
}

// This warp's 16 rows: divided by their sums, times the gates' sigmoids, rounded, out. Nothing is stored between the
// loads of eight pairs of gates, so that one does not wait for the other.
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
    for (int part = 0; part < kParts; ++part) {
      const auto at = [&](int n) {
        return reinterpret_cast<uint32_t*>(reinterpret_cast<unsigned char*>(shared.query[part]) +
                                           swizzled<kColumns * 2>(row, n) + lane % 4 * 4);
      };
      float2 factor[8];
#pragma unroll
      for (float2& f : factor) f = {inverse, inverse};
      if (gated) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const uint32_t gate = *at(n);
          factor[n].x *= reciprocal(1.0f + power_of_two(bf16_low(gate) * -kLog2E));
          factor[n].y *= reciprocal(1.0f + power_of_two(bf16_high(gate) * -kLog2E));
        }
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float* const sums = &o[32 * part + 4 * n + 2 * i];
        *at(n) = pack_bf16(sums[0] * factor[n].x, sums[1] * factor[n].y);
      }
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
  constexpr float kScale = kLog2E / 16.0f;  // exp2 instead of exp, 1 / sqrt(256)
  float scale[2] = {kScale, kScale};
  wait_copies<0>();
  if constexpr (kFp8) {
    __syncwarp();
    split_queries(shared, warp_row, scale);
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
  score<kFp8>(s, query, keys_address<kFp8>(shared, 0));
  warpgroup_wait<0>();
  settle(s);
  release(&shared.keys_empty[0]);
  for (int b = 0; b < blocks; ++b) {
    float next[kScores];
    const int ahead = (b + 1) % kKeyStages<kFp8>;
    const bool more = b + 1 < blocks;
    if (more) {
      barrier_wait(shared_address(&shared.keys_full[ahead]), (b + 1) / kKeyStages<kFp8> % 2);
      score<kFp8>(next, query, keys_address<kFp8>(shared, ahead));
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
    if (!kFp8 && work.key_count - first < kAttentionBlock) {
      clear_values(shared, b % kStages, work.key_count - first, warpgroup);
    }
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
    for (int s = 0; s < kKeyStages<kFp8>; ++s) {
      barrier_init(shared_address(&shared.keys_full[s]), 1);
      barrier_init(shared_address(&shared.keys_empty[s]), kConsumers * kWarpgroup / kWarp);
    }
    for (int s = 0; s < kStages; ++s) {
      barrier_init(shared_address(&shared.values_full[s]), kFp8 ? kWarpgroup / kWarp * kWarpArrivals : 1);
      barrier_init(shared_address(&shared.values_empty[s]), kConsumers * kWarpgroup / kWarp);
    }
    if constexpr (kFp8) {
      for (auto& parts : shared.raw_full) {
        for (uint64_t& full : parts) barrier_init(shared_address(&full), 1);
      }
    }
  }
  publish_barriers();
  __syncthreads();
  if (threadIdx.x >= kConsumers * kWarpgroup) {
    give_registers<kProducerRegisters<kFp8>>();
    if constexpr (kFp8) {
      fetch_and_convert(args, key_map, value_map, shared, work);
    } else {
      if (threadIdx.x < kConsumers * kWarpgroup + kWarp) fetch(args, key_map, value_map, shared, work);
    }
  } else {
    take_registers<kConsumerRegisters<kFp8>>();
    attend<kFp8>(args, shared, work);
  }
}

template <bool kFp8>
void launch(const PagedAttention& args, cudaStream_t stream) {
  const int64_t group = args.shape.query_heads / args.shape.kv_heads;
  const int64_t tiles = args.batch.tokens * group / kRows + args.batch.sequences;
  const int box_rows = args.pages.page_size < kAttentionBlock ? args.pages.page_size : kAttentionBlock;
  constexpr int64_t kAnyRows = int64_t{1} << 31;  // how many pages there are only the page table knows
  const int64_t columns = int64_t{args.pages.heads} * kHeadDim;
  const auto map = [&](const void* pages, int box_columns) {
    return tensor_map(pages, args.pages.dtype, kAnyRows, columns, columns * (kFp8 ? 1 : 2), box_rows, box_columns);
  };
  constexpr int kBytes = kFp8 ? sizeof(RawShared) : sizeof(Shared);
  cudaFuncSetAttribute(attention_kernel<kFp8>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const dim3 grid(static_cast<unsigned>(args.shape.kv_heads), static_cast<unsigned>(tiles));
  attention_kernel<kFp8><<<grid, kThreads, kBytes, stream>>>(args, map(args.pages.keys, kHeadDim / kKeyParts<kFp8>),
                                                             map(args.pages.values, kColumns));
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
