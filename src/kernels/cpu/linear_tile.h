// The tile loop, written once over a Format. A file for one instruction set defines its Formats in its own anonymous
// namespace and takes a table with make_kernels<Format>(). All here is internal to the including file (anonymous
// namespace), so code for one instruction set can never be linked in place of another's.
//
// A Format has: Vector (16 floats), zero(), load(), store(); kStepK, kXBytes (bytes of packed x per step), kXType,
// kMaxRows, kStreamPanels, max_panels(rows) and multiply<P, R>(sums, weights, panel_bytes, x): one step of k.
#pragma once

#include <bit>
#include <cstring>

#include "kernels/cpu/linear_kernels.h"

namespace tokenspeed::kernels::cpu {
namespace {

// Far enough ahead to cover DRAM latency at one core's share of bandwidth. Reading past the end of a panel prefetches
// its neighbour; past the end of the weights, a prefetch never faults.
constexpr int64_t kPrefetchBytes = 2048;
// Tiles of more rows are bound by arithmetic and find their weights in L2.
constexpr int kMaxPrefetchRows = 4;

template <typename Format, int P, int R>
void multiply_tile(const Tile& tile) {
  typename Format::Vector sums[P][R];
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) {
      float* from = tile.sums + r * tile.sums_stride + p * kPanelRows;
      sums[p][r] = tile.resume ? Format::load(from) : Format::zero();
    }
  }
  constexpr int kSteps = kLineBytes / Format::kXBytes;
  const int64_t panel_bytes = tile.panel_bytes;
  const std::byte* weights = tile.weights;
  const std::byte* x = tile.x;
  int64_t steps = tile.steps;
  for (; steps >= kSteps; steps -= kSteps) {
#pragma GCC unroll 2
    for (int s = 0; s < kSteps; ++s) {
      if constexpr (R <= kMaxPrefetchRows) {
        for (int p = 0; p < P; ++p) __builtin_prefetch(weights + p * panel_bytes + kPrefetchBytes);
      }
      Format::template multiply<P, R>(sums, weights, panel_bytes, x + s * Format::kXBytes);
      weights += kLineBytes;
    }
    x += R * kLineBytes;
  }
  for (; steps > 0; --steps) {
    Format::template multiply<P, R>(sums, weights, panel_bytes, x);
    weights += kLineBytes;
    x += Format::kXBytes;
  }
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) Format::store(tile.sums + r * tile.sums_stride + p * kPanelRows, sums[p][r]);
  }
}

template <typename Format>
void pack_rows(const void* const* rows, int row_count, DType dtype, int64_t k, std::byte* out) {
  constexpr int64_t kLineK = kLineBytes / static_cast<int64_t>(dtype_size(Format::kXType));
  const bool same = dtype == Format::kXType;
  for (int64_t begin = 0; begin < k; begin += kLineK) {
    const int64_t count = k - begin < kLineK ? k - begin : kLineK;
    for (int r = 0; r < row_count; ++r, out += kLineBytes) {
      if (same) {
        constexpr size_t kSize = dtype_size(Format::kXType);
        const std::byte* from = static_cast<const std::byte*>(rows[r]) + begin * kSize;
        if (count == kLineK) {
          std::memcpy(out, from, kLineBytes);
        } else {
          std::memset(out, 0, kLineBytes);
          std::memcpy(out, from, count * kSize);
        }
      } else {  // bfloat16 widened to float32
        const uint16_t* from = static_cast<const uint16_t*>(rows[r]) + begin;
        uint32_t* to = reinterpret_cast<uint32_t*>(out);
        if (count == kLineK) {
          for (int64_t i = 0; i < kLineK; ++i) to[i] = static_cast<uint32_t>(from[i]) << 16;
        } else {
          for (int64_t i = 0; i < kLineK; ++i) to[i] = i < count ? static_cast<uint32_t>(from[i]) << 16 : 0;
        }
      }
    }
  }
}

void store_row(const float* sums, int64_t count, bool accumulate, DType dtype, void* y) {
  if (dtype == DType::kFloat32) {
    float* to = static_cast<float*>(y);
    if (!accumulate) {
      std::memcpy(to, sums, count * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < count; ++i) to[i] += sums[i];
    return;
  }
  BFloat16* to = static_cast<BFloat16*>(y);
  if (accumulate) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(sums[i] + to_float(to[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(sums[i]);
  }
}

template <typename Format, int P, int R>
void add_shapes(LinearKernels& kernels) {
  if constexpr (R <= Format::kMaxRows) {
    if constexpr (P <= Format::max_panels(R)) {
      kernels.tile[P][R] = &multiply_tile<Format, P, R>;
      kernels.max_tile_panels[R] = P;
      add_shapes<Format, P + 1, R>(kernels);
    } else {
      add_shapes<Format, 1, R + 1>(kernels);
    }
  }
}

template <typename Format>
LinearKernels make_kernels() {
  LinearKernels kernels;
  kernels.step_k = Format::kStepK;
  kernels.packed_line_k = kLineBytes / static_cast<int64_t>(dtype_size(Format::kXType));
  kernels.max_tile_rows = Format::kMaxRows;
  kernels.stream_panels = Format::kStreamPanels;
  add_shapes<Format, 1, 1>(kernels);
  kernels.pack_rows = &pack_rows<Format>;
  kernels.store_row = &store_row;
  return kernels;
}

}  // namespace
}  // namespace tokenspeed::kernels::cpu
