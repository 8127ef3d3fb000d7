// The persistent kernel for fp8 weights.
#include "kernels/cuda/decode_layers_instances.cuh"

namespace tokenspeed::kernels::cuda {

LayersKernel layers_kernel_fp8(int columns, bool narrow) { return layers_kernel<true>(columns, narrow); }

#ifdef TOKENSPEED_LAYER_CLOCKS
void fetch_layer_clocks(long long* to) { cudaMemcpyFromSymbol(to, layer_clocks, sizeof(layer_clocks)); }
#endif

}  // namespace tokenspeed::kernels::cuda
