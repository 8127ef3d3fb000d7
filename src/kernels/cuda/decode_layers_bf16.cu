// The persistent kernel for bf16 weights.
#include "kernels/cuda/decode_layers_kernel.cuh"
#include "kernels/cuda/decode_layers_launch.h"

namespace tokenspeed::kernels::cuda {
namespace {

template <int kRows, int kKeys>
__global__ void __launch_bounds__(layer_threads(kRows), 1) kernel(const __grid_constant__ LayerProgram program) {
  run_layers<false, kRows, kKeys>(program);
}

template <int kKeys>
LayersKernel kernel_of(int columns) {
  return columns == 1   ? kernel<1, kKeys>
         : columns == 2 ? kernel<2, kKeys>
         : columns == 4 ? kernel<4, kKeys>
                        : kernel<8, kKeys>;
}

}  // namespace

LayersKernel layers_kernel_bf16(int columns, int experts) {
  return experts <= 256 ? kernel_of<8>(columns) : kernel_of<16>(columns);
}

}  // namespace tokenspeed::kernels::cuda
