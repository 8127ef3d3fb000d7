// The persistent kernel for weights of one type, compiled apart. columns: 1, 2, 4 or 8, at least the step's rows;
// narrow: LayerProgramWriter::narrow().
#pragma once

#include "kernels/cuda/decode_layers_program.h"

namespace tokenspeed::kernels::cuda {

using LayersKernel = void (*)(LayerProgram);
LayersKernel layers_kernel_fp8(int columns, bool narrow);
LayersKernel layers_kernel_bf16(int columns, bool narrow);

}  // namespace tokenspeed::kernels::cuda
