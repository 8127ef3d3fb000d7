// Routed and shared experts as phases: gate and up with the router's choice as prologue, then down.
#pragma once

#include "kernels/cuda/decode_phase.cuh"

namespace tokenspeed::kernels::cuda {

inline constexpr int kUnitRows = kTileRows / 2;  // rows of h per tile: 8 gate rows and the matching 8 up rows

// ---- gate and up ----

// The block's tiles: those of the shared expert, then each chosen expert's.
struct UnitPlace {
  int entry = -1;  // -1: shared
  int tile;
  __device__ UnitPlace(const GateUpPhase& p) : tile(blockIdx.x) { settle(p.shared_tiles, p.routed_tiles); }
  __device__ void next(const GateUpPhase& p) {
    tile += gridDim.x;
    settle(p.shared_tiles, p.routed_tiles);
  }

 private:
  __device__ void settle(int shared_tiles, int routed_tiles) {
    if (entry < 0) {
      if (tile < shared_tiles) return;
      tile -= shared_tiles;
      entry = 0;
    }
    if (routed_tiles == 0) return;
    while (tile >= routed_tiles) {
      tile -= routed_tiles;
      ++entry;
    }
  }
};

__device__ __forceinline__ void produce_gate_up(const GateUpPhase& p, PhaseShared& s, uint32_t routed_parity,
                                                RingProducer& ring) {
  const int lane = threadIdx.x % kWarp;
  const int own_row = ring.warp() * kProducerRows + lane % kProducerRows;
  const bool fp8 = p.input.fp8;
  const int row_bytes = fp8 ? p.input.k : 2 * p.input.k;
  const int columns = (p.input.k + 127) / 128;
  bool known = p.router.logits == nullptr;
  int entries = 0;
  for (UnitPlace unit(p);; unit.next(p)) {
    if (unit.entry >= 0 && !known) {
      barrier_wait(shared_address(&s.routed), routed_parity);
      known = true;
      entries = s.routing.count;
    }
    if (unit.entry >= entries) break;
    const ExpertWeights& m = unit.entry < 0 ? p.shared : p.routed;
    const int expert = unit.entry < 0 ? 0 : s.routing.distinct[unit.entry];
    const auto first_row = [&](int half) { return half * m.width + unit.tile * kUnitRows; };  // gate, up
    const uint8_t* const row =
        m.data +
        (static_cast<int64_t>(expert) * 2 * m.width + first_row(own_row / kUnitRows) + own_row % kUnitRows) * row_bytes;
    const float* scale = nullptr;
    if (fp8 && lane < 2 * kPieceBlocks) {
      const int block = first_row(lane / kPieceBlocks) / 128;
      scale = m.scale + (static_cast<int64_t>(expert) * ((2 * m.width + 127) / 128) + block) * columns +
              lane % kPieceBlocks;
    }
    for (int column = 0; column < row_bytes; column += kPieceRow) {
      const int bytes = min(kPieceRow, row_bytes - column);
      ring.open(kProducerRows * bytes);
      if (lane < kProducerRows) ring.copy(piece_row(own_row), row + column, bytes);
      ring.copy_scale(scale != nullptr && lane % kPieceBlocks * 128 < bytes ? scale + column / 128 : nullptr);
      ring.close();
    }
  }
  // The next phase needs the choice even where this one had no use for it.
  if (!known) barrier_wait(shared_address(&s.routed), routed_parity);
}

template <int kRows>
__device__ __forceinline__ void stage_and_route(const GateUpPhase& p, const NormWeights& norm, Consumer& c) {
  Routing& routing = c.shared.routing;
  if (p.router.logits == nullptr) {
    stage_rows<kRows>(p.input, norm, c.staged, c.shared.sums);
    return;
  }
  stage_plain(p.input, c.staged, kRows);  // the first warps choose meanwhile
  if constexpr (kRows == 1) {
    if (threadIdx.x < kWarp) {
      choose_experts(p.router, routing, 0);
      list_one_row(p.router, routing);
      if (threadIdx.x == 0) barrier_arrive(shared_address(&c.shared.routed));
    }
    consumer_barrier();
  } else {
    route_rows(p.router, p.input.rows, routing);
    if (threadIdx.x == 0) barrier_arrive(shared_address(&c.shared.routed));
  }
  if (p.expert_ids == nullptr || blockIdx.x != 0) return;
  for (int i = threadIdx.x; i < p.input.rows * p.router.top_k; i += kStreamThreads) {
    p.expert_ids[i] = routing.ids[i];
    p.expert_weights[i] = routing.weights[i];
  }
}

template <int kRows>
__device__ __forceinline__ void consume_gate_up(const GateUpPhase& p, Consumer& c) {
  constexpr int kTileFloats = kTileRows * kRows;
  constexpr int kOutputs = kUnitRows * kRows;
  constexpr int kSlots = partial_tiles(kRows);
  const int lane = threadIdx.x % kWarp;
  const bool fp8 = p.input.fp8;
  const int row_bytes = fp8 ? p.input.k : 2 * p.input.k;
  const int places = p.router.top_k + 1;
  float* const partial = reinterpret_cast<float*>(c.staged + kRows * staged_row_bytes(p.input.k));
  NormWeights norm;
  norm.fetch(p.input.norm_weight, p.input.k);
  c.grid.wait();
  stage_and_route<kRows>(p, norm, c);
  const Routing& routing = c.shared.routing;
  const int entries = p.router.logits != nullptr ? routing.count : 0;

  const bool active = lane / 4 < p.input.rows;
  const uint32_t x = shared_address(c.staged) + lane / 4 * staged_row_bytes(p.input.k);
  const float scale = unstage_scale(fp8);
  UnitPlace unit(p), done(p);
  for (int slot = 0; unit.entry < entries;) {
    multiply_tile<kRows>(c.ring, row_bytes, fp8, fp8, x, active, partial + slot * kStreamWarps * kTileFloats);
    unit.next(p);
    const bool more = unit.entry < entries;
    if (++slot < kSlots && more) continue;
    consumer_barrier();
    // silu(gate) * up. Every thread follows the block's units to its own ones.
    for (int i = 0; i < slot; ++i, done.next(p)) {
      const int element = static_cast<int>(threadIdx.x) - i * kOutputs;
      const int t = element % kRows;
      if (element < 0 || element >= kOutputs || t >= p.input.rows) continue;
      const int place = done.entry < 0 ? p.router.top_k : routing.slot[done.entry][t];
      if (place < 0) continue;
      const float* const from = partial + i * kStreamWarps * kTileFloats + element;
      const float gate = add_parts<kRows>(from, row_bytes) * scale;
      const float up = add_parts<kRows>(from + kOutputs, row_bytes) * scale;
      p.h[static_cast<int64_t>(t * places + place) * p.h_width + done.tile * kUnitRows + element / kRows] =
          __float2bfloat16_rn(silu(gate) * up);
    }
    if (more) consumer_barrier();
    slot = 0;
  }
}

// ---- down ----
//
// A block owns tiles of 16 rows of the result. A piece holds the rows of as many experts as fit into 1024 bytes (or
// 1024 bytes of one's); an expert's row is a power of two of bytes. A row of the step adds its own
// entries' parts in the order of its choices, whatever the others chose.

struct DownShape {
  int log_row_bytes;  // of one expert's row, a power of two
  int row_bytes;
  int log_chunks;
  int places;
  __device__ explicit DownShape(const DownPhase& p)
      : log_row_bytes(p.log_row_bytes),
        row_bytes(1 << log_row_bytes),
        log_chunks(log_row_bytes - 6),
        places(p.router.top_k + 1) {
    static_assert(kChunkBytes == 1 << 6);
  }
};

__device__ __forceinline__ void produce_down(const DownPhase& p, const PhaseShared& s, RingProducer& ring) {
  const DownShape shape(p);
  const int lane = threadIdx.x % kWarp;
  const int routed = p.router.logits != nullptr ? s.routing.count : 0;
  const int entries = routed + (p.shared.data != nullptr);
  const int columns = (p.width + 127) / 128;
  const auto weights = [&](int entry) -> const ExpertWeights& { return entry == routed ? p.shared : p.routed; };
  const auto expert = [&](int entry) -> int64_t { return entry == routed ? 0 : s.routing.distinct[entry]; };
  for (int tile = blockIdx.x; tile < p.hidden / kTileRows; tile += gridDim.x) {
    const int own_row = ring.warp() * kProducerRows + lane % kProducerRows;
    const int row = tile * kTileRows + own_row;
    for (int begin = 0; begin < (entries << shape.log_row_bytes); begin += kPieceRow) {
      const int end = min(begin + kPieceRow, (entries << shape.log_row_bytes));
      ring.open(kProducerRows * (end - begin));
      // The eighths of the warp take every eighth entry of the piece.
      const int step = min(shape.row_bytes, kPieceRow);
      for (int at = begin + lane / kProducerRows * step; at < end; at += kWarp / kProducerRows * step) {
        const int entry = at >> shape.log_row_bytes;
        const uint8_t* const from = weights(entry).data + (expert(entry) * p.hidden + row) * shape.row_bytes;
        ring.copy(piece_row(own_row) + at - begin, from + (at & (shape.row_bytes - 1)), min(step, end - at));
      }
      const float* scale = nullptr;
      const int at = begin + lane % kPieceBlocks * 128;
      if (p.fp8 && lane < 2 * kPieceBlocks && at < end) {
        const int entry = at >> shape.log_row_bytes;
        scale = weights(entry).scale + (expert(entry) * ((p.hidden + 127) / 128) + tile * kTileRows / 128) * columns +
                (at & (shape.row_bytes - 1)) / 128;
      }
      ring.copy_scale(scale);
      ring.close();
    }
  }
}

// A warp's run of chunks within one entry is one part of its sum.
__host__ __device__ constexpr int down_parts(int chunks) { return (chunks + kWarpChunks - 1) / kWarpChunks; }
inline int down_phase_bytes(int rows, int top_k, int64_t width, bool fp8) {
  const int chunks = static_cast<int>(width * (fp8 ? 1 : 2)) / kChunkBytes;
  return rows * (top_k + 1) * (staged_row_bytes(static_cast<int>(width)) + down_parts(chunks) * kTileRows * 4);
}

template <int kCount>
__device__ __forceinline__ void multiply_run(float (&acc)[4], const uint8_t* piece, int chunk, bool fp8, uint32_t x,
                                             bool active) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    multiply_chunk(acc, piece, chunk + i, fp8, fp8, x + i * kChunkBytes * (fp8 ? 2 : 1), active);
  }
}

// This warp's chunks of a piece at byte `begin` of the entries' rows.
template <int kRows>
__device__ __forceinline__ void multiply_down_piece(const DownPhase& p, const DownShape& shape, const Routing& routing,
                                                    int routed, int entries, const uint8_t* piece, int begin,
                                                    uint32_t staged, float* partial) {
  const int lane = threadIdx.x % kWarp;
  const int first = threadIdx.x / kWarp % kQuadWarps * kWarpChunks;
  const int row_bytes = staged_row_bytes(p.width);
  const int chunks = 1 << shape.log_chunks;
  const int run = min(kWarpChunks, chunks);
  for (int i = 0; i < kWarpChunks; i += run) {
    const int item = begin / kChunkBytes + first + i;
    const int entry = item >> shape.log_chunks;
    if (entry >= entries) break;
    const auto place_of = [&](int column) -> int {
      return column >= p.rows ? -1 : entry == routed ? p.router.top_k : routing.slot[entry][column];
    };
    const int column = lane / 4;
    const int place = place_of(column);
    const int chunk = item & (chunks - 1);
    const uint32_t x = staged + (column * shape.places + place) * row_bytes + chunk * kChunkBytes * (p.fp8 ? 2 : 1);
    float acc[4] = {};
    if (run == kWarpChunks) {
      multiply_run<kWarpChunks>(acc, piece, first, p.fp8, x, place >= 0);
    } else {
      for (int j = 0; j < run; ++j) {
        multiply_run<1>(acc, piece, first + i + j, p.fp8, x + j * kChunkBytes * (p.fp8 ? 2 : 1), place >= 0);
      }
    }
    // acc is of rows lane / 4 and + 8, columns lane % 4 * 2 and + 1.
    const int parts = down_parts(chunks);
    const int part = chunk / kWarpChunks;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int of = lane % 4 * 2 + k;
      if (of >= kRows) break;
      const int to = place_of(of);
      if (to < 0) continue;
      float* const sum = partial + ((of * shape.places + to) * parts + part) * kTileRows + lane / 4;
      sum[0] = acc[k];
      sum[8] = acc[2 + k];
    }
  }
}

template <int kRows>
__device__ __forceinline__ void consume_down(const DownPhase& p, Consumer& c) {
  const DownShape shape(p);
  const int row_bytes = staged_row_bytes(p.width);
  const Routing& routing = c.shared.routing;
  const int routed = p.router.logits != nullptr ? routing.count : 0;
  const int entries = routed + (p.shared.data != nullptr);
  const int parts = down_parts(1 << shape.log_chunks);
  // [row of the step][place][part][16]
  float* const partial = reinterpret_cast<float*>(c.staged + p.rows * shape.places * row_bytes);
  const int t = threadIdx.x / kTileRows;
  const bool has_output = t < p.rows;
  const auto output = [&](int tile) {
    return p.y + static_cast<int64_t>(t) * p.y_stride + tile * kTileRows + threadIdx.x % kTileRows;
  };
  const int tiles = p.hidden / kTileRows;
  c.grid.wait();

  float old = 0;
  float gate = 1;
  if (has_output) {
    if (p.accumulate && static_cast<int>(blockIdx.x) < tiles) old = load_coherent(output(blockIdx.x));
    if (p.gate_logit != nullptr) gate = sigmoid(__ldcg(p.gate_logit + static_cast<int64_t>(t) * p.gate_stride));
  }
  const int vectors = p.width / 8;
  for (int of = threadIdx.x / kWarp; of < p.rows * shape.places; of += kStreamWarps) {
    for (int i = threadIdx.x % kWarp; i < vectors; i += kWarp) {
      uint4 raw = load16_coherent(p.h + (static_cast<int64_t>(of) * vectors + i) * 8);
      if (p.fp8) raw = stage_for_fp8(raw);
      *reinterpret_cast<uint4*>(c.staged + of * row_bytes + i * 16) = raw;
    }
  }
  consumer_barrier();

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int bytes = entries << shape.log_row_bytes;
    for (int begin = c.ring.turn() * kPieceRow; begin < bytes; begin += kQuads * kPieceRow) {
      const uint8_t* const piece = c.ring.wait();
      multiply_down_piece<kRows>(p, shape, routing, routed, entries, piece, begin, shared_address(c.staged), partial);
      c.ring.release();
    }
    c.ring.passed((bytes + kPieceRow - 1) / kPieceRow);
    consumer_barrier();
    if (has_output) {
      const float scale = unstage_scale(p.fp8);
      const auto product = [&](int place) {
        const float* const from = partial + (t * shape.places + place) * parts * kTileRows + threadIdx.x % kTileRows;
        float sum = 0;
        for (int part = 0; part < parts; ++part) sum += from[part * kTileRows];
        return sum * scale;
      };
      float sum = 0;
#pragma unroll 4
      for (int i = 0; i < p.router.top_k; ++i) sum += routing.weights[t * p.router.top_k + i] * product(i);
      if (p.shared.data != nullptr) sum += gate * product(p.router.top_k);
      if (p.accumulate && tile != static_cast<int>(blockIdx.x)) old = load_coherent(output(tile));
      *output(tile) = __float2bfloat16_rn(old + sum);
    }
    if (tile + static_cast<int>(gridDim.x) < tiles) consumer_barrier();
  }
}

}  // namespace tokenspeed::kernels::cuda
