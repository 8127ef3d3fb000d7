// The delta rule's walk over the chunks of each sequence.
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gdn_chunk.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/tensor_map.h"

namespace tokenspeed::kernels::cuda {
namespace gdn {
namespace {

constexpr int kStateWarps = 2;
constexpr int kBlockValues = 16 * kStateWarps;
constexpr int kWalkThreads = (2 * kStateWarps + 1) * kWarp;  // state warps, output warps, the warp that fetches
constexpr int kStages = 4;
constexpr int kFragments = (kSteps + kTiles) * 4;  // of S and of D, words per lane

struct Stage {
  alignas(1024) bf16 keys[2][kChunk][kHalfRow];
  alignas(1024) bf16 queries[2][kChunk][kHalfRow];
  alignas(1024) bf16 values[kChunk][kBlockValues];
  ChunkMatrices matrices;
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

// Fetches chunk after chunk; one thread. T and P alone are its predecessor's.
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
    if (c == 0) wait_for_predecessor();
    bulk_copy(shared_address(&stage.matrices), matrices + static_cast<int64_t>(c) * value_heads, sizeof(ChunkMatrices),
              full);
  }
}

__device__ inline void state_warps_meet() { asm volatile("bar.sync 1, %0;" ::"n"(kStateWarps * kWarp) : "memory"); }

// The rows behind a sequence's last token are another sequence's: zeros instead, so that its NaN stays there. Both
// state warps must call.
__device__ inline void clear_keys(Stage& stage, int tokens) {
  constexpr int kPieces = kHalfRow / 8;
  state_warps_meet();
  for (int i = tokens * kPieces + threadIdx.x; i < kChunk * kPieces; i += kStateWarps * kWarp) {
    for (int half = 0; half < 2; ++half) reinterpret_cast<uint4*>(&stage.keys[half])[i] = uint4{};
  }
  state_warps_meet();
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

// d[16 x 64] += a[16 x 64] m^T for T or P in shared memory.
__device__ inline void multiply_lower(float (&d)[2 * kTiles][4], const uint32_t (&a)[kTiles][4], uint32_t m) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t from = m + block_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kTiles; ++k) {
#pragma unroll
    for (int n = k; n < kTiles; ++n) {
      uint32_t b[4];
      load_matrices(b, from + lower_block(n, k));
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
  const uint32_t values =
      shared_address(stage.values) + row * kBlockValues * 2 + (((warp * 2 + lane / 8 % 2) ^ (row / 2 % 4)) << 4);
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

__device__ inline void walk_state(const GatedDeltaRule& args, WalkShared& shared, int sequence, int head,
                                  int first_value, int count) {
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
    warp_arrive(shared_address(&shared.ready[warp][c % 2]));

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
    warp_release(shared_address(&shared.empty[c % kStages]));
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

__device__ inline void write_output(const GatedDeltaRule& args, WalkShared& shared, int sequence, int head,
                                    int first_value, int count) {
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
    warp_arrive(shared_address(&shared.taken[warp][c % 2]));
    warp_release(shared_address(&shared.empty[c % kStages]));
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
  if (count == 0) {
    wait_for_predecessor();  // who follows relies on the end of this launch for the end of the one before
    return;
  }
  int64_t first_chunk = 0;
  for (int s = 0; s < sequence; ++s) first_chunk += chunks(args.batch, s);

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(shared_address(&shared.full[s]), 1);
      barrier_init(shared_address(&shared.empty[s]), 2 * kStateWarps * kWarpArrivals);
    }
    for (int i = 0; i < 2 * kStateWarps; ++i) {
      barrier_init(shared_address(&shared.ready[i / 2][i % 2]), kWarpArrivals);
      barrier_init(shared_address(&shared.taken[i / 2][i % 2]), kWarpArrivals);
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
}  // namespace gdn

int64_t chunked_rule_workspace_bytes(const GdnShape& shape, int64_t tokens) {
  return (ceil_div(tokens, kChunkedRuleTokens) + 1) * shape.value_heads *
         static_cast<int64_t>(sizeof(gdn::ChunkMatrices));
}

void chunked_rule(const GatedDeltaRule& args, void* workspace, cudaStream_t stream) {
  using namespace gdn;
  const SequenceBatch& batch = args.batch;
  const int64_t partial =
      batch.sequences < batch.tokens / kChunkedRuleTokens ? batch.sequences : batch.tokens / kChunkedRuleTokens;
  const int64_t most_chunks = batch.tokens / kChunk + partial;
  ChunkMatrices* const matrices = static_cast<ChunkMatrices*>(workspace);
  const CUtensorMap rows = tensor_map(args.qkv.data, DType::kBFloat16, batch.tokens, args.shape.channels(),
                                      args.qkv.stride * 2, kChunk, kHalfRow);
  prepare_chunks(args, matrices, most_chunks, rows, stream);
  const CUtensorMap value_rows = tensor_map(args.qkv.data, DType::kBFloat16, batch.tokens, args.shape.channels(),
                                            args.qkv.stride * 2, kChunk, kBlockValues);
  const dim3 grid(kDim / kBlockValues, static_cast<unsigned>(args.shape.value_heads),
                  static_cast<unsigned>(batch.sequences));
  // An error stays for cudaGetLastError(), as those of the launches around it do.
  static_cast<void>(launch_kernel("chunked_rule", Launch{stream}, walk_kernel, grid, kWalkThreads, sizeof(WalkShared),
                                  1, args, matrices, rows, value_rows));
}

}  // namespace tokenspeed::kernels::cuda
