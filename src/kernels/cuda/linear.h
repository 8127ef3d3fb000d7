// Matrix products on CUDA: kernels/linear.h with bfloat16 x and row-major weights. bfloat16 weights go through
// cuBLASLt. FP8 weights: x is quantised per row and 128 columns (dynamic e4m3) and multiplied on the FP8 matrix units,
// k and n multiples of 128. x and y rows start at 16 bytes. Workspace: linear_workspace_bytes(), not shared with
// another stream.
#pragma once

#include <cuda_runtime.h>

#include "base/status.h"
#include "kernels/linear.h"

namespace tokenspeed::kernels::cuda {

Status linear(const Linear& args, cudaStream_t stream);
int64_t linear_workspace_bytes(int64_t rows, int64_t k);

}  // namespace tokenspeed::kernels::cuda
