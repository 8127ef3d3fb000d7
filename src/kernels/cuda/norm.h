// Norms on CUDA: kernels/norm.h with bfloat16 rows. Columns and strides are multiples of 8, rows start at 16 bytes.
// rms_norm: up to 16,384 columns; per head: 32, 64, 128 or 256 of them.
#pragma once

#include <cuda_runtime.h>

#include "kernels/norm.h"

namespace tokenspeed::kernels::cuda {

void rms_norm(const RmsNorm& args, cudaStream_t stream);
void gated_rms_norm(const GatedRmsNorm& args, cudaStream_t stream);
void head_rms_norm(const HeadRmsNorm& args, cudaStream_t stream);

}  // namespace tokenspeed::kernels::cuda
