// How the cpu:: operations walk rows: addresses for the vector kernels, and the split over threads.
#pragma once

#include <algorithm>

#include "base/thread_pool.h"
#include "kernels/cpu/vector_kernels.h"
#include "kernels/elements.h"

namespace tokenspeed::kernels::cpu {

inline Elements elements(const Rows& rows, int64_t row, int64_t column = 0) {
  std::byte* begin = row_address(rows, row) + column * static_cast<int64_t>(dtype_size(rows.dtype));
  return {begin, rows.dtype == DType::kBFloat16};
}

inline Elements elements(DType dtype, void* data, int64_t index) {
  return {static_cast<std::byte*>(data) + index * static_cast<int64_t>(dtype_size(dtype)), dtype == DType::kBFloat16};
}

// Calls body(row) for all rows, in tasks of at least some 16k elements: less is not worth waking a thread.
template <typename Body>
void for_each_row(ThreadPool& pool, int64_t rows, int64_t elements_per_row, const Body& body) {
  constexpr int64_t kElementsPerTask = 16384;
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_row));
  pool.parallel_for((rows + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * per_task);
    for (int64_t row = task * per_task; row < end; ++row) body(row);
  });
}

}  // namespace tokenspeed::kernels::cpu
