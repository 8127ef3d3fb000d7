#include "kernels/linear.h"

#include <algorithm>

#include "base/thread_pool.h"
#include "kernels/cpu/linear_panels.h"
#include "kernels/cpu/linear_with.h"
#include "kernels/norm.h"

namespace tokenspeed::kernels {

int64_t linear_workspace_bytes(int64_t rows, int64_t k, DType x_dtype, bool fused_norm) {
  return fused_norm ? rows * k * static_cast<int64_t>(dtype_size(x_dtype)) : 0;
}

namespace cpu {

const LinearKernels& linear_kernels(InstructionSet set, DType x, DType weight) {
  if (set == InstructionSet::kAvx2) return avx2_kernels(weight);
  const bool dot = set == InstructionSet::kAvx512Bf16 && x == DType::kBFloat16 && weight == DType::kBFloat16;
  return dot ? avx512_bf16_dot_kernels() : avx512_kernels(weight);
}

void linear(const Linear& args, ThreadPool& pool, InstructionSet set) {
  if (args.rows == 0) return;
  Rows x = args.x;
  if (args.norm_weight != nullptr) {
    x = {args.workspace, args.x.dtype, args.weight.k};
    rms_norm({.rows = args.rows,
              .columns = args.weight.k,
              .x = args.x,
              .weight = args.norm_weight,
              .epsilon = args.norm_epsilon,
              .out = x},
             pool);
  }
  const LinearKernels& kernels = linear_kernels(set, args.x.dtype, args.weight.dtype);
  const PanelProduct product{
      .kernels = &kernels, .x = x, .weight = args.weight, .y = args.y, .accumulate = args.accumulate};
  const PanelSplit split = split_product(kernels, args.weight, args.rows, pool.size());
  const int64_t panels = panel_count(args.weight);
  pool.parallel_for(split.count(), [&](int64_t task) {
    const int64_t row = task % split.row_blocks * split.block_rows;
    const int64_t panel = task / split.row_blocks * split.block_panels;
    multiply_block(product, row, std::min(row + split.block_rows, args.rows), panel,
                   std::min(panel + split.block_panels, panels));
  });
}

void linear(const Linear& args, ThreadPool& pool) { linear(args, pool, instruction_set()); }

}  // namespace cpu
}  // namespace tokenspeed::kernels
