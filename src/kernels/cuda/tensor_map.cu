#include <cstdio>
#include <cstdlib>

#include "kernels/cuda/tensor_map.h"

namespace tokenspeed::kernels::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Through the runtime, so that the program does not link the driver and starts without one.
Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = {};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      fprintf(stderr, "the driver has no cuTensorMapEncodeTiled; a driver of CUDA 12 or newer is needed\n");
      abort();
    }
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

CUtensorMapDataType map_type(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

}  // namespace

CUtensorMap tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns, int64_t row_bytes, int box_rows,
                       int box_columns) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const bool wide = box_columns * static_cast<int64_t>(dtype_size(dtype)) == 128;
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, map_type(dtype), 2, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, wide ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fprintf(stderr, "cuTensorMapEncodeTiled failed with %d for [%lld, %lld] at %p, rows of %lld bytes\n",
            static_cast<int>(result), static_cast<long long>(rows), static_cast<long long>(columns), data,
            static_cast<long long>(row_bytes));
    abort();
  }
  return map;
}

}  // namespace tokenspeed::kernels::cuda
