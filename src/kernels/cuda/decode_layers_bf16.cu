// The persistent kernel for bf16 weights.
#include "kernels/cuda/decode_layers_instances.cuh"

namespace tokenspeed::kernels::cuda {

LayersKernel layers_kernel_bf16(int columns, int experts, int blocks) {
  return layers_kernel<false>(columns, experts, blocks);
}

}  // namespace tokenspeed::kernels::cuda
