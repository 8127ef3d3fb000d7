// Stages of the mixer that have no op of their own.
#pragma once

#include "kernels/cuda/gated_delta_net.h"

namespace tokenspeed::kernels::cuda {

// causal_conv whose q and k heads leave l2-normalised: one rounding where the separate ops have two.
void causal_conv_normalised(const CausalConv& args, cudaStream_t stream);

// gated_delta_rule of the sequences with fewer than `limit` tokens in the step, token by token.
void recurrent_rule(const GatedDeltaRule& args, int limit, cudaStream_t stream);

// gated_delta_rule of the sequences with at least kChunkedRuleTokens tokens in the step, by chunks; key_dim = value_dim
// = 128. Operands of the products are bfloat16, the state and all sums fp32. qkv rows begin at 16 bytes.
inline constexpr int kChunkedRuleTokens = 32;
void chunked_rule(const GatedDeltaRule& args, void* workspace, cudaStream_t stream);
int64_t chunked_rule_workspace_bytes(const GdnShape& shape, int64_t tokens);

}  // namespace tokenspeed::kernels::cuda
