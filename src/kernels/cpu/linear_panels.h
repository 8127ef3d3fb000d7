// Splits a product into tasks and runs one task on one thread; shared by linear and the routed experts.
// Invariant: how a product is split never shows in its bits. Cost: x is packed once a task, which a task's panels
// repay.
#pragma once

#include "kernels/cpu/linear_kernels.h"

namespace tokenspeed::kernels::cpu {

struct PanelProduct {
  const LinearKernels* kernels = nullptr;
  Rows x;
  const int32_t* x_row = nullptr;  // row r of the product reads row x_row[r] of x; null: row r
  Matrix weight;                   // kPanel16
  Rows y;
  bool accumulate = false;
};

// The shape of tasks for `rows` rows. Tasks are numbered [0, count()), panel blocks outermost, so that row blocks which
// share weights run close together.
struct PanelSplit {
  int64_t row_blocks = 1;
  int64_t block_rows = 0;
  int64_t panel_blocks = 1;
  int64_t block_panels = 0;
  int64_t count() const { return row_blocks * panel_blocks; }
};
// `threads`: how many share the tasks.
PanelSplit split_product(const LinearKernels& kernels, const Matrix& weight, int64_t rows, int threads);

inline int64_t panel_count(const Matrix& weight) { return (weight.n + kPanelRows - 1) / kPanelRows; }

// Rows [row_begin, row_end) x panels [panel_begin, panel_end), at most kMaxBlockPanels of them, on the calling thread.
constexpr int64_t kMaxBlockRows = 128;
constexpr int64_t kMaxBlockPanels = 24;
void multiply_block(const PanelProduct& product, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                    int64_t panel_end);

}  // namespace tokenspeed::kernels::cpu
