// T and P of every chunk of the delta rule, in parallel: a block of 128 threads per key head and chunk.
//
// With L = 1 + A in blocks of 16 x 16, X = L^-1 follows from X L = 1: the blocks on the diagonal by substitution, a row
// of the inverse per thread in fp32 registers, those below from right to left on the tensor cores,
//   X_ij = -(sum of X_ik A_kj over j < k <= i) X_jj.
// Factors are sums of two bfloat16, so that a product is exact but for 2^-17 of its terms: T is rounded once, at its
// end. Decays are taken as powers of two. Bytes: keys and queries once, of T and P of each value head the blocks up to
// the diagonal.
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gdn_chunk.cuh"

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
constexpr int kPrepareBlocks = 6;  // of a multiprocessor
constexpr int kHeadsAtOnce = kPrepareThreads / kChunk;

// One value head's A below the diagonal blocks and X in them, as high + low; A of the diagonal blocks, transposed.
struct Triangle {
  unsigned char high[kLowerBytes];
  unsigned char low[kLowerBytes];
  float diagonal[kTiles][kSide * kSide + kSide];  // neighbouring blocks' rows lie in different banks
};
struct PrepareShared {
  struct Operands {
    bf16 keys[2][kChunk][kHalfRow];
    bf16 queries[2][kChunk][kHalfRow];
  };
  union {
    alignas(1024) Operands operands;
    Triangle triangles[kHeadsAtOnce];  // once the products are in registers
  };
  alignas(16) float sum[kHeadsAtOnce][kChunk];  // G / log 2
  alignas(16) float beta[kHeadsAtOnce][kChunk];
  float half_sum[kHeadsAtOnce];
  alignas(8) uint64_t arrived;
};
static_assert(sizeof(PrepareShared) * kPrepareBlocks <= 220 * 1024);

// The lower triangle is 20 tiles of 16 rows and 8 columns. Each warp takes five: two of one row of tiles, from an even
// column on, and three of another.
constexpr int kPair = 2;
constexpr int kWarpTiles = 5;
struct WarpTiles {
  int row[2];     // in 16 rows
  int column[2];  // in 8 columns
  __device__ int row_of(int t) const { return row[t < kPair ? 0 : 1]; }
  __device__ int column_of(int t) const { return t < kPair ? column[0] + t : column[1] + t - kPair; }
};
__device__ inline WarpTiles tiles_of(int warp) {
  switch (warp) {
    case 0:
      return {{0, 3}, {0, 0}};
    case 1:
      return {{1, 3}, {0, 3}};
    case 2:
      return {{1, 2}, {2, 0}};
    default:
      return {{3, 2}, {6, 3}};
  }
}

// K K^T and Q K^T of this warp's tiles.
__device__ inline void multiply_tiles(float (&kk)[kWarpTiles][4], float (&qk)[kWarpTiles][4], const WarpTiles& tiles,
                                      uint32_t keys, uint32_t queries) {
  const int lane = threadIdx.x % kWarp;
  const auto at = [](int row, int k) { return k / 8 * kHalfBytes + swizzled<kHalfRow * 2>(row, k % 8); };
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t b[kWarpTiles + 1][2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t pair[4];
      load_matrices(pair, keys + at(tiles.column[part] * 8 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      b[2 * part][0] = pair[0];
      b[2 * part][1] = pair[1];
      b[2 * part + 1][0] = pair[2];
      b[2 * part + 1][1] = pair[3];
    }
    load_two_matrices(b[kWarpTiles - 1], keys + at(tiles.column[1] * 8 + 16 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t row = at(tiles.row[part] * kSide + lane % 16, 2 * k + lane / 16);
      uint32_t key[4], query[4];
      load_matrices(key, keys + row);
      load_matrices(query, queries + row);
#pragma unroll
      for (int t = part * kPair; t < (part == 0 ? kPair : kWarpTiles); ++t) {
        multiply_add(kk[t], key, b[t][0], b[t][1]);
        multiply_add(qk[t], query, b[t][0], b[t][1]);
      }
    }
  }
}

// Zeros for what does not belong to A or P: above the diagonal, and A's rows behind the sequence's end, which are of
// another's keys and may be NaN.
__device__ inline void keep_lower(float (&kk)[kWarpTiles][4], float (&qk)[kWarpTiles][4], const WarpTiles& tiles,
                                  int tokens) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int t = 0; t < kWarpTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = tiles.row_of(t) * kSide + lane / 4 + e / 2 * 8;
      const int j = tiles.column_of(t) * 8 + lane % 4 * 2 + e % 2;
      kk[t][e] = j < i && i < tokens ? kk[t][e] : 0.0f;
      qk[t][e] = j <= i ? qk[t][e] : 0.0f;
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
  const float beta = inside ? args.beta[at] : 0.0f;
  float sum = inside ? log2f(fmaxf(args.decay[at], kLeast)) : 0.0f;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const float before = __shfl_up_sync(~0u, sum, offset);
    if (static_cast<int>(threadIdx.x % kWarp) >= offset) sum += before;
  }
  if (i == kWarp - 1) shared.half_sum[slot] = sum;
  __syncthreads();
  shared.sum[slot][i] = i < kWarp ? sum : sum + shared.half_sum[slot];
  shared.beta[slot][i] = beta;
  __syncthreads();
}

// Two values as sums of two bfloat16 each.
struct SplitPair {
  uint32_t high;
  uint32_t low;
};
__device__ inline SplitPair split(float x, float y) {
  const uint32_t high = pack_bf16(x, y);
  return {high, pack_bf16(x - bf16_low(high), y - bf16_high(high))};
}

// A to the triangle and P to global memory, from the products of this warp's tiles.
__device__ inline void scale_products(const float (&kk)[kWarpTiles][4], const float (&qk)[kWarpTiles][4],
                                      const WarpTiles& tiles, const float* sum, const float* beta, Triangle* triangle,
                                      ChunkMatrices* out) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int t = 0; t < kWarpTiles; ++t) {
    const int row = tiles.row_of(t);
    const int column = tiles.column_of(t);
    const int j = column * 8 + lane % 4 * 2;
    const float2 sum_j = *reinterpret_cast<const float2*>(sum + j);
    const bool diagonal = column / 2 == row;
    const int block = lower_block(row, column / 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block_row = lane / 4 + 8 * half;
      const int i = row * kSide + block_row;
      const float factor[2] = {power_of_two(fminf(sum[i] - sum_j.x, 0.0f)),
                               power_of_two(fminf(sum[i] - sum_j.y, 0.0f))};
      const float beta_i = beta[i];
      float a[2], p[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        a[e] = beta_i * factor[e] * kk[t][2 * half + e];
        p[e] = factor[e] * qk[t][2 * half + e];
      }
      const int offset = block + block_offset(block_row, column % 2) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(out->attend + offset) = pack_bf16(p[0], p[1]);
      if (diagonal) {
        float* const to = triangle->diagonal[row] + j % kSide * kSide + block_row;
        to[0] = a[0];
        to[kSide] = a[1];
      } else {
        const SplitPair pair = split(a[0], a[1]);
        *reinterpret_cast<uint32_t*>(triangle->high + offset) = pair.high;
        *reinterpret_cast<uint32_t*>(triangle->low + offset) = pair.low;
      }
    }
  }
}

// Row `row` of diagonal block `block` of X, from its last element to its first; those behind the diagonal come out as
// zeros.
__device__ inline void invert_diagonal_row(Triangle* triangle, int block, int row, const float* beta,
                                           ChunkMatrices* out) {
  float x[kSide];
#pragma unroll
  for (int j = kSide - 1; j >= 0; --j) {
    float part[2] = {row == j ? 1.0f : 0.0f, 0.0f};  // two chains of additions
#pragma unroll
    for (int k = j / 4 * 4; k < kSide; k += 4) {
      const float4 a = *reinterpret_cast<const float4*>(triangle->diagonal[block] + j * kSide + k);
      if (k > j) part[0] -= a.x * x[k];
      if (k + 1 > j) part[1] -= a.y * x[k + 1];
      if (k + 2 > j) part[0] -= a.z * x[k + 2];
      if (k + 3 > j) part[1] -= a.w * x[k + 3];
    }
    x[j] = part[0] + part[1];
  }
  const float* const scale = beta + block * kSide;
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    SplitPair pairs[4];
    uint32_t solved[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = chunk * 8 + 2 * i;
      pairs[i] = split(x[j], x[j + 1]);
      solved[i] = pack_bf16(x[j] * scale[j], x[j + 1] * scale[j + 1]);
    }
    const int offset = lower_block(block, block) + block_offset(row, chunk);
    *reinterpret_cast<uint4*>(triangle->high + offset) = {pairs[0].high, pairs[1].high, pairs[2].high, pairs[3].high};
    *reinterpret_cast<uint4*>(triangle->low + offset) = {pairs[0].low, pairs[1].low, pairs[2].low, pairs[3].low};
    *reinterpret_cast<uint4*>(out->solve + offset) = {solved[0], solved[1], solved[2], solved[3]};
  }
}

// An operand of 16 x 16 as the sum of two.
struct SplitOperand {
  uint32_t high[4];
  uint32_t low[4];
};
__device__ inline SplitOperand as_split_operand(const float (&d)[2][4]) {
  SplitOperand operand;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const SplitPair pair = split(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
    operand.high[i] = pair.high;
    operand.low[i] = pair.low;
  }
  return operand;
}

// d += x y, y one of the triangle's blocks.
__device__ inline void multiply_block(float (&d)[2][4], const SplitOperand& x, const Triangle& triangle, int block) {
  const int lane = threadIdx.x % kWarp;
  const int offset = block + block_offset(lane % kSide, lane / kSide);
  uint32_t high[4], low[4];
  load_matrices_transposed(high, shared_address(triangle.high) + offset);
  load_matrices_transposed(low, shared_address(triangle.low) + offset);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) multiply_add(d[tile], x.low, high[2 * tile], high[2 * tile + 1]);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) multiply_add(d[tile], x.high, low[2 * tile], low[2 * tile + 1]);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) multiply_add(d[tile], x.high, high[2 * tile], high[2 * tile + 1]);
}

// T's block (i, j) from X's.
__device__ inline void store_solved(const float (&x)[2][4], int i, int j, const float* beta, ChunkMatrices* out) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const float2 scale = *reinterpret_cast<const float2*>(beta + j * kSide + tile * 8 + lane % 4 * 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int offset = lower_block(i, j) + block_offset(lane / 4 + 8 * half, tile) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(out->solve + offset) =
          pack_bf16(x[tile][2 * half] * scale.x, x[tile][2 * half + 1] * scale.y);
    }
  }
}

// X's blocks (kRow, j) for j < kRow, one warp.
template <int kRow>
__device__ inline void invert_row(const Triangle& triangle, const float* beta, ChunkMatrices* out) {
  const int lane = threadIdx.x % kWarp;
  SplitOperand x[kRow + 1];
  const int offset = lower_block(kRow, kRow) + block_offset(lane % kSide, lane / kSide);
  load_matrices(x[kRow].high, shared_address(triangle.high) + offset);
  load_matrices(x[kRow].low, shared_address(triangle.low) + offset);
#pragma unroll
  for (int j = kRow - 1; j >= 0; --j) {
    float sum[2][4] = {};
#pragma unroll
    for (int k = kRow; k > j; --k) multiply_block(sum, x[k], triangle, lower_block(k, j));
    float product[2][4] = {};
    multiply_block(product, as_split_operand(sum), triangle, lower_block(j, j));
#pragma unroll
    for (int i = 0; i < 8; ++i) product[i / 4][i % 4] = -product[i / 4][i % 4];
    if (j > 0) x[j] = as_split_operand(product);
    store_solved(product, kRow, j, beta, out);
  }
}

// kManyHeads: more value heads share a key head than are solved at once.
template <bool kManyHeads>
__global__ void __launch_bounds__(kPrepareThreads, kPrepareBlocks)
    prepare_kernel(GatedDeltaRule args, ChunkMatrices* matrices, const __grid_constant__ CUtensorMap rows) {
  extern __shared__ __align__(1024) unsigned char memory[];
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(memory);
  // Launched plainly, so all that earlier launches wrote is there for the walk as well, which waits for T and P alone.
  allow_successor();
  // From the last chunk to the first: what was read and written last is still in L2 when the walk begins with it.
  const int index = static_cast<int>(gridDim.y - 1 - blockIdx.y);
  Chunk chunk;
  if (!find_chunk(args.batch, index, &chunk)) return;
  const int key_head = blockIdx.x;
  const int value_heads = static_cast<int>(args.shape.value_heads);
  const int group = value_heads / static_cast<int>(args.shape.key_heads);
  const int warp = threadIdx.x / kWarp;
  const int slot = threadIdx.x / kChunk;
  const int i = threadIdx.x % kChunk;

  const uint32_t arrived = shared_address(&shared.arrived);
  if (threadIdx.x == 0) {
    barrier_init(arrived, 1);
    publish_barriers();
    barrier_arrive_expecting(arrived, 4 * kHalfBytes);
    for (int half = 0; half < 2; ++half) {
      const int column = key_head * kDim + half * kHalfRow;
      tile_copy(shared_address(&shared.operands.keys[half]), rows, chunk.first_token,
                static_cast<int>(args.shape.key_heads) * kDim + column, arrived);
      tile_copy(shared_address(&shared.operands.queries[half]), rows, chunk.first_token, column, arrived);
    }
  }
  sum_gates(args, chunk, key_head * group + slot, slot < group, shared);  // its barriers also publish `arrived`
  barrier_wait(arrived, 0);
  const WarpTiles tiles = tiles_of(warp);
  float kk[kWarpTiles][4] = {};
  float qk[kWarpTiles][4] = {};
  multiply_tiles(kk, qk, tiles, shared_address(shared.operands.keys), shared_address(shared.operands.queries));
  keep_lower(kk, qk, tiles, chunk.tokens);

  for (int first = 0; first < (kManyHeads ? group : 1); first += kHeadsAtOnce) {
    const int first_head = key_head * group + first;
    const bool active = first + slot < group;
    if (kManyHeads && first > 0) sum_gates(args, chunk, first_head + slot, active, shared);
    __syncthreads();  // triangles take the place of keys and queries, or of the triangles before
    ChunkMatrices* const out = matrices + static_cast<int64_t>(index) * value_heads + first_head;
#pragma unroll 1
    for (int s = 0; s < min(kHeadsAtOnce, group - first); ++s) {
      scale_products(kk, qk, tiles, shared.sum[s], shared.beta[s], &shared.triangles[s], out + s);
    }
    __syncthreads();
    Triangle& triangle = shared.triangles[slot];
    const float* const beta = shared.beta[slot];
    if (active) {
      out[slot].grown[i] = power_of_two(shared.sum[slot][i]);
      out[slot].rest[i] = power_of_two(shared.sum[slot][kChunk - 1] - shared.sum[slot][i]);
      invert_diagonal_row(&triangle, i / kSide, i % kSide, beta, out + slot);
    }
    __syncthreads();
    if (active) {
      if (warp % 2 == 0) {
        invert_row<3>(triangle, beta, out + slot);
      } else {
        invert_row<2>(triangle, beta, out + slot);
        invert_row<1>(triangle, beta, out + slot);
      }
    }
  }
}

}  // namespace

void prepare_chunks(const GatedDeltaRule& args, ChunkMatrices* matrices, int64_t most_chunks, const CUtensorMap& rows,
                    cudaStream_t stream) {
  const auto prepare =
      args.shape.value_heads / args.shape.key_heads > kHeadsAtOnce ? prepare_kernel<true> : prepare_kernel<false>;
  // As much shared memory as the walk asks for: six blocks fit, and the multiprocessors need not be divided anew.
  cudaFuncSetAttribute(prepare, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  prepare<<<dim3(static_cast<unsigned>(args.shape.key_heads), static_cast<unsigned>(most_chunks)), kPrepareThreads,
            sizeof(PrepareShared), stream>>>(args, matrices, rows);
}

}  // namespace tokenspeed::kernels::cuda::gdn
