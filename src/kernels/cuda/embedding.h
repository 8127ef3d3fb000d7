// Embedding lookup and row gathering on CUDA: kernels/embedding.h with bfloat16 row-major tables and rows, columns a
// multiple of 8. internal_error for a launch that failed.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/embedding.h"

namespace tokenspeed::kernels::cuda {

Status embedding(const Embedding& args, cudaStream_t stream);
Status gather_rows(const GatherRows& args, cudaStream_t stream);

}  // namespace tokenspeed::kernels::cuda
