// The persistent kernel for bf16 weights.
#include "kernels/cuda/decode_layers_instances.cuh"

namespace tokenspeed::kernels::cuda {

LayersKernel layers_kernel_bf16(int columns, bool narrow) { return layers_kernel<false>(columns, narrow); }

}  // namespace tokenspeed::kernels::cuda
