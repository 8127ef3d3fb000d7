// The delta rule in chunks of 64 tokens on the matrix units. With the decays' logarithms summed from the chunk's first
// token (G), b the betas and S the state before the chunk:
//   A_ij = b_i e^(G_i - G_j) k_i.k_j for j < i,   T = (1 + A)^-1 diag(b),   P_ij = e^(G_i - G_j) q_i.k_j for j <= i
//   D = T (V - diag(e^G) K S),   O = diag(e^G) Q S + P D,   S' = e^(G_63) S + sum_i e^(G_63 - G_i) k_i D_i^T
// A first kernel computes T and P of all chunks in parallel, a second one walks each sequence's chunks. A partial chunk
// is filled up with beta = 0 and no decay, which leaves the state as it is.
//
// The walk works on transposed tiles, 16 rows of S (value dims) per warp with all 128 key dims in its registers: each
// product's accumulators are, rounded to bfloat16, the next one's first operand, so the chain over the chunks needs no
// barrier between the warps.
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gdn_stages.cuh"
#include "kernels/cuda/tensor_map.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kChunk = 64;
constexpr int kDim = 128;     // of keys and of values
constexpr int kTiles = kChunk / 16;
constexpr int kSteps = kDim / 16;

// What the first kernel leaves for one chunk and value head. Rows are 144 bytes apart, so that eight of them lie in
// different banks once they are copied to shared memory as they are.
constexpr int kPitch = kChunk + 8;
struct ChunkMatrices {
  bf16 solve[kChunk][kPitch];    // T
  bf16 attend[kChunk][kPitch];   // P; blocks above the diagonal are not written
  float grown[kChunk];           // e^G_i
  float rest[kChunk];            // e^(G_63 - G_i)
};
static_assert(sizeof(ChunkMatrices) % 16 == 0, "one bulk copy");

__device__ inline int length(const SequenceBatch& batch, int sequence) {
  return batch.token_begin[sequence + 1] - batch.token_begin[sequence];
}
__device__ inline int chunks(const SequenceBatch& batch, int sequence) {
  const int tokens = length(batch, sequence);
  return tokens < kChunkedRuleTokens ? 0 : (tokens + kChunk - 1) / kChunk;
}

struct Chunk {
  int first_token;
  int tokens;
};
__device__ inline bool find_chunk(const SequenceBatch& batch, int index, Chunk* chunk) {
  for (int s = 0; s < batch.sequences; ++s) {
    const int count = chunks(batch, s);
    if (index < count) {
      *chunk = {batch.token_begin[s] + index * kChunk, min(kChunk, length(batch, s) - index * kChunk)};
      return true;
    }
    index -= count;
  }
  return false;
}

// --- T and P of every chunk ------------------------------------------------------------------------------------------

constexpr int kPrepareThreads = 128;
constexpr int kHeadsAtOnce = kPrepareThreads / kChunk;

// A's element (i, j): the rows' groups of four columns are exchanged so that eight rows' pairs lie in different banks.
__device__ constexpr int system_column(int i, int j) { return j ^ ((i & 7) << 2); }

struct PrepareShared {
  struct Operands {
    bf16 keys[kChunk * kDim];
    bf16 queries[kChunk * kDim];
  };
  union {
    alignas(128) Operands operands;
    float system[kHeadsAtOnce][kChunk][kChunk];  // A, below the diagonal, once the products are in registers
  };
  float sum[kHeadsAtOnce][kChunk];  // G
  float beta[kHeadsAtOnce][kChunk];
  float half_sum[kHeadsAtOnce];
};

// x y^T of this warp's 16 rows of x, blocks up to the diagonal.
__device__ inline void lower_products(float (&d)[2 * kTiles][4], uint32_t x, uint32_t y) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[4];
    load_matrices(a, x + swizzled<kDim * 2>(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n > warp) continue;
      uint32_t b[4];
      load_matrices(b, y + swizzled<kDim * 2>(n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      multiply_add(d[2 * n], a, b[0], b[1]);
      multiply_add(d[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Thread (slot, i): G_i and beta_i of one head's chunk.
__device__ inline void sum_gates(const GatedDeltaRule& args, const Chunk& chunk, int head, bool active, PrepareShared& shared) {
  const int slot = threadIdx.x / kChunk;
  const int i = threadIdx.x % kChunk;
  const bool inside = active && i < chunk.tokens;
  const int64_t at = (chunk.first_token + i) * args.shape.value_heads + head;
  constexpr float kLeast = 1e-38f;  // a decay of zero must not make the differences of logarithms NaN
  float sum = inside ? logf(fmaxf(args.decay[at], kLeast)) : 0.0f;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const float before = __shfl_up_sync(~0u, sum, offset);
    if (static_cast<int>(threadIdx.x % kWarp) >= offset) sum += before;
  }
  if (i == kWarp - 1) shared.half_sum[slot] = sum;
  __syncthreads();
  shared.sum[slot][i] = i < kWarp ? sum : sum + shared.half_sum[slot];
  shared.beta[slot][i] = inside ? args.beta[at] : 0.0f;
  __syncthreads();
}

// A to shared memory and P to global memory, from the products of this warp's rows.
__device__ inline void scale_products(const float (&kk)[2 * kTiles][4], const float (&qk)[2 * kTiles][4],
                                      const float* sum, const float* beta, float (*system)[kChunk],
                                      ChunkMatrices* out) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = warp * 16 + lane / 4 + 8 * half;
    const float sum_i = sum[i];
    const float beta_i = beta[i];
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      if (n > 2 * warp + 1) continue;
      float a[2], p[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = n * 8 + lane % 4 * 2 + e;
        const float factor = j <= i ? __expf(sum_i - sum[j]) : 0.0f;
        a[e] = j < i ? beta_i * factor * kk[n][2 * half + e] : 0.0f;
        p[e] = factor * qk[n][2 * half + e];
      }
      const int j = n * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(&system[i][system_column(i, j)]) = make_float2(a[0], a[1]);
      *reinterpret_cast<uint32_t*>(&out->attend[i][j]) = pack_bf16(p[0], p[1]);
    }
  }
}

// Column `column` of (1 + A)^-1 by forward substitution, in registers. Rows before kFirst are known to be zero.
template <int kFirst>
__device__ inline void solve_column(const float (*system)[kChunk], int column, float beta, ChunkMatrices* out) {
  float x[kChunk];
#pragma unroll
  for (int i = 0; i < kFirst; ++i) out->solve[i][column] = __float2bfloat16(0.0f);
#pragma unroll
  for (int i = kFirst; i < kChunk; ++i) {
    float part[4] = {i == column ? 1.0f : 0.0f, 0, 0, 0};  // four chains of additions
#pragma unroll
    for (int j = kFirst; j < i; j += 4) {
      const float4 a = *reinterpret_cast<const float4*>(&system[i][system_column(i, j)]);
      part[0] -= a.x * x[j];
      if (j + 1 < i) part[1] -= a.y * x[j + 1];
      if (j + 2 < i) part[2] -= a.z * x[j + 2];
      if (j + 3 < i) part[3] -= a.w * x[j + 3];
    }
    x[i] = (part[0] + part[1]) + (part[2] + part[3]);
    out->solve[i][column] = __float2bfloat16(x[i] * beta);
  }
}

// kManyHeads: more value heads share a key head than are solved at once.
template <bool kManyHeads>
__global__ void __launch_bounds__(kPrepareThreads, kManyHeads ? 3 : 4) prepare_kernel(GatedDeltaRule args, ChunkMatrices* matrices) {
  extern __shared__ __align__(1024) unsigned char memory[];
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(memory);
  Chunk chunk;
  if (!find_chunk(args.batch, blockIdx.x, &chunk)) return;
  const int key_head = blockIdx.y;
  const int value_heads = static_cast<int>(args.shape.value_heads);
  const int group = value_heads / static_cast<int>(args.shape.key_heads);

  const uint32_t keys = shared_address(shared.operands.keys);
  const uint32_t queries = shared_address(shared.operands.queries);
  constexpr int kPieces = kDim / 8;
  for (int i = threadIdx.x; i < kChunk * kPieces; i += kPrepareThreads) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const bf16* query = static_cast<const bf16*>(args.qkv.data) + (chunk.first_token + row) * args.qkv.stride +
                        key_head * kDim + piece * 8;
    const bool inside = row < chunk.tokens;
    copy16_async(queries + swizzled<kDim * 2>(row, piece), inside ? query : nullptr, inside);
    copy16_async(keys + swizzled<kDim * 2>(row, piece), inside ? query + args.shape.key_heads * kDim : nullptr, inside);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  float kk[2 * kTiles][4] = {};
  float qk[2 * kTiles][4] = {};
  lower_products(kk, keys, keys);
  lower_products(qk, queries, keys);

  __syncthreads();  // A takes the place of keys and queries

  // Warps with the later columns have a quarter of the others' work: every second block exchanges them, so that each of the
  // multiprocessor's schedulers gets both kinds.
  const int slot = threadIdx.x / kChunk;
  const int i = (threadIdx.x + blockIdx.x % 2 * kWarp) % kChunk;
  for (int first = 0; first < (kManyHeads ? group : 1); first += kHeadsAtOnce) {
    const int first_head = key_head * group + first;
    const bool active = first + slot < group;
    sum_gates(args, chunk, first_head + slot, active, shared);
    ChunkMatrices* const out = matrices + static_cast<int64_t>(blockIdx.x) * value_heads + first_head;
#pragma unroll
    for (int s = 0; s < kHeadsAtOnce; ++s) {
      if (first + s < group) scale_products(kk, qk, shared.sum[s], shared.beta[s], shared.system[s], out + s);
    }
    __syncthreads();
    if (active) {
      const float* const sum = shared.sum[slot];
      out[slot].grown[i] = __expf(sum[i]);
      out[slot].rest[i] = __expf(sum[kChunk - 1] - sum[i]);
      if (i < kChunk / 2) {
        solve_column<0>(shared.system[slot], i, shared.beta[slot][i], out + slot);
      } else {
        solve_column<kChunk / 2>(shared.system[slot], i, shared.beta[slot][i], out + slot);
      }
    }
    if constexpr (kManyHeads) __syncthreads();
  }
}

// --- The walk over the chunks ------------------------------------------------------------------------------------------

constexpr int kStateWarps = 2;
constexpr int kBlockValues = 16 * kStateWarps;
constexpr int kWalkThreads = (2 * kStateWarps + 1) * kWarp;  // state warps, output warps, the warp that fetches
constexpr int kStages = 3;
constexpr int kHalfRow = 64;                       // keys and queries arrive in halves of 64 columns, 128 bytes
constexpr int kHalfBytes = kChunk * kHalfRow * 2;
constexpr int kFragments = (kSteps + kTiles) * 4;  // of S and of D, words per lane

struct Stage {
  alignas(1024) bf16 keys[2][kChunk][kHalfRow];
  alignas(1024) bf16 queries[2][kChunk][kHalfRow];
  alignas(1024) bf16 values[kChunk][kBlockValues];
  alignas(16) ChunkMatrices matrices;
};
constexpr uint32_t kStageBytes = 4 * kHalfBytes + kChunk * kBlockValues * 2 + sizeof(ChunkMatrices);

struct WalkShared {
  Stage stages[kStages];
  uint32_t passed[kStateWarps][2][kFragments][kWarp];  // S and D of a chunk, to the output warp
  alignas(8) uint64_t full[kStages];
  alignas(8) uint64_t empty[kStages];
  alignas(8) uint64_t ready[kStateWarps][2];
  alignas(8) uint64_t taken[kStateWarps][2];
};

// Fetches chunk after chunk; one thread.
__device__ inline void fetch_chunks(const GatedDeltaRule& args, const CUtensorMap& rows, const CUtensorMap& value_rows,
                                    WalkShared& shared, const ChunkMatrices* matrices, int sequence, int head,
                                    int first_value, int count) {
  const int value_heads = static_cast<int>(args.shape.value_heads);
  const int key_columns = static_cast<int>(args.shape.key_heads) * kDim;
  const int query_column = head / (value_heads / static_cast<int>(args.shape.key_heads)) * kDim;
  const int first_token = args.batch.token_begin[sequence];
  for (int c = 0; c < count; ++c) {
    const int s = c % kStages;
    Stage& stage = shared.stages[s];
    const uint32_t full = shared_address(&shared.full[s]);
    const int token = first_token + c * kChunk;
    barrier_wait(shared_address(&shared.empty[s]), (c / kStages + 1) % 2);
    barrier_arrive_expecting(full, kStageBytes);
    for (int half = 0; half < 2; ++half) {
      const int column = query_column + half * kHalfRow;
      tile_copy(shared_address(&stage.keys[half]), rows, token, key_columns + column, full);
      tile_copy(shared_address(&stage.queries[half]), rows, token, column, full);
    }
    tile_copy(shared_address(&stage.values), value_rows, token, 2 * key_columns + head * kDim + first_value, full);
    bulk_copy(shared_address(&stage.matrices), matrices + static_cast<int64_t>(c) * value_heads, sizeof(ChunkMatrices), full);
  }
}

// The rows behind a sequence's last token are another sequence's: zeros instead, so that its NaN stays there.
__device__ inline void clear_keys(Stage& stage, int tokens) {
  constexpr int kPieces = kHalfRow / 8;
  for (int i = tokens * kPieces + threadIdx.x % kWarp; i < kChunk * kPieces; i += kWarp) {
    for (int half = 0; half < 2; ++half) reinterpret_cast<uint4*>(&stage.keys[half])[i] = uint4{};
  }
  __syncwarp();
}

// d[16 x 64] += a[16 x 128] rows^T: rows are 64 keys or queries.
__device__ inline void multiply_rows(float (&d)[2 * kTiles][4], const uint32_t (&a)[kSteps][4], uint32_t rows) {
  const int lane = threadIdx.x % kWarp;
  const int row = lane % 8 + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint32_t from = rows + k / 4 * kHalfBytes + swizzled<kHalfRow * 2>(row, k % 4 * 2 + lane / 8 % 2);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      uint32_t b[4];
      load_matrices(b, from + n * 16 * kHalfRow * 2);
      multiply_add(d[2 * n], a[k], b[0], b[1]);
      multiply_add(d[2 * n + 1], a[k], b[2], b[3]);
    }
  }
}

// d[16 x 64] += a[16 x 64] m^T for a lower triangular m in shared memory.
__device__ inline void multiply_lower(float (&d)[2 * kTiles][4], const uint32_t (&a)[kTiles][4], uint32_t m) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t from = m + (lane % 8 + lane / 16 * 8) * (kPitch * 2) + lane / 8 % 2 * 16;
#pragma unroll
  for (int k = 0; k < kTiles; ++k) {
#pragma unroll
    for (int n = k; n < kTiles; ++n) {
      uint32_t b[4];
      load_matrices(b, from + n * 16 * kPitch * 2 + k * 32);
      multiply_add(d[2 * n], a[k], b[0], b[1]);
      multiply_add(d[2 * n + 1], a[k], b[2], b[3]);
    }
  }
}

// The accumulators of two neighbouring tiles of 8 columns as the first operand of a product over those 16 columns.
__device__ inline void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack_bf16(left[0], left[1]);
  a[1] = pack_bf16(left[2], left[3]);
  a[2] = pack_bf16(right[0], right[1]);
  a[3] = pack_bf16(right[2], right[3]);
}

// d's columns 2 (lane % 4) and the next of every 8, times one factor per column.
__device__ inline void scale_columns(float (&d)[2 * kTiles][4], const float* factors) {
#pragma unroll
  for (int n = 0; n < 2 * kTiles; ++n) {
    const float2 f = *reinterpret_cast<const float2*>(factors + n * 8 + threadIdx.x % 4 * 2);
    d[n][0] *= f.x;
    d[n][1] *= f.y;
    d[n][2] *= f.x;
    d[n][3] *= f.y;
  }
}

// D^T of this warp's value rows, from S^T K^T in m; `tokens` of the chunk are the sequence's.
__device__ inline void solve_chunk(float (&d)[2 * kTiles][4], float (&m)[2 * kTiles][4], const Stage& stage, int warp,
                                   int tokens) {
  const int lane = threadIdx.x % kWarp;
  scale_columns(m, stage.matrices.grown);
  // Rows of 64 bytes: their four chunks are exchanged by every second row's number.
  const int row = lane % 8 + lane / 16 * 8;
  const uint32_t values = shared_address(stage.values) + row * kBlockValues * 2 + (((warp * 2 + lane / 8 % 2) ^ (row / 2 % 4)) << 4);
  uint32_t r[kTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    uint32_t v[4];
    load_matrices_transposed(v, values + t * 16 * kBlockValues * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v[i]));
      const float* from = &m[2 * t + i / 2][i % 2 * 2];
      const int token = t * 16 + i / 2 * 8 + lane % 4 * 2;
      r[t][i] = pack_bf16(token < tokens ? pair.x - from[0] : 0.0f, token + 1 < tokens ? pair.y - from[1] : 0.0f);
    }
  }
  multiply_lower(d, r, shared_address(stage.matrices.solve));
}

__device__ inline float* state_row(const GatedDeltaRule& args, int slot, int head, int value) {
  return reinterpret_cast<float*>(args.state.recurrent + slot * args.state.slot_stride) +
         (static_cast<int64_t>(head) * kDim + value) * kDim + threadIdx.x % 4 * 2;
}

__device__ inline void walk_state(const GatedDeltaRule& args, WalkShared& shared, int sequence, int head, int first_value,
                                  int count) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int value = first_value + warp * 16 + lane / 4;
  float state[2 * kSteps][4] = {};
  if (const int slot = args.batch.state_in[sequence]; slot >= 0) {
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = *reinterpret_cast<const float2*>(state_row(args, slot, head, value + 8 * half) + n * 8);
        state[n][2 * half] = pair.x;
        state[n][2 * half + 1] = pair.y;
      }
    }
  }
  for (int c = 0; c < count; ++c) {
    Stage& stage = shared.stages[c % kStages];
    const int tokens = length(args.batch, sequence) - c * kChunk;
    uint32_t(*const passed)[kWarp] = shared.passed[warp][c % 2];
    uint32_t s[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) as_operand(s[k], state[2 * k], state[2 * k + 1]);
    barrier_wait(shared_address(&shared.taken[warp][c % 2]), (c / 2 + 1) % 2);
#pragma unroll
    for (int i = 0; i < kSteps * 4; ++i) passed[i][lane] = s[i / 4][i % 4];
    barrier_wait(shared_address(&shared.full[c % kStages]), c / kStages % 2);

    float m[2 * kTiles][4] = {};
    multiply_rows(m, s, shared_address(stage.keys));
    float d[2 * kTiles][4] = {};
    solve_chunk(d, m, stage, warp, tokens);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      uint32_t a[4];
      as_operand(a, d[2 * t], d[2 * t + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) passed[(kSteps + t) * 4 + i][lane] = a[i];
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&shared.ready[warp][c % 2]));

    scale_columns(d, stage.matrices.rest);
    const float grown = stage.matrices.grown[kChunk - 1];
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state[n][i] *= grown;
    }
    if (tokens < kChunk) clear_keys(stage, tokens);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      uint32_t a[4];
      as_operand(a, d[2 * t], d[2 * t + 1]);
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, shared_address(stage.keys) + n / 4 * kHalfBytes + t * 16 * kHalfRow * 2 +
                                        swizzled<kHalfRow * 2>(lane % 16, n % 4 * 2 + lane / 16));
        multiply_add(state[2 * n], a, b[0], b[1]);
        multiply_add(state[2 * n + 1], a, b[2], b[3]);
      }
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&shared.empty[c % kStages]));
  }
  const int slot = args.batch.state_out[sequence];
#pragma unroll
  for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(state_row(args, slot, head, value + 8 * half) + n * 8) =
          make_float2(state[n][2 * half], state[n][2 * half + 1]);
    }
  }
}

// An 8 x 8 tile of 16-bit elements, one row of four lanes each, transposed.
__device__ inline uint32_t transpose_tile(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ inline void write_output(const GatedDeltaRule& args, WalkShared& shared, int sequence, int head, int first_value,
                                    int count) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp - kStateWarps;
  const int tokens = length(args.batch, sequence);
  const int column = head * kDim + first_value + warp * 16 + lane % 4 * 2;
  bf16* const out = static_cast<bf16*>(args.out.data) + args.batch.token_begin[sequence] * args.out.stride + column;
  for (int c = 0; c < count; ++c) {
    const Stage& stage = shared.stages[c % kStages];
    const uint32_t(*const passed)[kWarp] = shared.passed[warp][c % 2];
    barrier_wait(shared_address(&shared.full[c % kStages]), c / kStages % 2);
    barrier_wait(shared_address(&shared.ready[warp][c % 2]), c / 2 % 2);
    float o[2 * kTiles][4] = {};
    {
      uint32_t s[kSteps][4];
#pragma unroll
      for (int i = 0; i < kSteps * 4; ++i) s[i / 4][i % 4] = passed[i][lane];
      multiply_rows(o, s, shared_address(stage.queries));
    }
    scale_columns(o, stage.matrices.grown);
    uint32_t d[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) d[i / 4][i % 4] = passed[kSteps * 4 + i][lane];
    multiply_lower(o, d, shared_address(stage.matrices.attend));
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(shared_address(&shared.taken[warp][c % 2]));
      barrier_arrive(shared_address(&shared.empty[c % kStages]));
    }
#pragma unroll
    for (int n = 0; n < 2 * kTiles; ++n) {
      const int token = c * kChunk + n * 8 + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = transpose_tile(pack_bf16(o[n][2 * half], o[n][2 * half + 1]));
        if (token < tokens) *reinterpret_cast<uint32_t*>(out + token * args.out.stride + 8 * half) = pair;
      }
    }
  }
}

__global__ void __launch_bounds__(kWalkThreads, 1)
    walk_kernel(GatedDeltaRule args, const ChunkMatrices* matrices, const __grid_constant__ CUtensorMap rows,
                const __grid_constant__ CUtensorMap value_rows) {
  extern __shared__ __align__(1024) unsigned char memory[];
  WalkShared& shared = *reinterpret_cast<WalkShared*>(memory);
  const int first_value = blockIdx.x * kBlockValues;
  const int head = blockIdx.y;
  const int sequence = blockIdx.z;
  const int count = chunks(args.batch, sequence);
  if (count == 0) return;
  int64_t first_chunk = 0;
  for (int s = 0; s < sequence; ++s) first_chunk += chunks(args.batch, s);

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(shared_address(&shared.full[s]), 1);
      barrier_init(shared_address(&shared.empty[s]), 2 * kStateWarps);
    }
    for (int i = 0; i < 2 * kStateWarps; ++i) {
      barrier_init(shared_address(&shared.ready[i / 2][i % 2]), 1);
      barrier_init(shared_address(&shared.taken[i / 2][i % 2]), 1);
    }
  }
  publish_barriers();
  __syncthreads();
  const int warp = threadIdx.x / kWarp;
  if (warp < kStateWarps) {
    walk_state(args, shared, sequence, head, first_value, count);
  } else if (warp < 2 * kStateWarps) {
    write_output(args, shared, sequence, head, first_value, count);
  } else if (threadIdx.x % kWarp == 0) {
    fetch_chunks(args, rows, value_rows, shared, matrices + first_chunk * args.shape.value_heads + head, sequence, head,
                 first_value, count);
  }
}

}  // namespace

int64_t chunked_rule_workspace_bytes(const GdnShape& shape, int64_t tokens) {
  return (ceil_div(tokens, kChunkedRuleTokens) + 1) * shape.value_heads * static_cast<int64_t>(sizeof(ChunkMatrices));
}

void chunked_rule(const GatedDeltaRule& args, void* workspace, cudaStream_t stream) {
  const SequenceBatch& batch = args.batch;
  const int64_t partial = batch.sequences < batch.tokens / kChunkedRuleTokens ? batch.sequences : batch.tokens / kChunkedRuleTokens;
  const int64_t most_chunks = batch.tokens / kChunk + partial;
  ChunkMatrices* const matrices = static_cast<ChunkMatrices*>(workspace);
  const auto prepare =
      args.shape.value_heads / args.shape.key_heads > kHeadsAtOnce ? prepare_kernel<true> : prepare_kernel<false>;
  prepare<<<dim3(static_cast<unsigned>(most_chunks), static_cast<unsigned>(args.shape.key_heads)), kPrepareThreads,
            sizeof(PrepareShared), stream>>>(args, matrices);
  cudaFuncSetAttribute(walk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(WalkShared));
  walk_kernel<<<dim3(kDim / kBlockValues, static_cast<unsigned>(args.shape.value_heads), static_cast<unsigned>(batch.sequences)),
                kWalkThreads, sizeof(WalkShared), stream>>>(
      args, matrices, tensor_map(args.qkv.data, DType::kBFloat16, batch.tokens, args.shape.channels(), args.qkv.stride * 2, kChunk, kHalfRow),
      tensor_map(args.qkv.data, DType::kBFloat16, batch.tokens, args.shape.channels(), args.qkv.stride * 2, kChunk, kBlockValues));
}

}  // namespace tokenspeed::kernels::cuda
