#define TOKENSPEED_VECTOR_KERNELS kVectorKernelsAvx2
#include "kernels/cpu/vector_kernels_table.h"
