// A projection as a phase: tiles of all segments are dealt to the blocks in turn.
#pragma once

#include "kernels/cuda/decode_phase.cuh"
#include "kernels/cuda/decode_phase_gdn.cuh"

namespace tokenspeed::kernels::cuda {

// Tile `tile` of the phase: rows [row, row + 16) of a segment.
struct LinearTile {
  int segment;
  int row;
  __device__ LinearTile(const LinearPhase& p, int tile) {
    const int4 first = p.first_tile;
    segment = (tile >= first.y) + (tile >= first.z) + (tile >= first.w);
    row = (tile - (segment == 0 ? 0 : segment == 1 ? first.y : segment == 2 ? first.z : first.w)) * kTileRows;
  }
};

__device__ __forceinline__ void produce_linear(const LinearPhase& p, RingProducer& ring) {
  const int lane = threadIdx.x % kWarp;
  const int own_row = ring.warp() * kProducerRows + lane % kProducerRows;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const LinearTile tile(p, index);
    const LinearSegment& s = p.segments[tile.segment];
    const int row_bytes = s.row_bytes;
    const uint8_t* const row = s.weight + static_cast<int64_t>(tile.row + own_row) * row_bytes;
    const bool has_row = tile.row + own_row < s.n;
    const int rows = max(0, min(kProducerRows, s.n - tile.row - ring.warp() * kProducerRows));
    const float* const scale =
        s.fp8 ? s.scale + tile.row / 128 * ((row_bytes + 127) / 128) + lane % kPieceBlocks : nullptr;
    for (int column = 0; column < row_bytes; column += kPieceRow) {
      const int bytes = min(kPieceRow, row_bytes - column);
      ring.open(rows * bytes);
      if (lane < kProducerRows && has_row) ring.copy(piece_row(own_row), row + column, bytes);
      ring.copy_scale(scale != nullptr && lane % kPieceBlocks * 128 < bytes ? scale + column / 128 : nullptr);
      ring.close();
    }
  }
}

// The gated norm over heads of 128 of the mixer's o, rounded to bfloat16, as input of a product.
template <int kRows>
__device__ __forceinline__ void stage_gated(const LinearPhase& p, uint8_t* staged) {
  constexpr int kHead = 128;
  const StagedInput& in = p.input;
  const int vectors = in.k / 8;
  const int row_bytes = staged_row_bytes(in.k);
  float weight[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) weight[i] = p.gated_weight[threadIdx.x * 8 % kHead + i];
  for (int t = 0; t < in.rows; ++t) {
    // k is a multiple of 128, so the 16 lanes of a head run together.
    for (int vector = threadIdx.x; vector < (vectors + kWarp - 1) / kWarp * kWarp; vector += kStreamThreads) {
      const bool inside = vector < vectors;
      uint4 raw = {}, gate = {};
      if (inside) {
        raw = load16_coherent(in.x + t * in.stride + vector * 8);
        gate = load16_coherent(p.z + static_cast<int64_t>(t) * p.z_stride + vector * 8);
      }
      float v[8], z[8];
      unpack8(raw, v);
      unpack8(gate, z);
      float squares = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
#pragma unroll
      for (int offset = 1; offset < kHead / 8; offset *= 2) squares += __shfl_xor_sync(~0u, squares, offset);
      const float inverse = rsqrtf(squares / kHead + in.epsilon);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = weight[i] * v[i] * inverse * silu(z[i]);
      const uint4 rounded = {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                             pack_bf16(v[6], v[7])};
      if (inside) {
        *reinterpret_cast<uint4*>(staged + t * row_bytes + vector * 16) = in.fp8 ? stage_for_fp8(rounded) : rounded;
      }
    }
  }
  consumer_barrier();
}

struct LinearOutput {
  void* at;
  int row_bytes;
  bool is_float;
  bool accumulate;
};
// Where element (row, t) of the tile goes; at is null where there is none.
__device__ __forceinline__ LinearOutput locate(const LinearPhase& p, int index, int row, int t) {
  if (index >= p.tiles || t >= p.input.rows) return {nullptr, 0, false, false};
  const LinearTile tile(p, index);
  const LinearSegment& s = p.segments[tile.segment];
  const int n = tile.row + row;
  if (n >= s.n) return {nullptr, 0, false, false};
  const int64_t at = static_cast<int64_t>(t) * s.y_stride + n;
  void* const y = s.y_float ? static_cast<void*>(static_cast<float*>(s.y) + at) : static_cast<bf16*>(s.y) + at;
  return {y, s.row_bytes, s.y_float, s.accumulate};
}
__device__ __forceinline__ float load_output(const LinearOutput& y) {
  return y.is_float ? __ldcg(static_cast<const float*>(y.at)) : load_coherent(static_cast<const bf16*>(y.at));
}

__device__ __forceinline__ void store_output(const LinearOutput& y, float sum) {
  if (y.is_float) {
    *static_cast<float*>(y.at) = sum;
  } else {
    *static_cast<bf16*>(y.at) = __float2bfloat16_rn(sum);
  }
}

template <int kRows>
__device__ __forceinline__ void consume_linear(const LinearPhase& p, Consumer& c) {
  constexpr int kTileFloats = kTileRows * kRows;
  constexpr int kSlots = partial_tiles(kRows);
  const int thread = threadIdx.x;
  const int lane = thread % kWarp;
  const int blocks = gridDim.x;
  float* const partial = reinterpret_cast<float*>(c.staged + kRows * staged_row_bytes(p.input.k));
  NormWeights norm;
  norm.fetch(p.input.norm_weight, p.input.k);
  GdnTails tails;
  const GdnPhase* const mixer = p.tail >= 0 ? &c.shared.phases[p.tail].gdn : nullptr;
  if (mixer != nullptr) tails.fetch(*mixer, c, 0);
  // This thread's output among the block's first tiles.
  LinearOutput y = {};
  if (thread < kSlots * kTileFloats) {
    y = locate(p, blockIdx.x + thread / kTileFloats * blocks, thread / kRows % kTileRows, thread % kRows);
  }

  c.grid.wait();
  float old = y.at != nullptr && y.accumulate ? load_output(y) : 0.0f;
  if (p.z != nullptr) {
    stage_gated<kRows>(p, c.staged);
  } else {
    stage_rows<kRows>(p.input, norm, c.staged, c.shared.sums);
  }
  if (mixer != nullptr) tails.store();

  const bool active = lane / 4 < p.input.rows;
  const uint32_t x = shared_address(c.staged) + lane / 4 * staged_row_bytes(p.input.k);
  const float scale = unstage_scale(p.input.fp8);
  int slot = 0;
  int batch = blockIdx.x;
  for (int index = blockIdx.x; index < p.tiles; index += blocks) {
    const LinearSegment& s = p.segments[LinearTile(p, index).segment];
    multiply_tile<kRows>(c.ring, s.row_bytes, s.fp8, p.input.fp8, x, active,
                         partial + slot * kStreamWarps * kTileFloats);
    const bool more = index + blocks < p.tiles;
    if (++slot < kSlots && more) continue;
    consumer_barrier();
    for (int i = thread; i < slot * kTileFloats; i += kStreamThreads) {
      if (batch != static_cast<int>(blockIdx.x) || i >= kStreamThreads) {
        y = locate(p, batch + i / kTileFloats * blocks, i / kRows % kTileRows, i % kRows);
        old = y.at != nullptr && y.accumulate ? load_output(y) : 0.0f;
      }
      if (y.at == nullptr) continue;
      const float* const from = partial + i / kTileFloats * kStreamWarps * kTileFloats + i % kTileFloats;
      store_output(y, old + add_parts<kRows>(from, y.row_bytes) * scale);
    }
    if (more) consumer_barrier();
    slot = 0;
    batch = index + blocks;
  }
  if (mixer != nullptr) tails.rest(*mixer, c);
}

}  // namespace tokenspeed::kernels::cuda
