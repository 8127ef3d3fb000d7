// The inner loops of a matrix product over kPanel16 weights, one table per instruction set and pair of dtypes.
//
// A tile is `rows` rows of x times `panels` panels. Every output has one accumulator that takes k in ascending order,
// carried through memory as fp32 between blocks of k, so a tile's shape never shows in the bits: row invariance.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/types.h"

namespace tokenspeed::kernels::cpu {

constexpr int kPanelRows = 16;
constexpr int kLineBytes = 64;  // one weight line: one step of k for a panel; also one packed line of x
constexpr int kMaxTileRows = 8;
constexpr int kMaxTilePanels = 3;

struct Tile {
  const std::byte* weights = nullptr;  // the first panel's line of this block's first k
  int64_t panel_bytes = 0;             // from one panel to the next
  const std::byte* x = nullptr;        // packed by pack_rows
  float* sums = nullptr;               // [rows, panels * 16]
  int64_t sums_stride = 0;
  int64_t steps = 0;    // weight lines per panel
  bool resume = false;  // continue from `sums`, else from zero
};

struct LinearKernels {
  int64_t step_k = 0;         // elements of k in a weight line
  int64_t packed_line_k = 0;  // elements of k in a packed line of x; a multiple of step_k
  int max_tile_rows = 0;
  int max_tile_panels[kMaxTileRows + 1] = {};  // by rows of the tile; shapes up to these are in `tile`
  // Panels a tile takes when weights are used once, by the block's only tile: just enough chains of additions to keep
  // up with memory, since one stream of addresses is read faster than several.
  int stream_panels = 0;
  void (*tile[kMaxTilePanels + 1][kMaxTileRows + 1])(const Tile&) = {};
  // Copies elements [0, k) of each row to `out` as [k / packed_line_k][rows] lines, zero-padded at the end.
  void (*pack_rows)(const void* const* rows, int row_count, DType dtype, int64_t k, std::byte* out) = nullptr;
  // y[i] = sums[i] (+ y[i]) for i in [0, count), rounded to `dtype`.
  void (*store_row)(const float* sums, int64_t count, bool accumulate, DType dtype, void* y) = nullptr;
};

// The table for these dtypes: (float32, float32), (float32, bfloat16), (bfloat16, bfloat16) or (bfloat16, float32).
const LinearKernels& linear_kernels(InstructionSet set, DType x, DType weight);

// What linear_kernels chooses from. The dot form multiplies bfloat16 pairs; the others widen to fp32 and use FMA.
const LinearKernels& avx512_bf16_dot_kernels();
const LinearKernels& avx512_kernels(DType weight);
const LinearKernels& avx2_kernels(DType weight);

}  // namespace tokenspeed::kernels::cpu
