// T and P of every chunk of the delta rule, in parallel.
#include "kernels/cuda/gdn_chunk.cuh"
#include "kernels/cuda/tensor_core.cuh"

namespace tokenspeed::kernels::cuda::gdn {
namespace {

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
__device__ inline void sum_gates(const GatedDeltaRule& args, const Chunk& chunk, int head, bool active,
                                 PrepareShared& shared) {
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
__global__ void __launch_bounds__(kPrepareThreads, kManyHeads ? 3 : 4)
    prepare_kernel(GatedDeltaRule args, ChunkMatrices* matrices) {
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

  // Warps with the later columns have a quarter of the others' work: every second block exchanges them, so that each of
  // the multiprocessor's schedulers gets both kinds.
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

}  // namespace

void prepare_chunks(const GatedDeltaRule& args, ChunkMatrices* matrices, int64_t most_chunks, cudaStream_t stream) {
  const auto prepare =
      args.shape.value_heads / args.shape.key_heads > kHeadsAtOnce ? prepare_kernel<true> : prepare_kernel<false>;
  prepare<<<dim3(static_cast<unsigned>(most_chunks), static_cast<unsigned>(args.shape.key_heads)), kPrepareThreads,
            sizeof(PrepareShared), stream>>>(args, matrices);
}

}  // namespace tokenspeed::kernels::cuda::gdn
