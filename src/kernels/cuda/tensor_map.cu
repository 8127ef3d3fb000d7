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

// The last sizes and strides belong to the slowest dimension; strides are those of dimensions 1 and up.
template <int kRank>
CUtensorMap encode(const void* data, DType dtype, const cuuint64_t (&sizes)[kRank],
                   const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank], CUtensorMapSwizzle swizzle) {
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) step = 1;
  CUtensorMap map;
  const CUresult result = encoder()(&map, map_type(dtype), kRank, const_cast<void*>(data), sizes, strides, box, steps,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fprintf(stderr, "cuTensorMapEncodeTiled failed with %d for [%lld, %lld] at %p, rows of %lld bytes\n",
            static_cast<int>(result), static_cast<long long>(sizes[1]), static_cast<long long>(sizes[0]), data,
            static_cast<long long>(strides[0]));
    abort();
  }
  return map;
}

}  // namespace

CUtensorMap tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns, int64_t row_bytes, int box_rows,
                       int box_columns) {
  const bool wide = box_columns * static_cast<int64_t>(dtype_size(dtype)) == 128;
  return encode<2>(data, dtype, {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                   {static_cast<cuuint64_t>(row_bytes)},
                   {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)},
                   wide ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

CUtensorMap paired_tensor_map(const void* data, DType dtype, int64_t groups, int64_t width, int64_t columns,
                              int box_eights) {
  const auto row_bytes = static_cast<cuuint64_t>(columns) * dtype_size(dtype);
  const auto rows = static_cast<cuuint64_t>(width);
  return encode<5>(data, dtype, {static_cast<cuuint64_t>(columns), 8, 2, rows / 8, static_cast<cuuint64_t>(groups)},
                   {row_bytes, rows * row_bytes, 8 * row_bytes, 2 * rows * row_bytes},
                   {static_cast<cuuint32_t>(128 / dtype_size(dtype)), 8, 2, static_cast<cuuint32_t>(box_eights), 1},
                   CU_TENSOR_MAP_SWIZZLE_128B);
}

CUtensorMap box_map(const void* data, int64_t row_bytes, int64_t inner_rows, int64_t outer, int64_t outer_stride,
                    int turns, int chunks, int box_chunks) {
  const auto size = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  return encode<5>(data, DType::kFloat8E4M3, {128, size(inner_rows), size(outer), size(turns), size(chunks)},
                   {size(row_bytes), size(outer_stride), 128, size(turns) * 128},
                   {128, 8, 2, 1, static_cast<cuuint32_t>(box_chunks)}, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace tokenspeed::kernels::cuda
