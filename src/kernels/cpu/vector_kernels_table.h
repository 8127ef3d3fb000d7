// The table of one instruction set's inner loops; the including file names it in TOKENSPEED_VECTOR_KERNELS.
#include "kernels/cpu/vector_attention.h"
#include "kernels/cpu/vector_logits.h"

namespace tokenspeed::kernels::cpu {

const VectorKernels TOKENSPEED_VECTOR_KERNELS = {
    .convert = convert,
    .add = add,
    .rms_norm = rms_norm,
    .gated_rms_norm = gated_rms_norm,
    .l2_norm = l2_norm,
    .swiglu = swiglu,
    .sigmoid_multiply = sigmoid_multiply,
    .scale_by_sigmoid = scale_by_sigmoid,
    .shared_expert_combine = shared_expert_combine,
    .rotate = rotate,
    .conv = conv,
    .delta = delta,
    .attend = attend,
    .merge = merge,
    .finish_attention = finish_attention,
    .greatest = greatest,
    .exp_sum = exp_sum,
    .count_greater = count_greater,
    .at_least = at_least,
    .gumbel_candidates = gumbel_candidates,
};

}  // namespace tokenspeed::kernels::cpu
