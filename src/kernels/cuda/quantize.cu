#include <cuda_fp8.h>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gemm.h"

namespace tokenspeed::kernels::cuda {
namespace {

constexpr int kBlockColumns = 128;
constexpr int kQuantizeThreads = 256;
constexpr float kGreatestFp8 = 448.0f;

// 16 threads hold the 128 columns that share a scale.
__global__ void quantize_kernel(const bf16* x, int64_t x_stride, int64_t rows, int64_t columns, uint2* out,
                                float* scale) {
  const int64_t index = blockIdx.x * int64_t{kQuantizeThreads} + threadIdx.x;
  const int64_t row = min(index / (columns / 8), rows - 1);
  const int64_t column = index % (columns / 8) * 8;
  float v[8];
  load8(x + row * x_stride + column, v);
  float greatest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) greatest = fmaxf(greatest, fabsf(v[i]));
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, offset));
  if (index >= rows * (columns / 8)) return;
  const float factor = greatest > 0 ? kGreatestFp8 / greatest : 0.0f;
  alignas(8) __nv_fp8x2_storage_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    packed[i] =
        __nv_cvt_float2_to_fp8x2(make_float2(v[2 * i] * factor, v[2 * i + 1] * factor), __NV_SATFINITE, __NV_E4M3);
  }
  out[index] = *reinterpret_cast<const uint2*>(packed);
  if (column % kBlockColumns == 0)
    scale[row * (columns / kBlockColumns) + column / kBlockColumns] = greatest / kGreatestFp8;
}

}  // namespace

void quantize_rows(const void* x, int64_t x_stride, int64_t rows, int64_t columns, void* out, float* scale,
                   cudaStream_t stream) {
  quantize_kernel<<<static_cast<unsigned>(ceil_div(rows * columns / 8, kQuantizeThreads)), kQuantizeThreads, 0,
                    stream>>>(static_cast<const bf16*>(x), x_stride, rows, columns, static_cast<uint2*>(out), scale);
}

}  // namespace tokenspeed::kernels::cuda
