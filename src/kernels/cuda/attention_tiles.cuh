// What the kernels of paged attention for many rows share: tiles of query rows.
#pragma once

#include "kernels/cuda/attention.h"

namespace tokenspeed::kernels::cuda {

// Which query rows a block computes. Row r of a sequence is token r / group, head r % group of its KV head.
struct QueryTile {
  int sequence;
  int first_row;
  int rows;  // of the sequence
};

// Tiles of kRows rows, sequence by sequence; a launch of tokens * group / kRows + sequences blocks has one for each
// however the tokens are divided.
template <int kRows>
__device__ inline bool find_query_tile(const SequenceBatch& batch, int group, int index, QueryTile* tile) {
  for (int s = 0; s < batch.sequences; ++s) {
    const int rows = (batch.token_begin[s + 1] - batch.token_begin[s]) * group;
    const int tiles = (rows + kRows - 1) / kRows;
    if (index < tiles) {
      *tile = {s, index * kRows, rows};
      return true;
    }
    index -= tiles;
  }
  return false;
}

// paged_attention on warpgroup products: head_dim 256, pages of 8, 16, 32 or a multiple of 64 positions, rows that
// begin at 16 bytes.
bool attends_by_warpgroups(const PagedAttention& args);
void warpgroup_attention(const PagedAttention& args, cudaStream_t stream);

}  // namespace tokenspeed::kernels::cuda
