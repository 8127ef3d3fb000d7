// Matrix product with a weight: the op that moves nearly all bytes of a token.
// Bytes moved: n * k * weight element size (once per step, whatever the rows) + rows * (k + n) * activation size.
// FLOPs: 2 * rows * n * k.
#pragma once

#include "kernels/types.h"

namespace tokenspeed::kernels {

// y[t, n] = sum_k norm(x)[t, k] * w[n, k]   (+ y[t, n] before, if accumulate), accumulated in fp32 in ascending order
// of k (in pairs for bfloat16), rounded once to y.dtype. With `accumulate` the old y is added in fp32 before that
// rounding: the residual stream.
// norm(x) is x, or, if norm_weight is set, the zero-centred RMS norm of x rounded to x.dtype (fused prologue).
// x.dtype and w.dtype may be: (float32, float32), (float32, bfloat16), (bfloat16, bfloat16); the reference also takes
// float8_e4m3 weights. Row-major and panel layouts give results equal within the named tolerance.
// Workspace: rows * k * sizeof(x element) when norm_weight is set, else none; `workspace` has linear_workspace_bytes().
struct Linear {
  int64_t rows = 0;
  Rows x;
  Matrix weight;
  Rows y;
  bool accumulate = false;
  const float* norm_weight = nullptr;  // [k] or null
  float norm_epsilon = 1e-6f;
  void* workspace = nullptr;
};

int64_t linear_workspace_bytes(int64_t rows, int64_t k, DType x_dtype, bool fused_norm);

// Writes the [n, k] row-major source (float32 or bfloat16; converted to `target` dtype, exact or rounded) as kPanel16
// panels [panel_begin, panel_end) of `out`. source_stride in elements. Rows n..padded are zero.
// One call fills whole panels, so threads take disjoint panel ranges.
void pack_panels(const void* source, DType source_dtype, int64_t source_stride, int64_t n, int64_t k, DType target,
                 int64_t panel_begin, int64_t panel_end, void* out);
// Bytes of a packed [n, k] matrix: ceil(n/16) * 16 * roundup(k, pair) * element size.
int64_t packed_bytes(int64_t n, int64_t k, DType dtype);

namespace reference {
void linear(const Linear& args);
}
namespace cpu {
// kPanel16 weights only.
void linear(const Linear& args, ThreadPool& pool);
}  // namespace cpu

}  // namespace tokenspeed::kernels
