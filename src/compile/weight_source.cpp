#include "compile/weight_source.h"

#include <cstring>

namespace tokenspeed::compile {
namespace {

struct Extent {
  int64_t rows;
  int64_t columns;
};

Extent extent_of(const WeightView& view) {
  if (view.shape.size() < 2) return {view.shape.empty() ? 1 : view.shape[0], 1};
  int64_t columns = 1;
  for (size_t i = 1; i < view.shape.size(); ++i) columns *= view.shape[i];
  return {view.shape[0], columns};
}

float element(const WeightView& view, int64_t row, int64_t column, int64_t columns) {
  const int64_t index = row * columns + column;
  switch (view.dtype) {
    case DType::kFloat32:
      return reinterpret_cast<const float*>(view.data)[index];
    case DType::kBFloat16:
      return to_float(reinterpret_cast<const BFloat16*>(view.data)[index]);
    case DType::kFloat16:
      return float16_to_float(reinterpret_cast<const uint16_t*>(view.data)[index]);
    case DType::kFloat8E4M3: {
      const float value = float8_e4m3_to_float(reinterpret_cast<const uint8_t*>(view.data)[index]);
      return view.scale ? value * view.scale[(row / 128) * ((columns + 127) / 128) + column / 128] : value;
    }
    default:
      return 0.0f;  // integer tensors are no weights; the checkpoint refuses them
  }
}

}  // namespace

void read_rows_as_float(const WeightView& view, int64_t row_begin, int64_t rows, float* out) {
  const int64_t columns = extent_of(view).columns;
  if (view.dtype == DType::kFloat32) {
    std::memcpy(out, reinterpret_cast<const float*>(view.data) + row_begin * columns,
                static_cast<size_t>(rows * columns) * sizeof(float));
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      out[row * columns + column] = element(view, row_begin + row, column, columns);
    }
  }
}

void read_rows_as_bfloat16(const WeightView& view, int64_t row_begin, int64_t rows, BFloat16* out) {
  const int64_t columns = extent_of(view).columns;
  if (view.dtype == DType::kBFloat16) {
    std::memcpy(out, reinterpret_cast<const BFloat16*>(view.data) + row_begin * columns,
                static_cast<size_t>(rows * columns) * sizeof(BFloat16));
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      out[row * columns + column] = to_bfloat16(element(view, row_begin + row, column, columns));
    }
  }
}

}  // namespace tokenspeed::compile
