// Feed-forward parts on CUDA: kernels/mlp.h with bfloat16 rows, columns multiples of 8, up to 512 experts and top_k 16.
#pragma once

#include <cuda_runtime.h>

#include "kernels/mlp.h"

namespace tokenspeed::kernels::cuda {

void swiglu(const SwiGlu& args, cudaStream_t stream);
void add(const Add& args, cudaStream_t stream);
void moe_router(const MoeRouter& args, cudaStream_t stream);
void shared_expert_combine(const SharedExpertCombine& args, cudaStream_t stream);
void scale_rows_by_sigmoid(const ScaleRowsBySigmoid& args, cudaStream_t stream);

// Rows are sorted by expert and multiplied in tiles. Row-major bfloat16 weights, or FP8 blocks (x and the activations
// are then quantised as in linear(); hidden and width multiples of 128; the scales of expert e follow those of e - 1).
// Each expert's result is rounded to bfloat16 before the weighted fp32 sum. Workspace: moe_experts_workspace_bytes().
void moe_experts(const MoeExperts& args, cudaStream_t stream);
int64_t moe_experts_workspace_bytes(int64_t rows, int64_t experts, int64_t top_k, int64_t hidden, int64_t width);

}  // namespace tokenspeed::kernels::cuda
