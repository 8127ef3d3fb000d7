// Stages of the mixer that have no op of their own.
#pragma once

#include "kernels/cuda/gated_delta_net.h"

namespace tokenspeed::kernels::cuda {

// causal_conv whose q and k heads leave l2-normalised: one rounding where the separate ops have two.
void causal_conv_normalised(const CausalConv& args, cudaStream_t stream);

}  // namespace tokenspeed::kernels::cuda
