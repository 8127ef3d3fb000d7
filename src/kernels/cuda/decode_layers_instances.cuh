// The persistent kernel for all numbers of rows and sizes of router; included once per weight type, as each takes a
// while to compile.
#pragma once

#include "kernels/cuda/decode_layers_kernel.cuh"
#include "kernels/cuda/decode_layers_launch.h"

namespace tokenspeed::kernels::cuda {
namespace {

template <bool kFp8, int kRows, int kKeys>
__global__ void __launch_bounds__(layer_threads(kRows), 1) kernel(const __grid_constant__ LayerProgram program) {
  run_layers<kFp8, kRows, kKeys>(program);
}

template <bool kFp8, int kKeys>
LayersKernel kernel_of(int columns) {
  return columns == 1   ? kernel<kFp8, 1, kKeys>
         : columns == 2 ? kernel<kFp8, 2, kKeys>
         : columns == 4 ? kernel<kFp8, 4, kKeys>
                        : kernel<kFp8, 8, kKeys>;
}

}  // namespace

template <bool kFp8>
LayersKernel layers_kernel(int columns, bool narrow) {
  return narrow ? kernel_of<kFp8, kLayerFewKeys>(columns) : kernel_of<kFp8, kLayerManyKeys>(columns);
}

}  // namespace tokenspeed::kernels::cuda
