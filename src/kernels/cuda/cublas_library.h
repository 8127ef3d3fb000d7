// cuBLASLt, found when it is first needed: the program starts, and runs on the CPU, where it is not installed.
// cublas_library.cu defines the functions of cublasLt.h that the kernels call; without the library each of them answers
// CUBLAS_STATUS_NOT_INITIALIZED.
#pragma once

#include "base/status.h"

namespace tokenspeed::kernels::cuda {

// failed_precondition when the library is not installed; says which one and where to get it.
Status find_cublas();

}  // namespace tokenspeed::kernels::cuda
