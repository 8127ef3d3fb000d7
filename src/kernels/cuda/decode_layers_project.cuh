// Projections of the residual stream or of a mixer's result, and the router's.
#pragma once

#include "kernels/cuda/decode_layers.cuh"
#include "kernels/cuda/decode_layers_mixer.cuh"

namespace tokenspeed::kernels::cuda {

// ---- input ----

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

// A lane's neighbouring columns as they lie in memory: pairs of bfloat16.
template <bool kFp8>
struct LanePairs {
  uint32_t pair[kLaneValues<kFp8> / 2];
  __device__ float value(int j) const { return j % 2 == 0 ? bf16_low(pair[j / 2]) : bf16_high(pair[j / 2]); }
};

// This lane's first column of a chunk.
template <bool kFp8>
__device__ __forceinline__ int lane_column(int chunk) {
  return chunk * layer_chunk_values(kFp8) + static_cast<int>(threadIdx.x) % kWarp * kLaneValues<kFp8>;
}

// Words at address(0 .. kCount - 1), of which the first kFirst are polled alone.
template <bool kFp8, int kCount, int kFirst, typename Address>
__device__ __forceinline__ void gather_words_of(unsigned launch, int count, Address&& address,
                                                LanePairs<kFp8> (&pairs)[kCount]) {
  if constexpr (kFp8) {
    gather_pairs<kCount, kFirst>(launch, count, address, [&](int i, uint32_t first, uint32_t second) {
      pairs[i] = {{first, second}};
    });
  } else {
    gather_words<kCount, kFirst>(launch, count, address, [&](int i, uint32_t pair) { pairs[i] = {{pair}}; });
  }
}

// This lane's pairs of the only row, of all turns.
template <bool kFp8>
__device__ __forceinline__ void gather_row(const LayerInput& in, const LayerConsumer& c,
                                           LanePairs<kFp8> (&pairs)[layer_max_turns(kFp8)]) {
  constexpr int kTurns = layer_max_turns(kFp8);
  const auto column = [&](int i) { return lane_column<kFp8>(c.warp * in.turns + i); };
  if (in.words == nullptr) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (i >= in.turns) break;
      const auto* const from = reinterpret_cast<const unsigned int*>(in.rows + column(i));
#pragma unroll
      for (int j = 0; j < kLaneValues<kFp8> / 2; ++j) pairs[i].pair[j] = __ldcg(from + j);
    }
    return;
  }
  gather_words_of<kFp8, kTurns, kTurns>(
      c.launch, in.turns, [&](int i) { return in.words + column(i) / 2; }, pairs);
}

// Of all rows, of one turn; rows that are not there repeat the last one, so that nothing branches and all loads are in
// flight together. Many words are not polled together, as that would take the bandwidth of L2 from the weights: when
// the first row's are there, the others of the same writers are, or nearly.
template <bool kFp8, int kRows>
__device__ __forceinline__ void gather_rows(const LayerInput& in, const LayerConsumer& c, int turn,
                                            LanePairs<kFp8> (&pairs)[kRows]) {
  const int column = lane_column<kFp8>(c.warp * in.turns + turn);
  const auto row = [&](int i) { return min(i, c.rows - 1); };
  if (in.words == nullptr) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bf16* const from = in.rows + row(i) * in.row_stride + column;
      if constexpr (kFp8) {
        const uint2 both = __ldcg(reinterpret_cast<const uint2*>(from));
        pairs[i] = {{both.x, both.y}};
      } else {
        pairs[i] = {{__ldcg(reinterpret_cast<const unsigned int*>(from))}};
      }
    }
    return;
  }
  const uint2* const from = in.words + column / 2;
  const int stride = in.k / 2;
  gather_words_of<kFp8, kRows, 1>(
      c.launch, kRows, [&](int i) { return from + row(i) * stride; }, pairs);
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
    if (kRows == 1 && in.squares == nullptr) return;
    while (!__all_sync(~0u, from_ == nullptr || word_.y == launch)) {
      if (from_ != nullptr) word_ = load_word(from_);
    }
    float sum = __uint_as_float(word_.x);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (from_ != nullptr) factor_ = rsqrtf(sum * (1.0f / 128) + in.epsilon);
  }
  // The whole warp calls.
  __device__ float of(const LayerInput& in, int i) const {
    return kRows == 1 && in.squares == nullptr ? 1.0f : __shfl_sync(~0u, factor_, i * 4);
  }

 private:
  const uint2* from_ = nullptr;
  uint2 word_ = {};
  float factor_ = 1.0f;
};

// 1 + the norm's weights of this lane's columns of neighbouring chunks.
template <bool kFp8, int kChunks>
struct LaneNorm {
  float v[kChunks][kLaneValues<kFp8>];
  __device__ void fetch(const float* weight, int first_chunk, int chunks) {
#pragma unroll
    for (int s = 0; s < kChunks; ++s) {
      struct alignas(kLaneValues<kFp8> * 4) Values {
        float v[kLaneValues<kFp8>];
      };
      Values values = {};
      if (weight != nullptr && s < chunks) {
        values = *reinterpret_cast<const Values*>(weight + lane_column<kFp8>(first_chunk + s));
      }
#pragma unroll
      for (int j = 0; j < kLaneValues<kFp8>; ++j) v[s][j] = 1.0f + values.v[j];
    }
  }
};

template <int kRows>
struct RowSquares {
  float v[kRows] = {};
  // The squares of this warp's columns to where all warps' are added.
  __device__ void publish(LayerConsumer& c) {
    const float sum = warp_sums(v);
    if (is_lane_of_sum<kRows>()) c.shared.squares[sum_of_lane<kRows>()][c.warp] = sum;
  }
};

// Stages one row's values of a turn, and hands them to take(t, y).
template <bool kFp8, int kRows, typename Take>
__device__ __forceinline__ void stage_row(const LanePairs<kFp8>& x, const float (&norm)[kLaneValues<kFp8>],
                                          float factor, int turn, int t, LayerConsumer& c, RowSquares<kRows>& squares,
                                          Take&& take) {
  float y[kLaneValues<kFp8>];
#pragma unroll
  for (int j = 0; j < kLaneValues<kFp8>; ++j) {
    squares.v[t] += x.value(j) * x.value(j);
    y[j] = x.value(j) * norm[j] * factor;
  }
  take(t, y);
  stage_values<kFp8, kRows>(c.staged + turn * kStagedTurn<kFp8, kRows>, t, y);
}

// Stages this warp's chunks of the input; what the norm divides by follows with the sums. take(turn, t, y) is called
// for all values, prepare(turn) before they are waited for.
template <bool kFp8, int kRows, bool kHeads, typename Prepare, typename Take>
__device__ __forceinline__ void stage_input(const LayerInput& in, const float* norm_weight, LayerConsumer& c,
                                            RowSquares<kRows>& squares, Prepare&& prepare, Take&& take) {
  if constexpr (kRows == 1) {
    constexpr int kTurns = layer_max_turns(kFp8);
    LaneNorm<kFp8, kTurns> norm;
    norm.fetch(norm_weight, c.warp * in.turns, in.turns);
    prepare(0);
    HeadNorms<kFp8, kRows> heads;
    if constexpr (kHeads) heads.issue(in, c, 0, in.turns);
    LanePairs<kFp8> pairs[kTurns] = {};
    gather_row<kFp8>(in, c, pairs);
    if constexpr (kHeads) heads.finish(in, c.launch);
#pragma unroll
    for (int s = 0; s < kTurns; ++s) {
      if (s >= in.turns) break;
      const float factor = kHeads ? heads.of(in, s) : 1.0f;
      stage_row<kFp8>(pairs[s], norm.v[s], factor, s, 0, c, squares,
                      [&](int t, const float(&y)[kLaneValues<kFp8>]) { take(s, t, y); });
    }
  } else {
#pragma unroll 1
    for (int s = 0; s < in.turns; ++s) {
      LaneNorm<kFp8, 1> norm;
      norm.fetch(norm_weight, c.warp * in.turns + s, 1);
      prepare(s);
      HeadNorms<kFp8, kRows> heads;
      if constexpr (kHeads) heads.issue(in, c, s, c.rows);
      LanePairs<kFp8> pairs[kRows] = {};
      gather_rows<kFp8, kRows>(in, c, s, pairs);
      if constexpr (kHeads) heads.finish(in, c.launch);
#pragma unroll
      for (int t = 0; t < kRows; ++t) {
        const float factor = kHeads ? heads.of(in, t) : 1.0f;
        stage_row<kFp8>(pairs[t], norm.v[0], factor, s, t, c, squares,
                        [&](int row, const float(&y)[kLaneValues<kFp8>]) { take(0, row, y); });
      }
    }
  }
  __syncwarp();
}

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
// acc += this warp's share of turn s of a bfloat16 tile beside FP8 ones. Its chunks are half as wide: lane c's 16
// values are half of the 32 that lane 2 (s % 2) + c / 2 reads.
template <int kRows>
__device__ __forceinline__ void multiply_wide_turn(float (&acc)[4], const ChunkWeights& w, const uint8_t* staged, int s,
                                                   int rows) {
  const int lane = threadIdx.x % kWarp;
  const int from = lane / 4 * 4 + s % 2 * 2 + lane % 4 / 2;
  const uint8_t* const chunk = staged + s / 2 * kStagedTurn<true, kRows>;
  multiply_bf16<true>(acc, w, Operand<2>().load<kRows>(chunk, lane % 2 * 2, from, rows));
}

// Where this thread's element of a batch of tiles goes: tile `own` of the batch, row t of the step, row of the tile.
template <int kRows>
struct ProjectOutput {
  static constexpr int kOutputs = kLayerTileRows * kRows;
  void* to = nullptr;  // a word, or two neighbouring elements
  LayerResult result = LayerResult::kRows;

  // first: the block's number of the batch's first tile.
  __device__ void locate(const ProjectPhase& p, const LayerProgram& program, int first, int batch) {
    const int own = threadIdx.x / kOutputs;
    const int t = threadIdx.x % kOutputs / kLayerTileRows;
    const int row = threadIdx.x % kLayerTileRows;
    const int tile = blockIdx.x + (first + own) * gridDim.x;
    to = nullptr;
    if (own >= batch || tile >= p.tiles || t >= program.rows) return;
    const LayerSegment& s = p.segments[segment_of(p, tile)];
    const int n = (tile - s.first_tile) * kLayerTileRows + row;
    if (n >= s.rows_count) return;
    result = p.accumulate ? LayerResult::kWords : s.result;
    if (result == LayerResult::kWords) {
      uint2* const words = p.accumulate ? p.residual_words : static_cast<uint2*>(s.to);
      to = words + t * (p.accumulate ? program.hidden >> 1 : s.stride) + (n >> 1);
    } else if (result == LayerResult::kRows) {
      to = static_cast<bf16*>(s.to) + static_cast<int64_t>(t) * s.stride + n;
    } else {
      const int place = kRows == 1 ? 0 : wanted_place(program, t);
      if (place >= 0) to = static_cast<float*>(s.to) + static_cast<int64_t>(place) * s.stride + n;
    }
  }
  // Which of the wanted rows the step's row t is, or -1.
  static __device__ int wanted_place(const LayerProgram& program, int t) {
    if (program.wanted == nullptr) return t;
    int place = -1;
#pragma unroll 1
    for (int i = 0; i < program.wanted_count; ++i) {
      if (program.wanted[i] == t) place = i;
    }
    return place;
  }
};

// The part sums of a batch of tiles; with many rows also where the turns that a phase does not have would be staged, as
// no warp stages them before all are past this phase.
struct PartBatch {
  float* parts;
  int tiles;
};
template <bool kFp8, int kRows>
__device__ __forceinline__ PartBatch part_batch(const LayerConsumer& c, int turns) {
  constexpr int kTile = layer_tile_floats(kRows) * static_cast<int>(sizeof(float));
  constexpr int kMost = kLayerConsumers / (kLayerTileRows * kRows);  // one element per thread
  static_assert(layer_batch_tiles(kRows) <= kMost);
  if constexpr (kRows < 4) {
    return {c.buffer<kRows>(), layer_batch_tiles(kRows)};
  } else {
    const int free = c.program.staged_bytes - turns * kStagedTurn<kFp8, kRows>;
    return {c.partial - free / static_cast<int>(sizeof(float)), min(kMost, layer_batch_tiles(kRows) + free / kTile)};
  }
}

// The sums of a batch of tiles.
template <int kRows>
__device__ __forceinline__ void finish_projection(const ProjectPhase& p, LayerConsumer& c,
                                                  const ProjectOutput<kRows>& out, const PartBatch& batch,
                                                  float scale) {
  if (c.warp * kWarp >= batch.tiles * out.kOutputs) return;
  float value = add_element<kRows>(batch.parts, threadIdx.x) * scale;
  if (p.norm_weight != nullptr) {
    value *= inverse_norm(c.shared, threadIdx.x % out.kOutputs / kLayerTileRows, p.k, p.epsilon);
  }
  if (p.accumulate && out.to != nullptr) value = c.residual = round_bf16(c.residual + value);
  float odd;
  if (!pair_up(value, &odd) || out.to == nullptr) return;
  const uint32_t pair = pack_bf16(value, odd);
  if (out.result == LayerResult::kWords) {
    store_word(static_cast<uint2*>(out.to), pair, c.launch);
  } else if (out.result == LayerResult::kRows) {
    *static_cast<uint32_t*>(out.to) = pair;
  } else {
    *static_cast<float2*>(out.to) = {value, odd};
  }
}

// Of the slot whose scales `lane` has, for stream_tiles().
template <bool kFp8, bool kPaired>
__device__ __forceinline__ float2 scale_of_slot(float2 scales, int lane) {
  if constexpr (!kFp8) return {1.0f, 1.0f};
  const float low = __shfl_sync(~0u, scales.x, lane);
  return {low, kPaired ? __shfl_sync(~0u, scales.y, lane) : low};
}

// stream_tiles() of one row. Nothing but the end of the loop branches: where a warp's lanes may part, a tile costs a
// hundred cycles more. So a warp without chunks multiplies what lies there, and stores zeros.
template <bool kFp8, bool kPaired>
__device__ __forceinline__ void stream_row(LayerConsumer& c, int count, int turns, bool active, float2 scales,
                                           int first_lane, float* parts) {
  const int lane = threadIdx.x % kWarp;
  float* to = parts + lane / 4 * layer_partial_stride(1) + c.warp;
  float acc[4] = {};
  Operand<kOperandPieces<kFp8>> operand = {};
  int s = 0;
#pragma unroll 1
  for (int i = 0; i < count * turns; ++i) {
    const float2 scale = scale_of_slot<kFp8, kPaired>(scales, first_lane + i);
    operand.template load<1>(c.staged + s * kStagedTurn<kFp8, 1>, 0, lane, 1);
    int slot;
    const uint32_t chunk = c.wait(&slot);
    multiply_turn<kFp8>(acc, chunk, operand, scale);
    c.release(slot);
    const bool last = ++s == turns;
    if (last && lane % 4 == 0) {
      to[0] = active ? acc[0] : 0.0f;
      to[8 * layer_partial_stride(1)] = active ? acc[2] : 0.0f;
    }
    to = last ? to + layer_tile_floats(1) : to;
    s = last ? 0 : s;
#pragma unroll
    for (float& value : acc) value = last ? 0.0f : value;
  }
}

// A warp without chunks, of several rows: zeros.
template <int kRows>
__device__ __forceinline__ void skip_tiles(LayerConsumer& c, int count, int turns, float* parts) {
  const float zeros[4] = {};
#pragma unroll 1
  for (int i = 0; i < count; ++i, parts += layer_tile_floats(kRows)) {
#pragma unroll 1
    for (int s = 0; s < turns; ++s) {
      int slot;
      c.wait(&slot);
      c.release(slot);
    }
    c.begin_batch<kRows>();
    store_parts<kRows>(parts, c.warp, zeros);
  }
}

// stream_tiles() of several rows by a warp that has chunks, whose loops do not branch either.
template <bool kFp8, int kRows, bool kPaired, int kTurns>
__device__ __forceinline__ void stream_turns(LayerConsumer& c, int count, float2 scales, int first_lane, float* parts) {
  const int lane = threadIdx.x % kWarp;
  Operand<kOperandPieces<kFp8>> operand = {};
  if constexpr (kTurns == 1) operand.template load<kRows>(c.staged, 0, lane, c.rows);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    float acc[4] = {};
#pragma unroll
    for (int s = 0; s < kTurns; ++s) {
      const float2 scale = scale_of_slot<kFp8, kPaired>(scales, first_lane + i * kTurns + s);
      if constexpr (kTurns > 1) operand.template load<kRows>(c.staged + s * kStagedTurn<kFp8, kRows>, 0, lane, c.rows);
      int slot;
      const uint32_t chunk = c.wait(&slot);
      multiply_turn<kFp8>(acc, chunk, operand, scale);
      c.release(slot);
    }
    c.begin_batch<kRows>();
    store_parts<kRows>(parts, c.warp, acc);
    parts += layer_tile_floats(kRows);
  }
}

// Multiplies this warp's chunks of `count` tiles of the kernel's own type and leaves the part sums in `parts`. Lane
// (first_lane + i * turns + s) has the scales of tile i's turn s; kPaired: rows 8 to 15 have scales of their own.
template <bool kFp8, int kRows, bool kPaired>
__device__ __forceinline__ void stream_tiles(LayerConsumer& c, int count, int turns, bool active, float2 scales,
                                             int first_lane, float* parts) {
  static_assert(layer_max_turns(true) == 2 && layer_max_turns(false) == 4);
  if constexpr (kRows == 1) {
    stream_row<kFp8, kPaired>(c, count, turns, active, scales, first_lane, parts);
  } else if (!active) {
    skip_tiles<kRows>(c, count, turns, parts);
  } else if (turns == 1) {
    stream_turns<kFp8, kRows, kPaired, 1>(c, count, scales, first_lane, parts);
  } else if (kFp8 || turns == 2) {
    stream_turns<kFp8, kRows, kPaired, 2>(c, count, scales, first_lane, parts);
  } else {
    stream_turns<kFp8, kRows, kPaired, 4>(c, count, scales, first_lane, parts);
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
  c.begin_batch<kRows>();
  store_parts<kRows>(parts, c.warp, acc);
}

__device__ __forceinline__ int tiles_of_block(int tiles) {
  int count = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) ++count;
  return count;
}

// The tiles whose scales the lanes hold: as many as there are lanes for all their turns.
struct HeldTiles {
  int first = 0;

  // Whether the lanes must fetch, from the batch's first tile on.
  __device__ bool renew(int batch_first, int batch_tiles, int log_turns) {
    const bool fetches = batch_first == 0 || batch_first + batch_tiles > first + (kWarp >> log_turns);
    if (fetches) first = batch_first;
    return fetches;
  }
};

template <bool kFp8, int kRows>
__device__ __forceinline__ void consume_project(const ProjectPhase& p, LayerConsumer& c) {
  const int lane = threadIdx.x % kWarp;
  const int turns = p.turns;
  const int log_turns = turns >> 1;  // 1, 2 or 4 turns
  const bool active = c.warp < p.warps;
  const int own = tiles_of_block(p.own_tiles);
  const int all = kFp8 ? tiles_of_block(p.tiles) : own;
  RowSquares<kRows> squares;
  float scales = 1.0f;
  HeldTiles held;
  int first = 0;
  do {
    const PartBatch batch = part_batch<kFp8, kRows>(c, turns);
    if constexpr (kFp8) {
      const bool fetches = held.renew(first, batch.tiles, log_turns);
      const int tile = blockIdx.x + (first + (lane >> log_turns)) * gridDim.x;
      if (fetches && active && tile < p.own_tiles) {
        scales = project_scale(p, tile, c.warp * turns + (lane & (turns - 1)));
      }
    }
    ProjectOutput<kRows> out;
    if constexpr (kRows == 1) out.locate(p, c.program, first, batch.tiles);
    if (first == 0 && active) {
      const LayerInput in = {p.words, p.rows, p.row_stride, p.k, p.turns, p.squares, p.epsilon};
      stage_input<kFp8, kRows, true>(
          in, p.norm_weight, c, squares, [](int) {}, [](int, int, const float(&)[kLaneValues<kFp8>]) {});
      c.mark(1);
    }
    // Later than a single row's, as the rows' loads take all registers.
    if constexpr (kRows > 1) out.locate(p, c.program, first, batch.tiles);
    const int count = max(min(batch.tiles, own - first), 0);
    float* const parts = batch.parts;
    stream_tiles<kFp8, kRows, false>(c, count, turns, active, {scales, scales}, (first - held.first) << log_turns,
                                     parts);
    if constexpr (kFp8) {
#pragma unroll 1
      for (int i = count; i < min(batch.tiles, all - first); ++i) {
        stream_wide_tile<kRows>(c, 2 * turns, active, parts + i * layer_tile_floats(kRows));
      }
    }
    if (first == 0 && p.norm_weight != nullptr) squares.publish(c);
    c.mark(2);
    consumer_barrier();
    c.mark(3);
    finish_projection<kRows>(p, c, out, batch, kFp8 ? 1.0f / kLayerStagedScale : 1.0f);
    c.end_batch<kRows>();
    first += batch.tiles;
  } while (first < all);
  c.mark(4);
  if (p.tail >= 0) store_tails(c.shared.phases[p.tail].mixer, c);
}

// ---- router ----

// The router's rows of a block, neighbouring ones: the last blocks, which may come late to a launch, have none.
struct RouterRows {
  int first;
  int count;
  __device__ explicit RouterRows(const RouterPhase& p)
      : first(static_cast<int>(blockIdx.x) * p.block_rows),
        count(min(p.block_rows, p.experts + (p.gate != nullptr) - first)) {}
};

// The rows' weights of this lane's columns: those of all turns, or of one.
template <bool kFp8, int kRows, int kPass>
struct RouterWeights {
  static constexpr int kTurns = kRows == 1 ? layer_max_turns(kFp8) : 1;
  LanePairs<kFp8> v[kPass][kTurns] = {};

  // first_row: of the block. turn: the first.
  __device__ void fetch(const RouterPhase& p, const RouterRows& rows, int warp, int first_row, int turn) {
#pragma unroll
    for (int r = 0; r < kPass; ++r) {
      if (first_row + r >= rows.count) break;
      const int output = rows.first + first_row + r;
      const bf16* const row = output < p.experts ? p.weight + static_cast<int64_t>(output) * p.k : p.gate;
#pragma unroll
      for (int s = 0; s < kTurns; ++s) {
        if (s + turn >= p.turns) break;
        const bf16* const from = row + lane_column<kFp8>(warp * p.turns + turn + s);
#pragma unroll
        for (int j = 0; j < kLaneValues<kFp8> / 2; ++j) v[r][s].pair[j] = reinterpret_cast<const uint32_t*>(from)[j];
      }
    }
  }
};

// logits of a block's rows: plain products, as there are no more than a few. The row is staged for gate and up as well.
template <bool kFp8, int kRows, int kKeys>
__device__ __forceinline__ void consume_router(const RouterPhase& p, LayerConsumer& c) {
  constexpr int kBlockRows = layer_router_rows(kKeys);
  constexpr int kPass = kRows == 1 ? kBlockRows : 2;  // rows of the router at a time
  if (kRows == 1 && threadIdx.x == 0) barrier_arrive(shared_address(&c.shared.router_begun));
  const bool active = c.warp < p.warps;
  const RouterRows rows(p);
  uint2* to = nullptr;  // this thread's logit
  if (threadIdx.x < kBlockRows * kRows) {
    const int t = threadIdx.x % kRows;
    const int row = threadIdx.x / kRows;
    if (t < c.rows && row < rows.count) to = p.logits + t * (p.experts + 1) + rows.first + row;
  }
  float* const parts = c.buffer<kRows>();  // of elements: row of the block, row of the step
  c.begin_batch<kRows>();
#pragma unroll 1
  for (int first_row = 0; first_row < kBlockRows; first_row += kPass) {
    if (first_row > 0 && first_row >= rows.count) break;
    RouterWeights<kFp8, kRows, kPass> weights;
    RowSquares<kRows> squares;
    float dots[kPass * kRows] = {};
    if (active) {
      const LayerInput in = {p.words, p.rows, p.row_stride, p.k, p.turns, nullptr, p.epsilon};
      stage_input<kFp8, kRows, false>(
          in, p.norm_weight, c, squares, [&](int turn) { weights.fetch(p, rows, c.warp, first_row, turn); },
          [&](int s, int t, const float(&y)[kLaneValues<kFp8>]) {
#pragma unroll
            for (int r = 0; r < kPass; ++r) {
#pragma unroll
              for (int j = 0; j < kLaneValues<kFp8>; ++j) dots[r * kRows + t] += y[j] * weights.v[r][s].value(j);
            }
          });
      c.mark(1);
    }
    squares.publish(c);
    const float sum = warp_sums(dots);
    if (is_lane_of_sum<kPass * kRows>()) {
      const int element = first_row * kRows + sum_of_lane<kPass * kRows>();
      parts[element * layer_partial_stride(kRows) + part_place<kRows>(element, c.warp)] = sum;
    }
  }
  c.mark(2);
  consumer_barrier();
  c.mark(3);
  if (to != nullptr) {
    const float sum = add_element<kRows>(parts, threadIdx.x);
    store_word(to, __float_as_uint(sum * inverse_norm(c.shared, threadIdx.x % kRows, p.k, p.epsilon)), c.launch);
  }
  c.mark(4);
  c.end_batch<kRows>();
}

}  // namespace tokenspeed::kernels::cuda
