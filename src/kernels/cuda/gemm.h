// Matrix products by 128 x 128 tiles on Hopper's matrix units: dense with FP8 weights, and grouped (experts) with
// bfloat16 or FP8 weights. Used by linear() and moe_experts().
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace tokenspeed::kernels::cuda {

inline constexpr int kGemmTile = 128;

// Rows [first, first + kGemmTile) of group `group`, which ends at row `end`.
struct GemmTile {
  int32_t group = 0;
  int32_t first = 0;
  int32_t end = 0;
};

// y[r] = a[r] b_g^T for the rows r of group g, or with swiglu silu(gate) * up of its two halves of columns.
// FP8: both operands float8_e4m3, a_scale per row and 128 columns, b_scale per 128 x 128 block, k a multiple of 128,
// fp32 sums scaled every 128 columns. bfloat16: k and n multiples of 8. All rows begin at 16 bytes. Bits of a row do
// not depend on the other rows.
struct TileGemm {
  DType dtype = DType::kBFloat16;  // of a and b
  int64_t n = 0;                   // rows of one b (with swiglu both halves)
  int64_t k = 0;
  const void* a = nullptr;
  int64_t a_stride = 0;             // elements
  const float* a_scale = nullptr;   // [rows, k / 128]
  const int32_t* a_rows = nullptr;  // row r is a's row a_rows[r] / a_divisor; null: r. Only with swiglu
  int32_t a_divisor = 1;
  const void* b = nullptr;
  int64_t groups = 1;
  int64_t b_group_stride = 0;  // bytes, a multiple of k elements
  const float* b_scale = nullptr;
  int64_t b_scale_group_stride = 0;  // elements
  const GemmTile* tiles = nullptr;   // [max_tiles] in device memory; null: one group of `rows` rows
  const int32_t* tile_count = nullptr;
  int64_t max_tiles = 0;
  int64_t rows = 0;
  bool swiglu = false;
  void* y = nullptr;
  DType y_dtype = DType::kBFloat16;
  int64_t y_stride = 0;
  const int32_t* y_rows = nullptr;  // row r goes to y's row y_rows[r]; null: r
  bool accumulate = false;          // not with swiglu
};
void tile_gemm(const TileGemm& args, cudaStream_t stream);

// out[r, c] = x[r, c] / scale[r, c / 128] rounded to float8_e4m3, scale = greatest |x| of the 128 / 448.
// x bfloat16, columns a multiple of 128; out is contiguous.
void quantize_rows(const void* x, int64_t x_stride, int64_t rows, int64_t columns, void* out, float* scale,
                   cudaStream_t stream);

}  // namespace tokenspeed::kernels::cuda
