#include "kernels/cpu/linear_panels.h"

#include <algorithm>
#include <array>

namespace tokenspeed::kernels::cpu {
namespace {

// Packed x, a tile's panels and the sums of a task stay together in a 1 MiB L2.
constexpr int64_t kPackedBytes = int64_t{256} << 10;
// Below this much weight a task is not worth handing to another thread.
constexpr int64_t kMinTaskBytes = int64_t{32} << 10;
constexpr int64_t kTasksPerThread = 6;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t panel_bytes(const LinearKernels& kernels, const Matrix& weight) {
  return divide_up(weight.k, kernels.step_k) * kLineBytes;
}

// Rows of a block in tiles of nearly equal size.
struct TileRows {
  int64_t tiles;
  int64_t begin(int64_t tile, int64_t rows) const { return tile * rows / tiles; }
};

// Panels of each tile of a block of these rows.
int64_t tile_panels(const LinearKernels& kernels, int64_t rows) {
  const int64_t tiles = divide_up(rows, kernels.max_tile_rows);
  const int most = kernels.max_tile_panels[divide_up(rows, tiles)];
  return tiles == 1 ? std::min(kernels.stream_panels, most) : most;
}

struct Scratch {
  alignas(kLineBytes) std::array<std::byte, kPackedBytes> x;
  alignas(kLineBytes) std::array<float, kMaxBlockRows * kMaxBlockPanels * kPanelRows> sums;
};

void pack_block(const PanelProduct& product, int64_t row_begin, int64_t row_end, const TileRows& tiles, int64_t k_begin,
                int64_t k_count, int64_t lines, std::byte* out) {
  const int64_t rows = row_end - row_begin;
  const int64_t element = static_cast<int64_t>(dtype_size(product.x.dtype));
  for (int64_t t = 0; t < tiles.tiles; ++t) {
    const int64_t begin = tiles.begin(t, rows);
    const int64_t end = tiles.begin(t + 1, rows);
    std::array<const void*, kMaxTileRows> from{};
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = product.x_row ? product.x_row[row_begin + r] : row_begin + r;
      from[r - begin] = static_cast<const std::byte*>(product.x.data) + (row * product.x.stride + k_begin) * element;
    }
    product.kernels->pack_rows(from.data(), static_cast<int>(end - begin), product.x.dtype, k_count,
                               out + begin * lines * kLineBytes);
  }
}

}  // namespace

PanelSplit split_product(const LinearKernels& kernels, const Matrix& weight, int64_t rows, int threads) {
  PanelSplit split;
  split.row_blocks = divide_up(rows, kMaxBlockRows);
  split.block_rows =
      std::min({rows, kMaxBlockRows, round_up(divide_up(rows, split.row_blocks), kernels.max_tile_rows)});
  split.row_blocks = divide_up(rows, split.block_rows);
  const int64_t panels = panel_count(weight);
  const int64_t bytes = panels * panel_bytes(kernels, weight);
  const int64_t useful = std::max<int64_t>(1, bytes * rows / kMinTaskBytes);
  const int64_t tasks = std::min<int64_t>(threads == 1 ? 1 : threads * kTasksPerThread, useful);
  const int64_t wanted = round_up(divide_up(panels * split.row_blocks, tasks), tile_panels(kernels, split.block_rows));
  split.block_panels = std::min({wanted, kMaxBlockPanels, panels});
  split.panel_blocks = divide_up(panels, split.block_panels);
  return split;
}

void multiply_block(const PanelProduct& product, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                    int64_t panel_end) {
  const LinearKernels& kernels = *product.kernels;
  const Matrix& weight = product.weight;
  const int64_t rows = row_end - row_begin;
  const int64_t panels = panel_end - panel_begin;
  const TileRows tiles{divide_up(rows, kernels.max_tile_rows)};
  const int64_t group = tile_panels(kernels, rows);
  const int64_t block_k = kPackedBytes / (rows * kLineBytes) * kernels.packed_line_k;
  const int64_t y_element = static_cast<int64_t>(dtype_size(product.y.dtype));
  Scratch scratch;  // not initialised on purpose: 450 KB

  Tile tile;
  tile.panel_bytes = panel_bytes(kernels, weight);
  tile.sums_stride = panels * kPanelRows;
  const std::byte* panel_data = static_cast<const std::byte*>(weight.data) + panel_begin * tile.panel_bytes;
  for (int64_t k = 0; k < weight.k; k += block_k) {
    const int64_t k_count = std::min(block_k, weight.k - k);
    const int64_t lines = divide_up(k_count, kernels.packed_line_k);
    pack_block(product, row_begin, row_end, tiles, k, k_count, lines, scratch.x.data());
    const bool last = k + k_count == weight.k;
    tile.steps = divide_up(k_count, kernels.step_k);
    tile.resume = k > 0;
    for (int64_t p = 0; p < panels; p += group) {
      const int64_t group_panels = std::min(group, panels - p);
      tile.weights = panel_data + p * tile.panel_bytes + k / kernels.step_k * kLineBytes;
      const int64_t column = (panel_begin + p) * kPanelRows;
      const int64_t columns = std::min(group_panels * kPanelRows, weight.n - column);
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        const int64_t begin = tiles.begin(t, rows);
        const int64_t end = tiles.begin(t + 1, rows);
        tile.x = scratch.x.data() + begin * lines * kLineBytes;
        tile.sums = scratch.sums.data() + begin * tile.sums_stride + p * kPanelRows;
        kernels.tile[group_panels][end - begin](tile);
        if (!last) continue;
        for (int64_t r = begin; r < end; ++r) {
          std::byte* y =
              static_cast<std::byte*>(product.y.data) + ((row_begin + r) * product.y.stride + column) * y_element;
          kernels.store_row(tile.sums + (r - begin) * tile.sums_stride, columns, product.accumulate, product.y.dtype,
                            y);
        }
      }
    }
  }
}

}  // namespace tokenspeed::kernels::cpu
