// The Gated DeltaNet mixer on CUDA: kernels/gated_delta_net.h with bfloat16 rows, key_dim = value_dim in {32, 64, 128}
// and a convolution of 4 taps, any number of tokens.
#pragma once

#include <cuda_runtime.h>

#include "kernels/gated_delta_net.h"

namespace tokenspeed::kernels::cuda {

void causal_conv(const CausalConv& args, cudaStream_t stream);
void gdn_gates(const GdnGates& args, cudaStream_t stream);
void gdn_l2_norm(const GdnL2Norm& args, cudaStream_t stream);
void gated_delta_rule(const GatedDeltaRule& args, cudaStream_t stream);

// Convolution with normalisation, gates, the rule, gated norm: the stages pass bfloat16 rows through the workspace of
// gdn_mixer_workspace_bytes().
void gdn_mixer(const GdnMixer& args, cudaStream_t stream);
int64_t gdn_mixer_workspace_bytes(const GdnShape& shape, int64_t tokens);

}  // namespace tokenspeed::kernels::cuda
