#define TOKENSPEED_VECTOR_KERNELS kVectorKernelsAvx512
#include "kernels/cpu/vector_kernels_table.h"
