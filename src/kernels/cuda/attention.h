// Full attention on CUDA: kernels/attention.h with bfloat16 rows, pages of bfloat16 or float8_e4m3, head_dim 64, 128 or
// 256, any number of tokens. A row's bits depend on its own position and inputs only: key blocks of kAttentionBlock in
// ascending order.
#pragma once

#include <cuda_runtime.h>

#include "kernels/attention.h"

namespace tokenspeed::kernels::cuda {

void split_query_gate(const SplitQueryGate& args, cudaStream_t stream);
void rope(const Rope& args, cudaStream_t stream);
void kv_write(const KvWrite& args, cudaStream_t stream);
void sigmoid_multiply(const SigmoidMultiply& args, cudaStream_t stream);
void attention_prepare(const AttentionPrepare& args, cudaStream_t stream);
void paged_attention(const PagedAttention& args, cudaStream_t stream);

}  // namespace tokenspeed::kernels::cuda
