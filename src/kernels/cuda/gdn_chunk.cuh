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
#pragma once

#include <cuda.h>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gdn_stages.cuh"

namespace tokenspeed::kernels::cuda::gdn {

inline constexpr int kChunk = 64;
inline constexpr int kDim = 128;  // of keys and of values
inline constexpr int kTiles = kChunk / 16;
inline constexpr int kSteps = kDim / 16;
inline constexpr int kHalfRow = 64;  // keys and queries arrive in halves of 64 columns, 128 bytes
inline constexpr int kHalfBytes = kChunk * kHalfRow * 2;

// A lower triangular matrix of one chunk is ten blocks of 16 x 16, 512 bytes each: a column of blocks after the other,
// each from its diagonal block down, so that its rows of 32 bytes lie one after the other.
inline constexpr int kSide = 16;
inline constexpr int kSideBytes = kSide * 2;
inline constexpr int kBlockBytes = kSide * kSideBytes;
inline constexpr int kLowerBytes = kTiles * (kTiles + 1) / 2 * kBlockBytes;
// Byte offset of block (i, j).
__device__ constexpr int lower_block(int i, int j) { return (j * (2 * kTiles - 1 - j) / 2 + i) * kBlockBytes; }
// Byte offset of 16-byte chunk `chunk` of a block's row: eight rows' equal chunks lie in different banks.
__device__ inline int block_offset(int row, int chunk) { return row * kSideBytes + ((chunk ^ (row / 4 & 1)) << 4); }

// What the first kernel leaves for one chunk and value head.
struct ChunkMatrices {
  alignas(256) unsigned char solve[kLowerBytes];   // T
  alignas(256) unsigned char attend[kLowerBytes];  // P
  float grown[kChunk];                             // e^G_i
  float rest[kChunk];                              // e^(G_63 - G_i)
};
static_assert(sizeof(ChunkMatrices) % 16 == 0, "one bulk copy");

__device__ inline int length(const SequenceBatch& batch, int sequence) {
  return batch.token_begin[sequence + 1] - batch.token_begin[sequence];
}
__device__ inline int chunks(const SequenceBatch& batch, int sequence) {
  const int tokens = length(batch, sequence);
  return tokens < kChunkedRuleTokens ? 0 : (tokens + kChunk - 1) / kChunk;
}

// T and P of every chunk of the sequences that are long enough, [chunk][value head]; a launch of `most_chunks` chunks.
// `rows` maps args.qkv in tiles of kChunk rows and kHalfRow columns.
void prepare_chunks(const GatedDeltaRule& args, ChunkMatrices* matrices, int64_t most_chunks, const CUtensorMap& rows,
                    cudaStream_t stream);

}  // namespace tokenspeed::kernels::cuda::gdn
