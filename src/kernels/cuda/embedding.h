// Embedding lookup and row gathering on CUDA: kernels/embedding.h with bfloat16 row-major tables and rows, columns a
// multiple of 8.
#pragma once

#include <cuda_runtime.h>

#include "kernels/embedding.h"

namespace tokenspeed::kernels::cuda {

void embedding(const Embedding& args, cudaStream_t stream);
void gather_rows(const GatherRows& args, cudaStream_t stream);

}  // namespace tokenspeed::kernels::cuda
