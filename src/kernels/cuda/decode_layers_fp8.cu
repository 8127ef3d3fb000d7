// The persistent kernel for fp8 weights.
#include "kernels/cuda/decode_layers_instances.cuh"

namespace tokenspeed::kernels::cuda {

LayersKernel layers_kernel_fp8(int columns, int experts, int blocks) {
  return layers_kernel<true>(columns, experts, blocks);
}

#ifdef TOKENSPEED_LAYER_CLOCKS
void fetch_layer_clocks(long long* to) { cudaMemcpyFromSymbol(to, layer_clocks, sizeof(layer_clocks)); }
#endif

}  // namespace tokenspeed::kernels::cuda
