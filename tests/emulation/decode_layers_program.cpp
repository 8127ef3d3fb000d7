// The translation of ops into phases is plain C++; here it calls the machine's box_map().
#include "kernels/cuda/decode_layers_program.cu"
