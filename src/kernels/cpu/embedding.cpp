#include "kernels/embedding.h"

#include <cstring>

#include "kernels/cpu/rows.h"

namespace tokenspeed::kernels::cpu {

void embedding(const Embedding& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  const int64_t columns = args.table.k;
  const bool plain = args.table.layout == MatrixLayout::kRowMajor && args.table.dtype != DType::kFloat8E4M3;
  for_each_row(pool, args.rows, columns, [&](int64_t row) {
    const int64_t id = args.ids[row];
    if (plain) {
      const Elements from = elements(args.table.dtype, const_cast<void*>(args.table.data), id * columns);
      vector.convert(from, columns, elements(args.out, row));
    } else {
      for (int64_t k = 0; k < columns; ++k) store_element(args.out, row, k, matrix_element(args.table, id, k));
    }
  });
}

void gather_rows(const GatherRows& args, ThreadPool& pool) {
  const size_t bytes = static_cast<size_t>(args.columns) * dtype_size(args.x.dtype);
  for_each_row(pool, args.rows, args.columns, [&](int64_t row) {
    std::memcpy(row_address(args.out, row), row_address(args.x, args.index[row]), bytes);
  });
}

}  // namespace tokenspeed::kernels::cpu
