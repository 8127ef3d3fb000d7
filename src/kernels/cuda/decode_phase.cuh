// The persistent kernel's common parts: what a phase is, the ring of weights, the barrier of the grid.
//
// One block per multiprocessor: 16 warps that compute (consumers) and 4 that copy (producers; one alone cannot issue
// copies as fast as memory serves them). A step's phases follow each other behind grid barriers, but the producers know
// every phase's weights beforehand (but the experts', which they learn from the router's result) and keep the ring full
// across the barriers, so memory does not wait for them.
//
// The ring's slots hold a piece each: 1024 bytes of k of 16 weight rows and their scales,
//
//     row 0:  | 64 bytes: chunk 0 | chunk 1 | ... | chunk 15 |
//     row 1:  | ...                                           64 bytes on, against bank conflicts; then the next pair
//     scales: rows 0..7 [8 column blocks], rows 8..15 [8]
//
// A piece is the work of four warps (a quad), four chunks each (decode_stream.cuh), so four pieces are worked on at a
// time; piece i of all is quad i % 4's, and the number of slots is a multiple of 4, so a slot serves one quad. Piece p
// of a tile adds to part sum p % 4, whichever quad computes it: a sum does not depend on where in the list a tile
// stands. Tiles are dealt to the blocks in turn.
#pragma once

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_routing.cuh"
#include "kernels/cuda/decode_stream.cuh"

namespace tokenspeed::kernels::cuda {

inline constexpr int kProducerWarps = 4;
inline constexpr int kPhaseThreads = kStreamThreads + kProducerWarps * kWarp;
inline constexpr int kProducerRows = kTileRows / kProducerWarps;  // of a piece, copied by one producer
inline constexpr int kPieceRow = 1024;
inline constexpr int kPiecePair = 2 * kPieceRow + 64;
inline constexpr int kPieceBytes = kTileRows / 2 * kPiecePair;
__device__ __forceinline__ int piece_row(int row) { return row / 2 * kPiecePair + row % 2 * (kPieceRow + 64); }
inline constexpr int kPieceBlocks = kPieceRow / 128;  // column blocks of FP8 scales
inline constexpr int kSlotBytes = kPieceBytes + 2 * kPieceBlocks * 4;
inline constexpr int kMaxSlots = 12;
inline constexpr int kQuads = 4;
inline constexpr int kQuadWarps = kStreamWarps / kQuads;
inline constexpr int kWarpChunks = kPieceRow / kChunkBytes / kQuadWarps;  // of a piece
// Tiles of a block whose sums wait to be added together. columns: rows of the step, rounded up to a power of two.
__host__ __device__ constexpr int partial_tiles(int columns) { return columns == 1 ? 6 : columns == 2 ? 4 : 2; }
// Staged by a phase that streams tiles of 16 rows: the input rows, then partial sums.
__host__ __device__ constexpr int streaming_phase_bytes(int columns, int k) {
  return columns * staged_row_bytes(k) + partial_tiles(columns) * kStreamWarps * kTileRows * columns * 4;
}

// ---- phases ----

struct LinearSegment {
  const uint8_t* weight;
  const float* scale;
  void* y;
  int y_stride;
  int n;
  int row_bytes;
  bool fp8;
  bool y_float;
  bool accumulate;
};
struct LinearPhase {
  StagedInput input;
  // The gated norm of the mixer before: x is o, z the gate; null: none.
  const bf16* z;
  const float* gated_weight;
  int z_stride;
  int tail;  // phase of the mixer whose conv tails this one writes, or -1
  int tiles;
  int4 first_tile;  // of each segment; tiles where there is none
  LinearSegment segments[kDecodeSegments];
};
struct GdnPhase {
  std::byte* recurrent;
  std::byte* conv;
  int64_t slot_stride;
  const bf16* qkv;
  const bf16* b;
  const bf16* a;
  const float* conv_weight;
  const float* a_log;
  const float* dt_bias;
  bf16* o;
  int qkv_stride;
  int b_stride;
  int a_stride;
  int o_stride;
  int key_heads;
  int value_heads;
};
struct ExpertWeights {
  const uint8_t* data;
  const float* scale;
  int width;
};
struct GateUpPhase {
  StagedInput input;
  RouterParameters router;
  ExpertWeights routed;
  ExpertWeights shared;
  int shared_tiles;
  int routed_tiles;  // of one expert
  bf16* h;
  int h_width;
  int32_t* expert_ids;
  float* expert_weights;
};
struct DownPhase {
  RouterParameters router;
  ExpertWeights routed;
  ExpertWeights shared;
  const float* gate_logit;
  int gate_stride;
  const bf16* h;
  int rows;
  int width;  // of h, of every expert and of the shared one
  int log_row_bytes;
  int hidden;
  bf16* y;
  int y_stride;
  bool fp8;
  bool accumulate;
};
enum class PhaseKind : int { kLinear, kGdn, kGateUp, kDown };
struct Phase {
  PhaseKind kind;
  union {
    LinearPhase linear;
    GdnPhase gdn;
    GateUpPhase gate_up;
    DownPhase down;
  };
};

inline constexpr int kPhasesPerLaunch = 24;
struct PhaseProgram {
  SequenceBatch batch;
  unsigned* counters;  // arrivals at the barrier, blocks that have finished; zero between launches
  int slots;
  int staged_bytes;  // of the largest phase
  int phase_count;
  Phase phases[kPhasesPerLaunch];
};

// ---- shared memory ----

struct PhaseShared {
  alignas(8) uint64_t full[kMaxSlots];
  uint64_t empty[kMaxSlots];
  uint64_t routed;
  int token_begin[kDecodeTokens + 1];
  int state_in[kDecodeTokens];
  int state_out[kDecodeTokens];
  float sums[kStageSums];
  Routing routing;
  int described;  // phases[0, described) are there
  Phase phases[kPhasesPerLaunch];
};

// A phase's description, read in many places and at different times: from the parameters it would be a constant cache
// miss each time, so the first producer copies it ahead.
__device__ __forceinline__ void describe_phase(const PhaseProgram& program, PhaseShared& s, int index) {
  const auto* const from = reinterpret_cast<const uint32_t*>(&program.phases[index]);
  auto* const to = reinterpret_cast<uint32_t*>(&s.phases[index]);
  const int lane = threadIdx.x % kWarp;
  for (int i = lane; i < static_cast<int>(sizeof(Phase) / 4); i += kWarp) to[i] = from[i];
  __syncwarp();
  if (lane != 0) return;
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(shared_address(&s.described)), "r"(index + 1) : "memory");
}
__device__ __forceinline__ const Phase& described_phase(const PhaseShared& s, int index) {
  int described;
  do {
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];"
                 : "=r"(described)
                 : "r"(shared_address(&s.described))
                 : "memory");
  } while (described <= index);
  return s.phases[index];
}

// Of the 16 consumer warps.
__device__ __forceinline__ void consumer_barrier() { stream_barrier(); }

// ---- the ring ----

struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  __device__ void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

class RingProducer {
 public:
  __device__ RingProducer(PhaseShared& shared, uint8_t* ring, int slots) : s_(shared), ring_(ring), slots_(slots) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy_));
  }
  __device__ int warp() const { return (threadIdx.x - kStreamThreads) / kWarp; }
  // The whole of every producer warp calls open(), copies and close() once per piece; bytes: of this warp's copies.
  __device__ void open(int bytes) {
    barrier_wait(shared_address(&s_.empty[at_.slot]), at_.parity ^ 1);
    if (threadIdx.x % kWarp == 0) barrier_arrive_expecting(shared_address(&s_.full[at_.slot]), bytes);
    __syncwarp();
  }
  __device__ void copy(int offset, const void* from, int bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(ring_ + at_.slot * kSlotBytes) + offset),
        "l"(from), "r"(bytes), "r"(shared_address(&s_.full[at_.slot])), "l"(policy_)
        : "memory");
  }
  // The first warp's lane g * 8 + b brings the scale of group g's column block b; null: none.
  __device__ void copy_scale(const float* from) {
    const int lane = threadIdx.x % kWarp;
    if (from != nullptr && warp() == 0 && lane < 2 * kPieceBlocks)
      copy4_async(shared_address(ring_ + at_.slot * kSlotBytes) + kPieceBytes + lane * 4, from);
  }
  __device__ void close() {
    if (warp() == 0 && threadIdx.x % kWarp < 2 * kPieceBlocks) {
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&s_.full[at_.slot]))
                   : "memory");
    }
    at_.advance(slots_);
  }

 private:
  PhaseShared& s_;
  uint8_t* ring_;
  int slots_;
  RingPosition at_;
  uint64_t policy_;
};
inline constexpr int kFullArrivals = kProducerWarps + 2 * kPieceBlocks;

// A quad's pieces of the ring.
class RingConsumer {
 public:
  __device__ RingConsumer(PhaseShared& shared, uint8_t* ring, int slots)
      : s_(shared), ring_(ring), slots_(slots), slot_(quad()) {}
  // Which of the next four pieces is this warp's quad's.
  __device__ int turn() const { return (quad() - pieces_) % kQuads; }
  __device__ const uint8_t* wait() {
    barrier_wait(shared_address(&s_.full[slot_]), parity_);
    return ring_ + slot_ * kSlotBytes;
  }
  // The warp is done with the piece it waited for.
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(shared_address(&s_.empty[slot_]));
    if ((slot_ += kQuads) >= slots_) {
      slot_ -= slots_;
      parity_ ^= 1;
    }
  }
  // All pieces of the tile are behind us, others' too.
  __device__ void passed(int pieces) { pieces_ += pieces; }
  // Where the next piece of all lies.
  __device__ const uint8_t* next() const { return ring_ + pieces_ % slots_ * kSlotBytes; }

 private:
  __device__ static unsigned quad() { return threadIdx.x / (kWarp * kQuadWarps); }
  PhaseShared& s_;
  uint8_t* ring_;
  int slots_;
  int slot_;
  uint32_t parity_ = 0;
  unsigned pieces_ = 0;
};

// acc += chunk `chunk` (of this piece's 16) times the activations at x (this lane's column, the chunk's place).
__device__ __forceinline__ void multiply_chunk(float (&acc)[4], const uint8_t* piece, int chunk, bool fp8, bool staged,
                                               uint32_t x, bool active) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t at = shared_address(piece) + piece_row(lane / 4) + chunk * kChunkBytes + lane % 4 * 16;
  const uint4 lo = load16_shared(at);
  const uint4 hi = load16_shared(at + kTileRows / 4 * kPiecePair);
  if (fp8) {
    const float* const scales = reinterpret_cast<const float*>(piece + kPieceBytes) + chunk / 2;
    multiply_fp8_chunk(acc, lo, hi, {scales[0], scales[kPieceBlocks]}, x + lane % 4 * 32, active);
  } else {
    multiply_bf16_chunk(acc, lo, hi, x + lane % 4 * 16, active, staged);
  }
}

// acc += this warp's chunks of the piece at byte `column` of rows of row_bytes. x: shared address of the staged row of
// this lane's column; staged: as float16.
__device__ __forceinline__ void multiply_piece(float (&acc)[4], const uint8_t* piece, int column, int row_bytes,
                                               bool fp8, bool staged, uint32_t x, bool active) {
  const int first = threadIdx.x / kWarp % kQuadWarps * kWarpChunks;
  const int here = column + first * kChunkBytes;
  const int wide = fp8 ? 2 : 1;  // bytes of activations per byte of weights
  if (here + kWarpChunks * kChunkBytes <= row_bytes) {
    if (fp8) {
#pragma unroll
      for (int i = 0; i < kWarpChunks; ++i)
        multiply_chunk(acc, piece, first + i, true, true, x + (here + i * kChunkBytes) * 2, active);
    } else {
#pragma unroll
      for (int i = 0; i < kWarpChunks; ++i)
        multiply_chunk(acc, piece, first + i, false, staged, x + here + i * kChunkBytes, active);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; here + i * kChunkBytes < row_bytes; ++i)
    multiply_chunk(acc, piece, first + i, fp8, staged, x + (here + i * kChunkBytes) * wide, active);
}

// A tile [16 rows, row_bytes] of the ring times the staged rows; this warp's part goes to partial [part][16][kRows].
template <int kRows>
__device__ __forceinline__ void multiply_tile(RingConsumer& ring, int row_bytes, bool fp8, bool staged, uint32_t x,
                                              bool active, float* partial) {
  float acc[4] = {};
  const int part = ring.turn();
  for (int column = part * kPieceRow; column < row_bytes; column += kQuads * kPieceRow) {
    multiply_piece(acc, ring.wait(), column, row_bytes, fp8, staged, x, active);
    ring.release();
  }
  ring.passed((row_bytes + kPieceRow - 1) / kPieceRow);
  if (part * kPieceRow >= row_bytes) return;
  const int lane = threadIdx.x % kWarp;
  float* const to = partial + (part * kQuadWarps + threadIdx.x / kWarp % kQuadWarps) * kTileRows * kRows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int column = lane % 4 * 2 + i;
    if (column >= kRows) break;
    to[lane / 4 * kRows + column] = acc[i];
    to[(lane / 4 + 8) * kRows + column] = acc[2 + i];
  }
}
// The sum of a tile's parts in order; from: of element (row, t).
template <int kRows>
__device__ __forceinline__ float add_parts(const float* from, int row_bytes) {
  const int pieces = (row_bytes + kPieceRow - 1) / kPieceRow;
  float v[kStreamWarps];
#pragma unroll
  for (int w = 0; w < kStreamWarps; ++w) {
    v[w] = w / kQuadWarps < pieces ? from[w * kTileRows * kRows] : 0.0f;
  }
#pragma unroll
  for (int width = kStreamWarps / 2; width > 0; width /= 2) {
#pragma unroll
    for (int w = 0; w < width; ++w) v[w] += v[w + width];
  }
  return v[0];
}

// ---- the grid ----

// Blocks meet between phases. What blocks wrote before arrive() is visible after wait() to loads past L1.
class GridBarrier {
 public:
  __device__ explicit GridBarrier(unsigned* counters) : counters_(counters) {}
  __device__ void arrive() {
    consumer_barrier();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counters_) : "memory");
    }
    target_ += gridDim.x;
  }
  __device__ void wait() {
    if (target_ == 0) {
      wait_for_predecessor();
      return;
    }
    if (threadIdx.x == 0) {
      unsigned count;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counters_) : "memory");
      } while (count < target_);
    }
    consumer_barrier();
  }
  // After the last phase: the last block to come leaves the counters as they were found.
  __device__ void finish() {
    consumer_barrier();
    if (threadIdx.x != 0) return;
    if (atomicAdd(counters_ + 1, 1u) + 1 < gridDim.x) return;
    counters_[0] = 0;
    counters_[1] = 0;
  }

 private:
  unsigned* counters_;
  unsigned target_ = 0;
};

struct Consumer {
  const PhaseProgram& program;
  PhaseShared& shared;
  uint8_t* staged;
  RingConsumer ring;
  GridBarrier grid;
};

__device__ __forceinline__ uint4 load16_coherent(const void* from) {
  return __ldcg(reinterpret_cast<const uint4*>(from));
}
__device__ __forceinline__ float load_coherent(const bf16* from) {
  return __bfloat162float(__ushort_as_bfloat16(__ldcg(reinterpret_cast<const unsigned short*>(from))));
}

}  // namespace tokenspeed::kernels::cuda
