// Projections of the residual stream or of a mixer's result, and the router's.
#pragma once

#include "kernels/cuda/decode_layers.cuh"
#include "kernels/cuda/decode_layers_mixer.cuh"

namespace tokenspeed::kernels::cuda {

// ---- input ----

// Neighbouring columns of one row: two, or four beside FP8 weights.
template <bool kFp8>
struct LaneValues {
  float v[kLaneValues<kFp8>];
};

// Where a phase's input lies.
struct LayerInput {
  const uint2* words;  // [t][k / 2]; null: plain rows
  const bf16* rows;
  int64_t row_stride;
  int k;
  int turns;
  const uint2* squares;  // of the heads, when they are still to be divided by their norms
  float epsilon;
};

// Loads in flight at a time: all turns of a single row, or all rows of a turn.
template <bool kFp8, int kRows>
inline constexpr int kInputBatch = kRows == 1 ? layer_max_turns(kFp8) : kRows;

// This lane's values of item i of `count` from turn `turn` on: turn + i of the only row, or row i.
template <bool kFp8, int kRows>
__device__ __forceinline__ void gather_input(const LayerInput& in, const LayerConsumer& c, int turn, int count,
                                             LaneValues<kFp8> (&values)[kInputBatch<kFp8, kRows>]) {
  constexpr int kCount = kInputBatch<kFp8, kRows>;
  const auto row = [&](int i) { return kRows == 1 ? 0 : i; };
  const auto column = [&](int i) {
    const int chunk = c.warp * in.turns + turn + (kRows == 1 ? i : 0);
    return chunk * layer_chunk_values(kFp8) + static_cast<int>(threadIdx.x) % kWarp * kLaneValues<kFp8>;
  };
  if (in.words == nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= count) break;
      const bf16* const from = in.rows + row(i) * in.row_stride + column(i);
#pragma unroll
      for (int j = 0; j < kLaneValues<kFp8>; j += 2) {
        const uint32_t pair = __ldcg(reinterpret_cast<const unsigned int*>(from + j));
        values[i].v[j] = bf16_low(pair);
        values[i].v[j + 1] = bf16_high(pair);
      }
    }
    return;
  }
  const auto address = [&](int i) { return in.words + (static_cast<int64_t>(row(i)) * in.k + column(i)) / 2; };
  if constexpr (kFp8) {
    gather_pairs<kCount>(c.launch, count, address, [&](int i, uint32_t first, uint32_t second) {
      values[i] = {{bf16_low(first), bf16_high(first), bf16_low(second), bf16_high(second)}};
    });
  } else {
    gather_words<kCount>(c.launch, count, address,
                         [&](int i, uint32_t pair) { values[i] = {{bf16_low(pair), bf16_high(pair)}}; });
  }
}

// What the heads of a mixer's result are to be multiplied by; a lane has a quarter of item lane / 4's head.
template <bool kFp8, int kRows>
class HeadNorms {
 public:
  __device__ void issue(const LayerInput& in, const LayerConsumer& c, int turn, int count) {
    const int i = threadIdx.x % kWarp / 4;
    if (in.squares == nullptr || i >= count) return;
    const int chunk = c.warp * in.turns + turn + (kRows == 1 ? i : 0);
    const int head = chunk * layer_chunk_values(kFp8) / 128;
    from_ = in.squares + ((kRows == 1 ? 0 : i) * (in.k / 128) + head) * 4 + threadIdx.x % 4;
    word_ = load_word(from_);
  }
  __device__ void finish(const LayerInput& in, unsigned launch) {
    if (in.squares == nullptr) return;
    while (!__all_sync(~0u, from_ == nullptr || word_.y == launch)) {
      if (from_ != nullptr) word_ = load_word(from_);
    }
    float sum = __uint_as_float(word_.x);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    factor_ = rsqrtf(sum * (1.0f / 128) + in.epsilon);
  }
  // The whole warp calls.
  __device__ float of(const LayerInput& in, int i) const {
    return in.squares == nullptr ? 1.0f : __shfl_sync(~0u, factor_, i * 4);
  }

 private:
  const uint2* from_ = nullptr;
  uint2 word_ = {};
  float factor_ = 1.0f;
};

// Calls take(turn, row, values, factor) for all of the warp's chunks of all rows of the step.
template <bool kFp8, int kRows, typename Take>
__device__ __forceinline__ void for_input(const LayerInput& in, const LayerConsumer& c, Take&& take) {
  constexpr int kCount = kInputBatch<kFp8, kRows>;
  const int count = kRows == 1 ? in.turns : c.rows;
#pragma unroll
  for (int turn = 0; turn < (kRows == 1 ? 1 : layer_max_turns(kFp8)); ++turn) {
    if (turn >= in.turns) break;
    HeadNorms<kFp8, kRows> heads;
    heads.issue(in, c, turn, count);
    LaneValues<kFp8> values[kCount];
    gather_input<kFp8, kRows>(in, c, turn, count, values);
    heads.finish(in, c.launch);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= count) break;
      take(kRows == 1 ? i : turn, kRows == 1 ? 0 : i, values[i], heads.of(in, i));
    }
  }
}

// 1 + the norm's weights of this lane's columns.
template <bool kFp8>
struct LaneNorm {
  float v[layer_max_turns(kFp8)][kLaneValues<kFp8>];
  __device__ void fetch(const float* weight, int first_chunk, int turns) {
#pragma unroll
    for (int s = 0; s < layer_max_turns(kFp8); ++s) {
#pragma unroll
      for (int j = 0; j < kLaneValues<kFp8>; ++j) v[s][j] = 1.0f;
      if (weight == nullptr || s >= turns) continue;
      const float* const from =
          weight + (first_chunk + s) * layer_chunk_values(kFp8) + threadIdx.x % kWarp * kLaneValues<kFp8>;
#pragma unroll
      for (int j = 0; j < kLaneValues<kFp8>; ++j) v[s][j] = 1.0f + from[j];
    }
  }
};

template <int kRows>
struct RowSquares {
  float v[kRows] = {};
  // The squares of this warp's columns to where all warps' are added.
  __device__ void publish(LayerConsumer& c) {
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      if (t >= c.rows) break;
      const float sum = warp_sum(v[t]);
      if (threadIdx.x % kWarp == 0) c.shared.squares[t][c.warp] = sum;
    }
  }
};

// ---- y = W x ----

__device__ __forceinline__ int segment_of(const ProjectPhase& p, int tile) {
  int found = 0;
#pragma unroll
  for (int i = 1; i < kLayerSegments; ++i) found += i < p.segment_count && tile >= p.segments[i].first_tile;
  return found;
}

__device__ __forceinline__ float project_scale(const ProjectPhase& p, int tile, int chunk) {
  const LayerSegment& s = p.segments[segment_of(p, tile)];
  return s.scale[(tile - s.first_tile) / (128 / kLayerTileRows) * (p.k >> 7) + chunk];
}

// Stages this warp's chunks of the input; what the norm divides by follows with the sums.
template <bool kFp8, int kRows>
__device__ __forceinline__ void stage_input(const ProjectPhase& p, const LaneNorm<kFp8>& norm, LayerConsumer& c,
                                            RowSquares<kRows>& squares) {
  const LayerInput in = {p.words, p.rows, p.row_stride, p.k, p.turns, p.squares, p.epsilon};
  for_input<kFp8, kRows>(in, c, [&](int s, int t, const LaneValues<kFp8>& x, float factor) {
    float y[kLaneValues<kFp8>];
#pragma unroll
    for (int j = 0; j < kLaneValues<kFp8>; ++j) {
      squares.v[t] += x.v[j] * x.v[j];
      y[j] = x.v[j] * norm.v[s][j] * factor;
    }
    stage_values<kFp8, kRows>(c.staged + s * layer_staged_chunk(kFp8, kRows), t, y);
  });
  __syncwarp();
}

template <bool kFp8>
inline constexpr int kOperandPieces = kFp8 ? 4 : 2;

// acc += this warp's share of a turn of a tile of the kernel's own weight type.
template <bool kFp8>
__device__ __forceinline__ void multiply_turn(float (&acc)[4], uint32_t chunk, const Operand<kOperandPieces<kFp8>>& b,
                                              float2 scale) {
  const ChunkWeights w = load_chunk(chunk);
  if constexpr (kFp8) {
    multiply_fp8(acc, w, b, scale);
  } else {
    multiply_bf16<false>(acc, w, b);
  }
}
// acc += this warp's share of turn s of a bfloat16 tile beside FP8 ones. Its chunks are half as wide: lane c's 16 values are half of the 32 that
// lane 2 (s % 2) + c / 2 reads.
template <int kRows>
__device__ __forceinline__ void multiply_wide_turn(float (&acc)[4], const ChunkWeights& w, const uint8_t* staged, int s,
                                                   int rows) {
  const int lane = threadIdx.x % kWarp;
  const int from = lane / 4 * 4 + s % 2 * 2 + lane % 4 / 2;
  const uint8_t* const chunk = staged + s / 2 * layer_staged_chunk(true, kRows);
  multiply_bf16<true>(acc, w, load_operand<2, kRows>(chunk, lane % 2 * 2, from, rows));
}

// Where this thread's element of a batch of tiles goes: tile `own` of the batch, row t of the step, row of the tile.
template <int kRows>
struct ProjectOutput {
  static constexpr int kOutputs = kLayerTileRows * kRows;
  static_assert(layer_batch_tiles(kRows) * kOutputs <= kLayerConsumers, "one element per thread");
  void* to = nullptr;  // a word, or two neighbouring elements
  bool is_word = false;

  // first: the block's number of the batch's first tile.
  __device__ void locate(const ProjectPhase& p, int rows, int hidden, int first) {
    const int own = threadIdx.x / kOutputs;
    const int t = threadIdx.x % kOutputs / kLayerTileRows;
    const int row = threadIdx.x % kLayerTileRows;
    const int tile = blockIdx.x + (first + own) * gridDim.x;
    to = nullptr;
    if (own >= layer_batch_tiles(kRows) || tile >= p.tiles || t >= rows) return;
    const LayerSegment& s = p.segments[segment_of(p, tile)];
    const int n = (tile - s.first_tile) * kLayerTileRows + row;
    if (n >= s.rows_count) return;
    uint2* const words = p.accumulate ? p.residual_words : s.words;
    const int stride = p.accumulate ? hidden >> 1 : s.stride;
    is_word = words != nullptr;
    to = is_word ? static_cast<void*>(words + t * stride + (n >> 1)) : s.rows + static_cast<int64_t>(t) * stride + n;
  }
};

// The sums of a batch of tiles.
template <int kRows>
__device__ __forceinline__ void finish_projection(const ProjectPhase& p, LayerConsumer& c,
                                                  const ProjectOutput<kRows>& out, float scale) {
  if (c.warp * kWarp >= layer_batch_tiles(kRows) * out.kOutputs) return;
  float value = add_parts(c.buffer() + threadIdx.x * kLayerPartialStride) * scale;
  if (p.norm_weight != nullptr) {
    value *= inverse_norm(c.shared, threadIdx.x % out.kOutputs / kLayerTileRows, p.k, p.epsilon);
  }
  if (p.accumulate && out.to != nullptr) value = c.residual = round_bf16(c.residual + value);
  float odd;
  if (!pair_up(value, &odd) || out.to == nullptr) return;
  const uint32_t pair = pack_bf16(value, odd);
  if (out.is_word) {
    store_word(static_cast<uint2*>(out.to), pair, c.launch);
  } else {
    *static_cast<uint32_t*>(out.to) = pair;
  }
}

// Multiplies this warp's chunks of `count` tiles of the kernel's own type and leaves the part sums in `parts`. Lane
// (first_lane + i * turns + s) has the scales of tile i's turn s; kPaired: rows 8 to 15 have scales of their own.
template <bool kFp8, int kRows, bool kPaired>
__device__ __forceinline__ void stream_tiles(LayerConsumer& c, int count, int turns, bool active, float2 scales,
                                             int first_lane, float* parts) {
  const int lane = threadIdx.x % kWarp;
  float acc[4] = {};
  Operand<kOperandPieces<kFp8>> operand = {};
  int s = 0;
#pragma unroll 1
  for (int i = 0; i < count * turns; ++i) {
    float2 scale = {1.0f, 1.0f};
    if constexpr (kFp8) {
      scale.x = __shfl_sync(~0u, scales.x, first_lane + i);
      scale.y = kPaired ? __shfl_sync(~0u, scales.y, first_lane + i) : scale.x;
    }
    if (i == 0 || turns > 1) {
      operand = load_operand<kOperandPieces<kFp8>, kRows>(c.staged + s * layer_staged_chunk(kFp8, kRows), 0, lane,
                                                          c.rows);
    }
    int slot;
    const uint32_t chunk = c.wait(&slot);
    if (active) multiply_turn<kFp8>(acc, chunk, operand, scale);
    c.release(slot);
    if (++s < turns) continue;
    s = 0;
    store_parts<kRows>(parts, c.warp, acc);
    parts += layer_tile_floats(kRows);
#pragma unroll
    for (float& value : acc) value = 0;
  }
}

// A bfloat16 tile beside FP8 ones.
template <int kRows>
__device__ __forceinline__ void stream_wide_tile(LayerConsumer& c, int turns, bool active, float* parts) {
  float acc[4] = {};
#pragma unroll 1
  for (int s = 0; s < turns; ++s) {
    int slot;
    const ChunkWeights w = load_chunk(c.wait(&slot));
    if (active) multiply_wide_turn<kRows>(acc, w, c.staged, s, c.rows);
    c.release(slot);
  }
  store_parts<kRows>(parts, c.warp, acc);
}

__device__ __forceinline__ int tiles_of_block(int tiles) {
  int count = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) ++count;
  return count;
}

template <bool kFp8, int kRows>
__device__ __forceinline__ void consume_project(const ProjectPhase& p, LayerConsumer& c) {
  constexpr int kBatch = layer_batch_tiles(kRows);
  const int lane = threadIdx.x % kWarp;
  const int turns = p.turns;
  const int log_turns = turns >> 1;                 // 1, 2 or 4 turns
  const int lane_tiles_mask = (kWarp >> log_turns) - 1;  // of the tiles whose scales the lanes hold
  const bool active = c.warp < p.warps;
  const int own = tiles_of_block(p.own_tiles);
  const int all = kFp8 ? tiles_of_block(p.tiles) : own;
  RowSquares<kRows> squares;
  float scales = 1.0f;
  int first = 0;
  do {
    if constexpr (kFp8) {
      const int tile = blockIdx.x + (first + (lane >> log_turns)) * gridDim.x;
      if ((first & lane_tiles_mask) == 0 && active && tile < p.own_tiles) {
        scales = project_scale(p, tile, c.warp * turns + (lane & (turns - 1)));
      }
    }
    ProjectOutput<kRows> out;
    out.locate(p, c.rows, c.program.hidden, first);
    if (first == 0 && active) {
      LaneNorm<kFp8> norm;
      norm.fetch(p.norm_weight, c.warp * turns, turns);
      stage_input<kFp8, kRows>(p, norm, c, squares);
      c.mark(1);
    }
    const int count = max(min(kBatch, own - first), 0);
    float* const parts = c.buffer();
    stream_tiles<kFp8, kRows, false>(c, count, turns, active, {scales, scales}, (first & lane_tiles_mask) << log_turns,
                                     parts);
    if constexpr (kFp8) {
#pragma unroll 1
      for (int i = count; i < min(kBatch, all - first); ++i) {
        stream_wide_tile<kRows>(c, 2 * turns, active, parts + i * layer_tile_floats(kRows));
      }
    }
    if (first == 0 && p.norm_weight != nullptr) squares.publish(c);
    c.mark(2);
    consumer_barrier();
    c.mark(3);
    finish_projection<kRows>(p, c, out, kFp8 ? 1.0f / kLayerStagedScale : 1.0f);
    ++c.batch;
    first += kBatch;
  } while (first < all);
  c.mark(4);
  if (p.tail >= 0) store_tails(c.shared.phases[p.tail].mixer, c);
}

// ---- router ----

// logits of rows blockIdx + i * gridDim: plain products, as a block has no more than a few rows. The row is staged for
// gate and up as well.
template <bool kFp8, int kRows>
__device__ __forceinline__ void consume_router(const RouterPhase& p, LayerConsumer& c) {
  constexpr int kValues = kLaneValues<kFp8>;
  constexpr int kChunk = layer_staged_chunk(kFp8, kRows);
  const int lane = threadIdx.x % kWarp;
  const bool active = c.warp < p.warps;
  const int outputs = p.experts + (p.gate != nullptr);
  uint2* to = nullptr;  // this thread's logit
  if (threadIdx.x < kLayerRouterRows * kRows) {
    const int t = threadIdx.x % kRows;
    const int output = blockIdx.x + threadIdx.x / kRows * gridDim.x;
    if (t < c.rows && output < outputs) to = p.logits + t * (p.experts + 1) + output;
  }
  uint32_t weights[kLayerRouterRows][layer_max_turns(kFp8)][kValues / 2] = {};
  LaneNorm<kFp8> norm;
  if (active) {
    norm.fetch(p.norm_weight, c.warp * p.turns, p.turns);
#pragma unroll
    for (int r = 0; r < kLayerRouterRows; ++r) {
      const int output = blockIdx.x + r * gridDim.x;
      if (output >= outputs) break;
      const bf16* const row = output < p.experts ? p.weight + static_cast<int64_t>(output) * p.k : p.gate;
#pragma unroll
      for (int s = 0; s < layer_max_turns(kFp8); ++s) {
        if (s >= p.turns) break;
        const bf16* const from = row + (c.warp * p.turns + s) * layer_chunk_values(kFp8) + lane * kValues;
#pragma unroll
        for (int j = 0; j < kValues / 2; ++j) weights[r][s][j] = reinterpret_cast<const uint32_t*>(from)[j];
      }
    }
  }
  float* const parts = c.buffer();  // [row of the block][row of the step][warp]
  RowSquares<kRows> squares;
  float dots[kLayerRouterRows][kRows] = {};
  if (active) {
    const LayerInput in = {p.words, p.rows, p.row_stride, p.k, p.turns, nullptr, p.epsilon};
    for_input<kFp8, kRows>(in, c, [&](int s, int t, const LaneValues<kFp8>& x, float) {
                             float y[kValues];
#pragma unroll
                             for (int j = 0; j < kValues; ++j) {
                               squares.v[t] += x.v[j] * x.v[j];
                               y[j] = x.v[j] * norm.v[s][j];
                             }
#pragma unroll
                             for (int r = 0; r < kLayerRouterRows; ++r) {
#pragma unroll
                               for (int j = 0; j < kValues / 2; ++j) {
                                 dots[r][t] += y[2 * j] * bf16_low(weights[r][s][j]);
                                 dots[r][t] += y[2 * j + 1] * bf16_high(weights[r][s][j]);
                               }
                             }
                             stage_values<kFp8, kRows>(c.staged + s * kChunk, t, y);
                           });
    c.mark(1);
  }
  squares.publish(c);
#pragma unroll
  for (int r = 0; r < kLayerRouterRows; ++r) {
    if (blockIdx.x + r * gridDim.x >= outputs) break;
#pragma unroll
    for (int t = 0; t < kRows; ++t) {
      if (t >= c.rows) break;
      const float sum = warp_sum(dots[r][t]);
      if (lane == 0) parts[(r * kRows + t) * kLayerPartialStride + c.warp] = sum;
    }
  }
  c.mark(2);
  consumer_barrier();
  c.mark(3);
  if (to != nullptr) {
    const float sum = add_parts(parts + threadIdx.x * kLayerPartialStride);
    store_word(to, __float_as_uint(sum * inverse_norm(c.shared, threadIdx.x % kRows, p.k, p.epsilon)), c.launch);
  }
  c.mark(4);
  ++c.batch;
}

}  // namespace tokenspeed::kernels::cuda
