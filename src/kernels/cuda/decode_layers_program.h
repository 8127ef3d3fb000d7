// What the persistent kernel of decode_layers executes, and the translation of ops into it.
//
// A launch is a list of phases. Within it activations go from block to block as words of eight bytes,
//
//     | value: two bfloat16, or one float32 | flag: the launch's number |
//
// written and read whole. A reader polls the words that it needs until their flags are the launch's: the data are the
// signal, so an exchange costs one store and one load past L1 and no barrier of the grid. Every phase has words of its
// own, so nothing is overwritten within a launch.
//
// Weights are cut into tiles of 16 rows, and a tile along k into chunks of 128 bytes. Warp w of the 16 owns `turns`
// chunks side by side, and turn s of a tile is one slot of the ring, which holds chunk w * turns + s of every warp:
//
//     slot:  | warp 0: 16 rows x 128 bytes | warp 1 | ... | warp 15 |     2 KiB each
//
// The expert's down projection is short: there a slot holds the chunks of several experts one after the other. Mixers'
// states come through the ring as well, as they do not depend on the phase before.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "kernels/cuda/decode.h"

namespace tokenspeed::kernels::cuda {

inline constexpr int kLayerWarps = 16;  // that compute; one more copies, and one may choose experts
inline constexpr int kLayerConsumers = kLayerWarps * 32;
inline constexpr int kLayerTileRows = 16;
inline constexpr int kLayerChunkBytes = 128;
inline constexpr int kLayerTileChunk = kLayerTileRows * kLayerChunkBytes;  // a warp's share of a slot
inline constexpr int kLayerSlotBytes = kLayerWarps * kLayerTileChunk;
inline constexpr int kLayerMaxSlots = 6;
inline constexpr int kLayerSegments = 4;
inline constexpr int kLayerMaxPhases = 24;
inline constexpr int kLayerMaxMaps = 48;
// Experts of a lane in the choice of a narrow router and of any other, and the rows of it that a block takes, at most.
inline constexpr int kLayerFewKeys = 8;
inline constexpr int kLayerManyKeys = 16;
__host__ __device__ constexpr int layer_router_rows(int keys) { return keys == kLayerFewKeys ? 2 : 4; }

// columns, here and below: rows of the step, rounded up to 1, 2, 4 or 8.
// One row's experts are chosen by a warp of its own, several rows' by as many of the computing warps: those take the
// registers of the warp that copies and of three beside it, as registers change hands between groups of four warps.
__host__ __device__ constexpr int layer_threads(int columns) { return kLayerConsumers + (columns == 1 ? 2 : 4) * 32; }
// Floats from an element's 16 part sums to the next one's; 20 keeps vectors in different banks. Of several rows there
// is less room, and part_place() does.
__host__ __device__ constexpr int layer_partial_stride(int columns) { return columns == 1 ? 20 : 16; }
// Buffers of part sums: in turn, or the next batch waits until the sums of the last one are added.
__host__ __device__ constexpr int layer_buffers(int columns) { return columns == 1 ? 2 : 1; }
// The tile's part sums of one batch of tiles.
__host__ __device__ constexpr int layer_batch_tiles(int columns) { return columns <= 2 ? 8 : columns == 4 ? 4 : 2; }
__host__ __device__ constexpr int layer_tile_floats(int columns) {
  return kLayerTileRows * columns * layer_partial_stride(columns);
}
// What a mixer keeps in the place of part sums.
__host__ __device__ constexpr int layer_mixer_bytes(int columns) {
  return columns * (4 * 128 * 4 + 4 * kLayerWarps * 4 + 32);
}
// Slots of a down projection whose activations a warp stages at a time.
__host__ __device__ constexpr int layer_down_slots(int columns) { return columns == 1 ? 4 : 1; }
__host__ __device__ constexpr int layer_chunk_values(bool fp8) { return fp8 ? 128 : 64; }
// Chunks of a row that a copy brings: half of them, so that memory is asked for less at once.
__host__ __device__ constexpr int layer_box_chunks(int chunks) { return chunks % 2 == 0 ? chunks / 2 : chunks; }
// Chunks of a warp in one tile, at most: inner sizes up to 4,096.
__host__ __device__ constexpr int layer_max_turns(bool fp8) { return fp8 ? 2 : 4; }
__host__ __device__ constexpr int layer_staged_chunk(bool fp8, int columns) {
  return layer_chunk_values(fp8) * 2 * columns;
}
// Floats between the part sums of two rows in a down projection.
__host__ __device__ constexpr int layer_down_stride(int parts) {
  const int vectors = (parts + 3) / 4;
  return (vectors % 2 == 0 ? vectors + 1 : vectors) * 4;
}

enum class LayerResult : int8_t { kRows, kFloatRows, kWords };
struct LayerSegment {
  const float* scale;  // FP8: [ceil(n / 128)][k / 128]
  void* to;            // result words [t][stride], or plain rows of bfloat16 or float32
  int rows_count;      // n
  int stride;          // words or elements of a row
  int first_tile;
  int8_t map;
  int8_t turns;
  int8_t chunks;  // of a slot
  LayerResult result;
};

// y = W norm(x), or x += W u.
struct ProjectPhase {
  const uint2* words;  // of the input [t][k / 2]; null: plain rows
  const __nv_bfloat16* rows;
  int64_t row_stride;
  const float* norm_weight;  // null: none
  float epsilon;
  const uint2* squares;  // the input is a mixer's, to be divided by its heads' norms: [t][k / 128][4]; null: it is not
  int tail;              // phase of the mixer whose conv tails are written here, or -1
  int k;
  int turns;      // of the kernel's weight type
  int warps;      // that have chunks
  int own_tiles;  // of the kernel's weight type; bfloat16 ones beside FP8 follow
  int tiles;
  int segment_count;
  LayerSegment segments[kLayerSegments];
  bool accumulate;  // the one segment's rows are the residual stream's
  uint2* residual_words;
};

struct MixerPhase {
  std::byte* recurrent;
  std::byte* conv;
  int64_t slot_stride;
  const uint2* qkv;  // of row 0
  const uint2* z;
  const uint2* b;
  const uint2* a;
  int qkv_stride;  // words of a row
  int z_stride;
  int b_stride;
  int a_stride;
  const float* conv_weight;
  const float* a_log;
  const float* dt_bias;
  const float* norm_weight;
  uint2* o;        // [t][value_heads * 64]: o * norm weight * silu(z), before the division by the norm
  uint2* squares;  // [t][value_heads][4]: sums of o^2 over 32 rows
  int key_heads;
  int value_heads;
  int log_group;  // value heads per key head, a power of two
  int log_parts;  // quarters of a head in a task
};

// logits = W norm(x), the shared expert's gate as their last.
struct RouterPhase {
  const uint2* words;
  const __nv_bfloat16* rows;
  int64_t row_stride;
  const float* norm_weight;
  float epsilon;
  int k;
  int turns;
  int warps;
  const __nv_bfloat16* weight;  // [experts][k]
  const __nv_bfloat16* gate;    // [k], null: none
  int experts;
  int block_rows;  // of weight and gate that a block takes, as long as there are any
  uint2* logits;   // [t][experts + 1] float32
};

struct LayerExperts {
  const float* scale;
  int width;
  int map;
};
// The normalised row is still staged from the router's phase.
struct GateUpPhase {
  const uint2* logits;
  float epsilon;
  int k;
  int turns;
  int warps;
  int chunks;
  int experts;
  int top_k;
  bool normalize;
  bool has_gate;
  LayerExperts routed;
  LayerExperts shared;  // width 0: none
  int log_tiles;        // tiles of an expert, a power of two
  uint2* h;             // [t][top_k + 1][width / 2]
};
struct DownPhase {
  const uint2* h;
  int k;           // width of every expert and of the shared one
  int log_chunks;  // chunks of one expert's rows, at most 16
  int hidden;
  int top_k;
  LayerExperts routed;
  LayerExperts shared;
  uint2* residual_words;
};

// Bits: the kernel tells them apart by tests, as a jump through a table would wait for constant memory.
enum class LayerPhaseKind : int { kProject = 1, kMixer = 2, kRouter = 4, kGateUp = 8, kDown = 16 };
struct alignas(16) LayerPhase {
  LayerPhaseKind kind;
  union {
    ProjectPhase project;
    MixerPhase mixer;
    RouterPhase router;
    GateUpPhase gate_up;
    DownPhase down;
  };
  __host__ __device__ bool is(LayerPhaseKind one) const {
    return (static_cast<int>(kind) & static_cast<int>(one)) != 0;
  }
};

struct LayerProgram {
  CUtensorMap maps[kLayerMaxMaps];
  LayerPhase phases[kLayerMaxPhases];
  SequenceBatch batch;
  unsigned* counters;  // the number of launches so far, blocks of this one that have read it
  __nv_bfloat16* x;    // the residual stream
  int64_t x_stride;
  DecodeProgress progress;  // phases are ops
  const int32_t* wanted;    // the step's row of each row of float32; null: all in order
  int wanted_count;
  int hidden;
  int rows;
  int phase_count;
  int map_count;
  int slots;
  int spread;  // cycles from a copy to the next for each of its chunks, while a phase's input is not there
  int staged_bytes;
  int partial_bytes;  // of one of the layer_buffers()
  bool spreads_experts;
  bool updates_x;
  bool chooser_counts;  // in steps of one row: the block, by the warp that chooses experts
};
static_assert(sizeof(LayerProgram) < 32 * 1024, "it is a kernel parameter");

inline int layer_columns(int64_t rows) { return rows <= 1 ? 1 : rows <= 2 ? 2 : rows <= 4 ? 4 : 8; }

// Takes ops one after the other as long as they fit into one launch.
class LayerProgramWriter {
 public:
  // workspace: of decode_layers; blocks: of the launch.
  LayerProgramWriter(void* workspace, int blocks) : workspace_(static_cast<std::byte*>(workspace)), blocks_(blocks) {
    clear();
  }
  // Writes the phases of ops[0] and of what belongs to it, and returns how many ops that were; 0: they do not fit into
  // this launch, or no launch takes them.
  size_t take(std::span<const DecodePhase> ops);
  bool empty() const { return program_.phase_count == 0; }
  bool fp8() const { return fp8_; }
  // Whether the launch's routers, if it has any, are narrow ones: kLayerFewKeys.
  bool narrow() const {
    return experts_ <= kLayerFewKeys * 32 && experts_ + 1 <= layer_router_rows(kLayerFewKeys) * blocks_;
  }
  // The launch so far; shared_bytes() of dynamic shared memory. progress: of its first op. chunk_cycles: in which every
  // multiprocessor can have kLayerTileChunk bytes of memory.
  const LayerProgram& finish(const DecodeProgress& progress = {}, double chunk_cycles = 0);
  size_t shared_bytes() const;
  void clear();

 private:
  size_t take_mixer(std::span<const DecodePhase> ops);
  size_t take_experts(std::span<const DecodePhase> ops);
  size_t take_projection(const DecodeLinear& op);
  bool begin(int64_t rows, bool fp8, int64_t hidden, int phases, int maps);
  bool residual(const Rows& x, int64_t hidden);
  bool project(const DecodeLinear& op, bool to_words, ProjectPhase* phase);
  bool input_of_norm(const Rows& x, const uint2** words, const __nv_bfloat16** rows, int64_t* stride);
  uint2* words(int64_t per_row);
  int map(const Matrix& weight, bool fp8, int turns, int chunks, int box_chunks);
  int paired_map(const Matrix& first, int64_t matrices, int64_t width, int turns, int chunks);
  LayerPhase& add(LayerPhaseKind kind);
  int staged_bytes(int columns) const;
  int partial_bytes(int columns) const;
  size_t buffer_bytes(int columns) const;
  bool fits() const;

  std::byte* workspace_;
  int blocks_;
  LayerProgram program_;
  bool fp8_ = false;
  int experts_ = 0;  // of the routers, at most
  int columns_ = 1;
  int64_t used_words_ = 0;
  const uint2* x_words_ = nullptr;  // of the residual stream, when a phase of this launch has written it
  int max_turns_ = 1;
  int down_stride_ = 0;  // 0: no expert's down projection
};

inline constexpr size_t kLayerSharedReserve = 13 * 1024;  // for what the kernel keeps beside the buffers
// Bytes in front of the words.
inline constexpr int64_t kLayerWordsOffset = 256;

}  // namespace tokenspeed::kernels::cuda
