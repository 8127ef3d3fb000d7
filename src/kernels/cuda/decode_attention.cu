// decode_attention: softmax over all keys for the step's few tokens, split over segments of decode_key_segment() keys.
//
// A block takes (segment, KV head, sequence), of a sequence whose rows lie on both sides of a limit of segment sizes
// first the segments of the rows before it, then those of the rows behind it. It streams the segment's keys and values
// through a ring of slots, the first of them before its predecessor has ended; forms the normed and turned queries of
// its group from the projections, puts the step's own keys and values where they fall into its range (and into the
// pages), and computes S = Q K^T, P = 2^(S - m), O = sum P V on the tensor cores with a running maximum.
//
// Is the sequence longer than a segment, then the segments' O, m and l are added (decode_attention_merge.cuh). Of up to
// eight rows and eight segments the blocks are a cluster and send them to its first two. Otherwise they go to the
// workspace, and the blocks that come last add them: those wait for the others, so there are fewer of them than
// multiprocessors, and always one has room for the blocks to come.
//
// A launch's instructions are not at hand, as its block's multiprocessor ran another kernel before: each costs four
// cycles or more the first time, so what counts for short contexts is how many there are on a block's way.
#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <type_traits>

#include "kernels/cuda/decode_attention_merge.cuh"

namespace tokenspeed::kernels::cuda {
namespace {

using namespace decode_attention_parts;

// page_of() multiplies by 2^32 / page_size rounded up, which is exact as long as their product is no more than 2^32.
constexpr int64_t kMostPageSize = 4096;
constexpr int64_t kMostContext = 1 << 20;
static_assert(kMostPageSize * kMostContext <= int64_t{1} << 32);
constexpr int64_t kMostGroups = 1024;  // sequences times KV heads
constexpr int kKinds = 2;              // of rows in a step, by the size of their segments
constexpr int64_t kCounterBytes = kMostGroups * kKinds * 2 * sizeof(int32_t);

// The block's place in the step.
struct Work {
  int sequence;
  int kv_head;
  int token_begin;
  int tokens;  // of the sequence
  int context;
  int kinds;
  int kind;
  int first_row_token;  // those tokens' rows are the block's
  int row_tokens;
  int segment;   // keys of one
  int segments;  // of the last row
  int first;     // key of the segment
  int count;     // keys of the segment, the step's own included

  __device__ MergeRows rows(int group) const {
    return {token_begin + first_row_token, context + first_row_token, kv_head, row_tokens * group, segment};
  }
};

// kOneKind: no row lies behind a limit of segment sizes.
template <bool kOneKind>
__device__ inline Work find_work(const SequenceBatch& batch) {
  Work work;
  work.sequence = blockIdx.z;
  work.kv_head = blockIdx.y;
  work.token_begin = batch.token_begin[work.sequence];
  work.tokens = batch.token_begin[work.sequence + 1] - work.token_begin;
  work.context = batch.context[work.sequence];
  work.first_row_token = 0;
  work.row_tokens = work.tokens;
  work.segment = decode_key_segment(kOneKind ? 0 : work.context);
  work.kinds = kOneKind || decode_key_segment(work.context + work.tokens - 1) == work.segment ? 1 : kKinds;
  work.kind = 0;
  int index = blockIdx.x;
  if (work.kinds > 1) {
    const int limit = work.context < kDecodeMiddleSegments ? kDecodeMiddleSegments : kDecodeLongSegments;
    const int before = limit - work.context;
    if (index < limit / work.segment) {
      work.row_tokens = before;
    } else {
      index -= limit / work.segment;
      work.kind = 1;
      work.first_row_token = before;
      work.row_tokens = work.tokens - before;
      work.segment = decode_key_segment(limit);
    }
  }
  const int end = work.context + work.first_row_token + work.row_tokens;
  work.segments = (end - 1) / work.segment + 1;
  work.first = index * work.segment;
  work.count = min(end - work.first, work.segment);
  return work;
}

// A thread's share of the segment's copies.
template <typename Shared>
struct KeyStream {
  static constexpr bool kFp8 = Shared::kIsFp8;
  static constexpr int kChunks = Shared::kRowBytes / 16;
  static constexpr int kRows = Shared::kKeys / (kThreads / kChunks);  // neighbouring ones

  const AttentionParameters& p;
  Shared& s;
  int older;  // keys of the segment that are in the pages
  int loads;  // slots' worth: keys and values of each kKeys in turn

  __device__ uint8_t* slot(int load) const { return s.ring[load % Shared::kSlots]; }

  // Always a group of copies, so that waiting can count them.
  __device__ void fetch_first() const {
#pragma unroll 1
    for (int load = 0; load < Shared::kSlots - 1; ++load) fetch(load);
  }
  // When `load` is kSlots - 1 loads behind the one that is waited for.
  __device__ void fetch_next(int load) const {
    if constexpr (Shared::kHoldsSegment) {
      commit_copies();
    } else {
      fetch(load);
    }
  }

 private:
  __device__ void fetch(int load) const {
    if (load < loads) fetch_rows(load);
    commit_copies();
  }
  __device__ void fetch_rows(int load) const {
    const bool is_key = load % 2 == 0;
    const auto* const from = static_cast<const uint8_t*>(is_key ? p.pages.keys : p.pages.values);
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int first = static_cast<int>(threadIdx.x) / kChunks * kRows;
    const int key = load / 2 * Shared::kKeys + first;
    const uint32_t to = shared_address(slot(load));
    static_assert(kRows == 8);
    const uint4 low = *reinterpret_cast<const uint4*>(&s.offset[key]);
    const uint4 high = *reinterpret_cast<const uint4*>(&s.offset[key + 4]);
    const uint32_t offset[kRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t at = (static_cast<int64_t>(offset[j]) + chunk) * 16;
      const uint32_t place =
          is_key ? slot_offset<kFp8, true>(first + j, chunk) : slot_offset<kFp8, false>(first + j, chunk);
      copy16_async(to + place, from + at, key + j < older);
    }
  }
};

// Token `warp` of the sequence: its key and value, eight dims a lane, as the pages hold them.
struct OwnToken {
  uint4 key;
  uint4 value;
  int local = -1;  // key of the segment; -1: not in it

  template <bool kFp8, bool kIsKey>
  __device__ void put(uint8_t* slot, int keys, int block) const {
    const int row = local - block * keys;
    if (local < 0 || row < 0 || row >= keys) return;
    const int lane = threadIdx.x % kWarp;
    const uint4& from = kIsKey ? key : value;
    if constexpr (kFp8) {
      *reinterpret_cast<uint2*>(slot + slot_offset<true, kIsKey>(row, lane / 2) + lane % 2 * 8) = {from.x, from.y};
    } else {
      *reinterpret_cast<uint4*>(slot + slot_offset<false, kIsKey>(row, lane)) = from;
    }
  }
  // To the pages, where its row is the block's.
  template <typename Shared>
  __device__ void write(const AttentionParameters& p, const Shared& s, const Work& work) const {
    using Vector = std::conditional_t<Shared::kIsFp8, uint2, uint4>;
    const int warp = threadIdx.x / kWarp;
    if (local < 0 || warp < work.first_row_token || warp >= work.first_row_token + work.row_tokens) return;
    const int64_t at = static_cast<int64_t>(s.offset[local]) * (16 / sizeof(Vector)) + threadIdx.x % kWarp;
    if constexpr (Shared::kIsFp8) {
      static_cast<uint2*>(p.pages.keys)[at] = {key.x, key.y};
      static_cast<uint2*>(p.pages.values)[at] = {value.x, value.y};
    } else {
      static_cast<uint4*>(p.pages.keys)[at] = key;
      static_cast<uint4*>(p.pages.values)[at] = value;
    }
  }
};

// Where a position's key or value of the block's KV head lies in its pages, in 16 bytes.
template <typename Shared>
__device__ inline uint32_t page_offset(const AttentionParameters& p, const Work& work, int position) {
  const int index = p.page_of(position);
  const int32_t page = p.batch.page_table[work.sequence * p.batch.page_table_stride + index];
  const auto row = static_cast<uint32_t>(page * p.pages.page_size + position - index * p.pages.page_size);
  return (row * static_cast<uint32_t>(p.pages.heads) + static_cast<uint32_t>(work.kv_head)) * (Shared::kRowBytes / 16);
}

__device__ inline void load_weights(const float* from, float (&weight)[8]) {
  const float4* const at = reinterpret_cast<const float4*>(from) + threadIdx.x % kWarp * 2;
  const float4 low = at[0], high = at[1];
  const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) weight[i] = values[i];
}

// The angles of the sequence's tokens; frequency: the lane's.
template <typename Shared>
__device__ inline void turn_tokens(Shared& s, const Work& work, float frequency) {
  static_assert(kRotaryPairs == kWarp);
#pragma unroll 1
  for (int i = threadIdx.x; i < work.tokens * kRotaryPairs; i += kThreads) {
    float sine, cosine;
    sincosf(static_cast<float>(work.context + i / kRotaryPairs) * frequency, &sine, &cosine);
    s.turns[i / kRotaryPairs][i % kRotaryPairs] = {round_bf16(cosine), round_bf16(sine)};
  }
}

// Rows of queries whose norms, and whose maxima, are computed side by side by a warp.
template <int kTiles>
constexpr int kRowsAtOnce = kTiles < 8 ? kTiles : 8;

template <typename Shared>
__device__ inline void store_query(Shared& s, int row, uint4 query) {
  if constexpr (Shared::kIsFp8) {
    query = {half_from_bf16(query.x), half_from_bf16(query.y), half_from_bf16(query.z), half_from_bf16(query.w)};
  }
  *reinterpret_cast<uint4*>(s.query + swizzled<kQueryBytes>(row, threadIdx.x % kWarp)) = query;
}

// Queries to shared memory: row `warp` of each eight, of an unfilled eight the last row again.
template <typename Shared>
__device__ inline void stage_queries(const AttentionParameters& p, Shared& s, const Work& work,
                                     const uint4 (&raw)[Shared::kRowTiles], const float (&weight)[8]) {
  constexpr int kTiles = Shared::kRowTiles;
  constexpr int kAtOnce = kRowsAtOnce<kTiles>;
  const int warp = threadIdx.x / kWarp;
  const int last = work.row_tokens * p.group - 1;
#pragma unroll
  for (int first = 0; first < kTiles; first += kAtOnce) {
    uint4 query[kAtOnce];
    const float2* turn[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      query[i] = raw[first + i];
      turn[i] = s.turns[work.first_row_token + p.token_of(min(warp + (first + i) * kWarps, last))];
    }
    norm_and_turn<kAtOnce>(query, weight, p.epsilon, turn);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      store_query(s, warp + (first + i) * kWarps, query[i]);
    }
  }
}

// The same of one eight, and then the warp's key if it has one: once more through the same instructions, which are
// there by then.
template <typename Shared>
__device__ inline void stage_heads(const AttentionParameters& p, Shared& s, const Work& work, const uint4& query,
                                   const float (&query_norm)[8], uint4* key, const float (&key_norm)[8], bool has_key) {
  const int warp = threadIdx.x / kWarp;
  const int row = min(warp, work.row_tokens * p.group - 1);
  const float2* turn[1] = {s.turns[work.first_row_token + p.token_of(row)]};
  uint4 head[1] = {query};
  float weight[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) weight[i] = query_norm[i];
#pragma unroll 1
  for (bool is_key = false;; is_key = true) {
    norm_and_turn<1>(head, weight, p.epsilon, turn);
    if (is_key) break;
    store_query(s, warp, head[0]);
    if (!has_key) break;
    head[0] = *key;
    turn[0] = s.turns[warp];
#pragma unroll
    for (int i = 0; i < 8; ++i) weight[i] = key_norm[i];
  }
  *key = head[0];
}

// Queries to shared memory; the warp's own key and value as the pages will hold them.
template <typename Shared>
__device__ inline OwnToken stage(const AttentionParameters& p, Shared& s, const Work& work,
                                 const float (&query_norm)[8], const float (&key_norm)[8]) {
  constexpr int kTiles = Shared::kRowTiles;
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  OwnToken own;
  const int local = work.context + warp - work.first;
  if (warp < work.tokens && local >= 0 && local < work.segment) {
    own.local = local;
    const int64_t token = work.token_begin + warp;
    const int column = work.kv_head * kHeadDim + lane * 8;
    own.key = *reinterpret_cast<const uint4*>(p.key + token * p.key_stride + column);
    own.value = *reinterpret_cast<const uint4*>(p.value + token * p.value_stride + column);
  }
  const MergeRows rows = work.rows(p.group);
  uint4 raw[kTiles];  // all on their way before the first is needed
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int row = min(warp + i * kWarps, rows.count - 1);
    raw[i] = *(reinterpret_cast<const uint4*>(queries_of(p, rows.token(p, row), rows.head(p, row))) + lane);
  }
  if constexpr (kTiles == 1) {
    stage_heads(p, s, work, raw[0], query_norm, &own.key, key_norm, own.local >= 0);
  } else {
    stage_queries(p, s, work, raw, query_norm);
    if (own.local < 0) return own;
    uint4 key[1] = {own.key};
    const float2* const turn[1] = {s.turns[warp]};
    norm_and_turn<1>(key, key_norm, p.epsilon, turn);
    own.key = key[0];
  }
  if constexpr (Shared::kIsFp8) {
    const uint2 key = fp8_from_bf16(own.key);
    const uint2 value = fp8_from_bf16(own.value);
    own.key = {key.x, key.y, 0, 0};
    own.value = {value.x, value.y, 0, 0};
  }
  return own;
}

__device__ inline float greatest_of_warp(float x) {
  const uint32_t bits = __reduce_max_sync(~0u, ordered_bits(x));
  return __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
}

// The running maximum and sum of the rows r = warp + 8 i that this warp turns from scores into probabilities. A lane
// has its own sum.
template <typename Shared>
struct Softmax {
  static constexpr bool kFp8 = Shared::kIsFp8;
  static constexpr int kTiles = Shared::kRowTiles;
  static constexpr int kEach = Shared::kKeys / kWarp;
  float greatest[kTiles];
  float sum[kTiles];

  __device__ Softmax() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      greatest[i] = -INFINITY;
      sum[i] = 0;
    }
  }
  // Keys first .. first + kKeys - 1 of the sequence. What the rows of an unfilled eight give, nobody reads.
  __device__ void add(Shared& s, const AttentionParameters& p, const Work& work, int first) {
#pragma unroll
    for (int i = 0; i < kTiles; i += kRowsAtOnce<kTiles>) add_rows(s, p, work, first, i);
  }
  __device__ void publish(Shared& s, int rows) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int row = threadIdx.x / kWarp + i * kWarps;
      if (row >= rows) break;
      const float total = warp_sum(sum[i]);
      if (threadIdx.x % kWarp == 0) s.greatest_sum[row] = {greatest[i], total};
    }
  }

 private:
  // Rows warp + 8 i and on, side by side.
  __device__ __forceinline__ void add_rows(Shared& s, const AttentionParameters& p, const Work& work, int first,
                                           int begin) {
    constexpr int kAtOnce = kRowsAtOnce<kTiles>;
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    float x[kAtOnce][kEach];
    float top[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = warp + (begin + i) * kWarps;
      load_scores(s, row, x[i]);
      // The last of the keys that the row sees.
      const int visible = work.context + work.first_row_token + p.token_of(row) - first;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        x[i][j] = lane * kEach + j <= visible ? x[i][j] * p.scale : -INFINITY;
        top[i] = j == 0 ? x[i][0] : fmaxf(top[i], x[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) top[i] = fmaxf(greatest[begin + i], greatest_of_warp(top[i]));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = warp + (begin + i) * kWarps;
      const float base = top[i] == -INFINITY ? 0.0f : top[i];  // a row that sees none of the segment's keys yet
      const float shrink = power_of_two(greatest[begin + i] - base);
      greatest[begin + i] = top[i];
      if (lane == 0) s.shrink[row] = shrink;
      uint32_t rounded[kEach / 2];
      float added = 0;  // of the rounded values, which multiply V
#pragma unroll
      for (int j = 0; j < kEach / 2; ++j) {
        const float low = power_of_two(x[i][2 * j] - base);
        const float high = power_of_two(x[i][2 * j + 1] - base);
        if constexpr (kFp8) {
          rounded[j] = pack_half(low, high);
          const float2 halves = __half22float2(*reinterpret_cast<const __half2*>(&rounded[j]));
          added += halves.x + halves.y;
        } else {
          rounded[j] = pack_bf16(low, high);
          added += bf16_low(rounded[j]) + bf16_high(rounded[j]);
        }
      }
      uint8_t* const to = s.probabilities() + row * Shared::kProbabilityPitch + lane * kEach * 2;
      if constexpr (kEach == 4) {
        *reinterpret_cast<uint2*>(to) = {rounded[0], rounded[1]};
      } else {
        *reinterpret_cast<uint32_t*>(to) = rounded[0];
      }
      sum[begin + i] = fmaf(sum[begin + i], shrink, added);
    }
  }
  // This lane's kEach neighbouring scores of a row.
  __device__ static void load_scores(const Shared& s, int row, float (&x)[kEach]) {
    const int key = static_cast<int>(threadIdx.x) % kWarp * kEach;
#pragma unroll
    for (int part = 0; part < Shared::kParts; ++part) {
      using Vector = std::conditional_t<kEach == 4, float4, float2>;
      const Vector scores = *reinterpret_cast<const Vector*>(&s.scores[part][row][key]);
      const float* const each = reinterpret_cast<const float*>(&scores);
#pragma unroll
      for (int j = 0; j < kEach; ++j) x[j] = part == 0 ? each[j] : x[j] + each[j];
    }
  }
};

// Rows of queries whose products with a run of keys are computed side by side, in eights.
template <int kTiles>
constexpr int kScoresAtOnce = kTiles < 4 ? kTiles : 4;

template <typename Shared>
__device__ inline void store_scores(Shared& s, const float (&score)[kChains][4], int tile) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = tile * 8 + lane % 4 * 2 + i % 2;
    const int key = warp % Shared::kRuns * 16 + lane / 4 + i / 2 * 8;
    s.scores[warp / Shared::kRuns][row][key] = (score[0][i] + score[1][i]) + (score[2][i] + score[3][i]);
  }
}

// One eight of rows keeps its operands in registers.
template <typename Shared>
__device__ inline void write_scores(Shared& s, const uint8_t* keys,
                                    QueryOperand<Shared> (&query)[kScoresAtOnce<Shared::kRowTiles>]) {
  constexpr int kTiles = Shared::kRowTiles;
  constexpr int kAtOnce = kScoresAtOnce<kTiles>;
#pragma unroll
  for (int first = 0; first < kTiles; first += kAtOnce) {
    if constexpr (kTiles > 1) {
#pragma unroll
      for (int tile = 0; tile < kAtOnce; ++tile) query[tile].load(s, first + tile);
    }
    float score[kAtOnce][kChains][4] = {};
    multiply_keys<Shared, kAtOnce>(score, keys, query);
#pragma unroll
    for (int tile = 0; tile < kAtOnce; ++tile) store_scores(s, score[tile], first + tile);
  }
}

template <typename Shared>
__device__ inline void add_values(Shared& s, float (&o)[Shared::kRowTiles][2][4], const uint8_t* values) {
#pragma unroll
  for (int tile = 0; tile < Shared::kRowTiles; ++tile) {
    const float2 shrink = *reinterpret_cast<const float2*>(&s.shrink[tile * 8 + threadIdx.x % 4 * 2]);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[tile][u][i] *= i % 2 ? shrink.y : shrink.x;
    }
  }
  multiply_values(o, s, values);
}

// The gates of this lane's share of the rows, eight dims of row lane / 4 of each eight.
template <int kTiles>
struct Gates {
  uint4 raw[kTiles];

  __device__ void load(const AttentionParameters& p, const MergeRows& rows) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = min(tile * 8 + static_cast<int>(threadIdx.x) % kWarp / 4, rows.count - 1);
      raw[tile] = *reinterpret_cast<const uint4*>(gates_of(p, rows.token(p, row), rows.head(p, row)) + first_dim());
    }
  }
  __device__ static int first_dim() {
    return static_cast<int>(threadIdx.x) / kWarp * 32 + static_cast<int>(threadIdx.x) % 4 * 8;
  }
};

// Eight rows of a warp's 32 dims, so far apart that neither stores of columns nor loads of rows meet a bank twice.
constexpr int kTurnedPitch = 36;
using TurnedTile = float[8][kTurnedPitch];

template <bool kFp8>
__device__ inline void store_turned(TurnedTile& to, const float (&o)[2][4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    float* const row = to[lane % 4 * 2 + column];
    if constexpr (kFp8) {
      *reinterpret_cast<float4*>(row + dim_of<true>(0, 0)) = {o[0][column], o[0][column + 2], o[1][column],
                                                              o[1][column + 2]};
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) row[dim_of<false>(i / 2, i % 2)] = o[i / 2][i % 2 * 2 + column];
    }
  }
}

// Results of the whole sequence, or the segment's to the workspace. Columns of sums become rows through the ring, each
// warp for itself.
template <typename Shared>
__device__ inline void write_rows(const AttentionParameters& p, Shared& s, const float (&o)[Shared::kRowTiles][2][4],
                                  const Gates<Shared::kRowTiles>& gates, const Work& work, bool final) {
  constexpr int kTiles = Shared::kRowTiles;
  constexpr int kAtOnce = kTiles < 4 ? kTiles : 4;
  static_assert(sizeof(TurnedTile) * kAtOnce * kWarps <= sizeof(s.ring));
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  TurnedTile* const turned = reinterpret_cast<TurnedTile*>(s.ring) + warp * kAtOnce;
  const MergeRows rows = work.rows(p.group);
  const int64_t segment = work.first / work.segment * segment_stride(p);
#pragma unroll
  for (int first = 0; first < kTiles; first += kAtOnce) {
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kAtOnce; ++tile) store_turned<Shared::kIsFp8>(turned[tile], o[first + tile]);
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kAtOnce; ++tile) {
      const int row = (first + tile) * 8 + lane / 4;
      if (row >= rows.count) continue;
      const float4* const from = reinterpret_cast<const float4*>(&turned[tile][lane / 4][lane % 4 * 8]);
      const float4 low = from[0], high = from[1];
      const float2 ml = s.greatest_sum[row];
      const int dim = Gates<kTiles>::first_dim();
      if (final) {
        const uint4& gate = gates.raw[first + tile];
        const float scale = reciprocal(ml.y);
        const uint2 first_four = gated_columns(low, scale, {gate.x, gate.y});
        const uint2 last_four = gated_columns(high, scale, {gate.z, gate.w});
        *reinterpret_cast<uint4*>(out_of(p, rows.token(p, row), rows.head(p, row)) + dim) = {first_four.x, first_four.y,
                                                                                             last_four.x, last_four.y};
      } else {
        const int64_t at = segment + rows.at(p, row);
        float4* const to = reinterpret_cast<float4*>(p.partial + at * kHeadDim + dim);
        __stcg(to, low);
        __stcg(to + 1, high);
        if (dim == 0) __stcg(p.greatest_sum + at, ml);
      }
    }
  }
}

// Counts the block; the last ones wait for all and add the segments.
template <typename Shared>
__device__ inline void merge_when_complete(const AttentionParameters& p, Shared& s, const Work& work) {
  const int segments = work.segments;
  const int mergers = min(max(p.mergers / work.kinds, 1), segments);
  int32_t* const counters = p.counters + ((work.sequence * p.pages.heads + work.kv_head) * kKinds + work.kind) * 2;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    s.ticket = atomicAdd(counters, 1);
  }
  __syncthreads();
  const int merger = s.ticket - (segments - mergers);
  if (merger < 0) return;
  if (threadIdx.x == 0) {
    int32_t arrived;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(arrived) : "l"(counters) : "memory");
    } while (arrived < segments);
  }
  __syncthreads();
  static_assert(sizeof(MergeShared) <= sizeof(s.ring));
  merge_segments(p, work.rows(p.group), *reinterpret_cast<MergeShared*>(s.ring), merger, mergers, segments);
  if (threadIdx.x == 0 && atomicAdd(counters + 1, 1) == mergers - 1) counters[0] = counters[1] = 0;
}

// Sends this block's results of the rows to the blocks of the cluster that add them, each of which has a share of the
// rows: columns of sums become rows as in write_rows().
template <typename Shared>
__device__ inline void send_rows(Shared& s, const float (&o)[2][4], int segment, int rows) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  TurnedTile& turned = reinterpret_cast<TurnedTile*>(s.ring)[warp];
  store_turned<Shared::kIsFp8>(turned, o);
  __syncwarp();
  const int row = lane / 4;
  if (row >= rows) return;
  const uint32_t rank = row / kReceivedRows;
  const int place = row % kReceivedRows;
  const uint32_t full = on_rank(shared_address(&s.received.full), rank);
  const int dim = lane % 4 * 8;
  const uint32_t to = on_rank(shared_address(&s.received.o[segment][place][warp * 32 + dim]), rank);
  const float4* const from = reinterpret_cast<const float4*>(&turned[row][dim]);
  const float4 low = from[0], high = from[1];
  send<8>(to, {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}, full);
  if (warp == 0 && dim == 0) {
    const float2 ml = s.greatest_sum[row];
    send<2>(on_rank(shared_address(&s.received.greatest_sum[segment][place]), rank), {ml.x, ml.y}, full);
  }
}

// Adds the segments of a sequence and KV head, whose blocks are a cluster, in its first blocks' shared memory.
template <typename Shared>
__device__ inline void merge_together(const AttentionParameters& p, Shared& s, const float (&o)[2][4], const Work& work,
                                      const OwnToken& own, const MergedColumns& columns) {
  cluster_wait();  // every block's barrier is there
  send_rows(s, o, blockIdx.x, work.row_tokens * p.group);
  own.write(p, s, work);
  if (columns.segments == 0) return;
  wait_for_sent(shared_address(&s.received.full), 0);
  columns.add(s.received);
}

template <bool kFp8, int kTiles, bool kDeep, bool kTogether>
__global__ void __launch_bounds__(kThreads, kTiles == 1 && !kDeep ? 2 : 1)
    decode_attention_kernel(const __grid_constant__ AttentionParameters p) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  using Shared = AttentionShared<kFp8, kTiles, kDeep, kTogether>;
  Shared& s = *reinterpret_cast<Shared*>(dynamic);
  // What no other load decides about is asked for first.
  const float frequency = static_cast<const float*>(as_memory(p.frequencies))[threadIdx.x % kRotaryPairs];
  float query_norm[8], key_norm[8];
  load_weights(p.query_norm, query_norm);
  load_weights(p.key_norm, key_norm);
  const Work work = find_work<kTogether>(p.batch);
  if (work.count <= 0) {
    wait_for_predecessor();
    allow_successor();
    return;
  }
  if constexpr (kTogether) {
    prepare_to_receive(s.received, work.segments, work.row_tokens * p.group);
    cluster_arrive_relaxed();
  }
  constexpr int kKeys = Shared::kKeys;
  const int blocks = (work.count + kKeys - 1) / kKeys;
  const auto offset_of = [&](int key) { return key < work.count ? page_offset<Shared>(p, work, work.first + key) : 0; };
  int key = threadIdx.x;
  uint32_t offset = offset_of(key);
  turn_tokens(s, work, frequency);  // while the first offsets are on their way
#pragma unroll 1
  while (key < blocks * kKeys) {
    s.offset[key] = offset;
    offset = offset_of(key += kThreads);
  }
  __syncthreads();
  const KeyStream<Shared> stream{p, s, min(work.context - work.first, work.segment), blocks * 2};
  stream.fetch_first();
  wait_for_predecessor();
  allow_successor();
  const OwnToken own = stage(p, s, work, query_norm, key_norm);
  // A row's gates are fetched under the products where there are registers for them.
  constexpr bool kGatesEarly = kTiles <= 2;
  const bool final = work.segments == 1;
  Gates<kTiles> gates = {};
  if (kGatesEarly && final) gates.load(p, work.rows(p.group));
  MergedColumns merged;
  if (kTogether && !final) merged.find(p, work.rows(p.group));

  Softmax<Shared> softmax;
  float o[kTiles][2][4] = {};
  QueryOperand<Shared> query[kScoresAtOnce<kTiles>];
  if constexpr (kTiles == 1) {
    __syncthreads();
    query[0].load(s, 0);
  }
  for (int block = 0; block < blocks; ++block) {
    // Of the copies so far all but the last kSlots - 2 are needed.
    wait_copies<Shared::kSlots - 2>();
    __syncthreads();
    stream.fetch_next(2 * block + Shared::kSlots - 1);
    if (work.first + (block + 1) * kKeys > work.context) {
      own.template put<kFp8, true>(stream.slot(2 * block), kKeys, block);
      __syncthreads();
    }
    write_scores(s, stream.slot(2 * block), query);
    wait_copies<Shared::kSlots - 2>();
    __syncthreads();
    stream.fetch_next(2 * block + Shared::kSlots);
    own.template put<kFp8, false>(stream.slot(2 * block + 1), kKeys, block);
    softmax.add(s, p, work, work.first + block * kKeys);
    __syncthreads();
    add_values(s, o, stream.slot(2 * block + 1));
  }
  if (!kGatesEarly && final) gates.load(p, work.rows(p.group));
  softmax.publish(s, work.row_tokens * p.group);
  __syncthreads();
  if constexpr (kTogether) {
    if (!final) {
      merge_together(p, s, o[0], work, own, merged);
      return;
    }
  }
  write_rows(p, s, o, gates, work, final);
  own.write(p, s, work);
  if (!kTogether && !final) merge_when_complete(p, s, work);
}

// The most segments of a row at a position below max_context; the rows just before a limit have many.
int64_t segments_of(int64_t max_context) {
  int64_t most = 0;
  for (const int64_t end : {max_context, int64_t{kDecodeMiddleSegments}, int64_t{kDecodeLongSegments}}) {
    if (end <= max_context) most = std::max(most, (end - 1) / decode_key_segment(end - 1) + 1);
  }
  return most;
}

// The most blocks that a sequence with so many rows takes per KV head: its rows may lie on both sides of a limit.
int64_t blocks_of(int64_t max_context, int64_t tokens) {
  int64_t most = segments_of(max_context);
  for (const int64_t limit : {kDecodeMiddleSegments, kDecodeLongSegments}) {
    const int64_t end = std::min(max_context, limit + tokens - 1);
    if (end > limit)
      most = std::max(most, limit / decode_key_segment(limit - 1) + (end - 1) / decode_key_segment(limit) + 1);
  }
  return most;
}

Status check(const DecodeAttention& a) {
  const auto bad = [](const std::string& what) { return invalid_argument("decode_attention: " + what); };
  if (a.shape.head_dim != kHeadDim || a.shape.rotary_dim != 2 * kRotaryPairs)
    return bad("head_dim must be 256, rotary_dim 64");
  if (a.shape.kv_heads < 1 || a.shape.query_heads % a.shape.kv_heads != 0 ||
      a.shape.query_heads / a.shape.kv_heads > kMaxGroup) {
    return bad("at most 16 query heads per KV head are taken");
  }
  if (a.batch.tokens < 1 || (a.batch.tokens > kDecodeTokens && a.batch.tokens != a.batch.sequences))
    return bad("1 to 8 tokens are taken, or one token of each sequence");
  if (a.batch.sequences * a.shape.kv_heads > kMostGroups)
    return bad("at most " + std::to_string(kMostGroups) + " sequences times KV heads are taken");
  if (a.pages.dtype != DType::kBFloat16 && a.pages.dtype != DType::kFloat8E4M3) {
    return bad("KV pages must be bfloat16 or float8_e4m3");
  }
  if (a.max_context < 1) return bad("max_context must be at least 1");
  if (a.pages.page_size < 1 || a.pages.page_size > kMostPageSize || a.max_context > kMostContext) {
    return bad("contexts of at most " + std::to_string(kMostContext) + " tokens in pages of at most " +
               std::to_string(kMostPageSize) + " are taken");
  }
  if (segments_of(a.max_context) > 1 && a.workspace == nullptr) return bad("a workspace is needed");
  return {};
}

template <bool kFp8, int kTiles, bool kDeep = false, bool kTogether = false>
Status launch_tiles(const AttentionParameters& p, dim3 grid, const Launch& launch) {
  return launch_kernel("decode_attention", launch, decode_attention_kernel<kFp8, kTiles, kDeep, kTogether>, grid,
                       kThreads, sizeof(AttentionShared<kFp8, kTiles, kDeep, kTogether>),
                       kTogether ? static_cast<int>(grid.x) : 1, p);
}

template <bool kFp8>
Status launch_rows(const AttentionParameters& p, int64_t rows, dim3 grid, const Launch& launch) {
  const bool few = static_cast<int64_t>(grid.x) * grid.y * grid.z <= multiprocessors();
  static_assert(kClusterBlocks * decode_key_segment(0) <= kDecodeMiddleSegments, "all of one size");
  if (rows <= 8 && few && grid.x > 1 && grid.x <= kClusterBlocks) {
    grid.x = std::bit_ceil(grid.x);
    return launch_tiles<kFp8, 1, true, true>(p, grid, launch);
  }
  if (rows <= 8) return few ? launch_tiles<kFp8, 1, true>(p, grid, launch) : launch_tiles<kFp8, 1>(p, grid, launch);
  if (rows <= 16) return launch_tiles<kFp8, 2, true>(p, grid, launch);
  if (rows <= 32) return launch_tiles<kFp8, 4>(p, grid, launch);
  if (rows <= 64) return launch_tiles<kFp8, 8>(p, grid, launch);
  return launch_tiles<kFp8, 16>(p, grid, launch);
}

}  // namespace

int64_t decode_attention_workspace_bytes(const AttentionShape& shape, int64_t tokens, int64_t max_context) {
  const int64_t segments = segments_of(max_context);
  if (segments <= 1) return 0;
  return kCounterBytes +
         segments * tokens * shape.query_heads * static_cast<int64_t>(kHeadDim * sizeof(float) + sizeof(float2));
}

Status decode_attention(const DecodeAttention& args, const Launch& launch) {
  TS_RETURN_IF_ERROR(check(args));
  const int64_t segments = segments_of(args.max_context);
  AttentionParameters p = {};
  p.batch = args.batch;
  p.pages = args.pages;
  p.q_gate = static_cast<const bf16*>(args.q_gate.data);
  p.q_gate_stride = args.q_gate.stride;
  p.key = static_cast<const bf16*>(args.key.data);
  p.key_stride = args.key.stride;
  p.value = static_cast<const bf16*>(args.value.data);
  p.value_stride = args.value.stride;
  p.query_norm = args.query_norm;
  p.key_norm = args.key_norm;
  p.epsilon = args.epsilon;
  p.scale = 1.4426950408889634f / 16.0f;  // log2(e) / sqrt(kHeadDim)
  p.group = static_cast<int>(args.shape.query_heads / args.shape.kv_heads);
  p.group_inverse = (65536 + p.group - 1) / p.group;
  p.query_heads = static_cast<int>(args.shape.query_heads);
  p.out = static_cast<bf16*>(args.out.data);
  p.out_stride = args.out.stride;
  p.mergers =
      static_cast<int>(std::max<int64_t>(1, (multiprocessors() - 1) / (args.batch.sequences * args.shape.kv_heads)));
  if (segments > 1) {
    std::byte* const partial = static_cast<std::byte*>(args.workspace) + kCounterBytes;
    p.counters = static_cast<int32_t*>(args.workspace);
    p.partial = reinterpret_cast<float*>(partial);
    p.greatest_sum = reinterpret_cast<float2*>(p.partial + segments * args.batch.tokens * p.query_heads * kHeadDim);
  }
  p.page_inverse = ((uint64_t{1} << 32) + args.pages.page_size - 1) / args.pages.page_size;
  for (int i = 0; i < kRotaryPairs; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(args.shape.rotary_dim);
    p.frequencies[i] = 1.0f / static_cast<float>(std::pow(static_cast<double>(args.shape.rope_theta), exponent));
  }
  const int64_t most_tokens =
      args.batch.tokens == args.batch.sequences ? 1 : args.batch.tokens - args.batch.sequences + 1;
  const dim3 grid(static_cast<unsigned>(blocks_of(args.max_context, most_tokens)),
                  static_cast<unsigned>(args.shape.kv_heads), static_cast<unsigned>(args.batch.sequences));
  return args.pages.dtype == DType::kFloat8E4M3 ? launch_rows<true>(p, most_tokens * p.group, grid, launch)
                                                : launch_rows<false>(p, most_tokens * p.group, grid, launch);
}

}  // namespace tokenspeed::kernels::cuda
