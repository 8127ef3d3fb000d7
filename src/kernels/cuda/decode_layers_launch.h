// The persistent kernel for weights of one type, compiled apart. columns: 1, 2, 4 or 8, at least the step's rows;
// experts: of the router; blocks: of the launch.
#pragma once

#include "kernels/cuda/decode_layers_program.h"

namespace tokenspeed::kernels::cuda {

using LayersKernel = void (*)(LayerProgram);
LayersKernel layers_kernel_fp8(int columns, int experts, int blocks);
LayersKernel layers_kernel_bf16(int columns, int experts, int blocks);

}  // namespace tokenspeed::kernels::cuda
