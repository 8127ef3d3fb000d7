// Element-wise access to typed rows and matrices, for the reference kernels, tests and code that is not worth a vector
// loop. Loads are exact; stores round to nearest even. Cost: a branch on the dtype per element.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "kernels/types.h"

namespace tokenspeed::kernels {

// data[index] as float32, exact; dtype float32, bfloat16 or float8_e4m3.
inline float load_element(DType dtype, const void* data, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(data)[index]);
    case DType::kFloat8E4M3:
      return float8_e4m3_to_float(static_cast<const uint8_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

// dtype float32, bfloat16 or float8_e4m3.
inline void store_element(DType dtype, void* data, int64_t index, float value) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<BFloat16*>(data)[index] = to_bfloat16(value);
      break;
    case DType::kFloat8E4M3:
      static_cast<uint8_t*>(data)[index] = float_to_float8_e4m3(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

inline float load_element(const Rows& rows, int64_t row, int64_t column) {
  return load_element(rows.dtype, rows.data, row * rows.stride + column);
}

inline void store_element(const Rows& rows, int64_t row, int64_t column, float value) {
  store_element(rows.dtype, rows.data, row * rows.stride + column, value);
}

// The value as an activation of this dtype holds it.
inline float round_to(DType dtype, float value) { return dtype == DType::kBFloat16 ? round_to_bfloat16(value) : value; }

// Address of element 0 of a row.
inline std::byte* row_address(const Rows& rows, int64_t row) {
  return static_cast<std::byte*>(rows.data) + row * rows.stride * static_cast<int64_t>(dtype_size(rows.dtype));
}

// w[n, k] of a matrix in either layout, scaled when float8_e4m3.
inline float matrix_element(const Matrix& matrix, int64_t n, int64_t k) {
  if (matrix.layout == MatrixLayout::kPanel16) {
    const int64_t pair = matrix.dtype == DType::kBFloat16 ? 2 : 1;
    const int64_t groups = (matrix.k + pair - 1) / pair;
    return load_element(matrix.dtype, matrix.data, (((n / 16) * groups + k / pair) * 16 + n % 16) * pair + k % pair);
  }
  const float value = load_element(matrix.dtype, matrix.data, n * matrix.k + k);
  if (matrix.dtype != DType::kFloat8E4M3) return value;
  return value * matrix.scale[(n / 128) * ((matrix.k + 127) / 128) + k / 128];
}

// Element index of (position, head, 0) of a sequence's keys or values in the pages.
inline int64_t kv_element_index(const KvPages& pages, const SequenceBatch& batch, int64_t sequence, int64_t position,
                                int64_t head) {
  const int64_t page = batch.page_table[sequence * batch.page_table_stride + position / pages.page_size];
  return ((page * pages.page_size + position % pages.page_size) * pages.heads + head) * pages.head_dim;
}

}  // namespace tokenspeed::kernels
