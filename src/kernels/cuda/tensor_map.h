// Descriptions of matrices for the copy engine that fetches tiles (cp.async.bulk.tensor).
//
// A tile is `box_rows` rows of `box_columns` columns; in shared memory its rows lie one after the other, 16-byte chunks
// exchanged within 128 (or 64) bytes by the row's number, as swizzled<128>() does for rows of 128 bytes. Elements
// outside the matrix arrive as zeros and count as bytes. A map is a kernel parameter (__grid_constant__ const
// CUtensorMap).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "base/dtype.h"

namespace tokenspeed::kernels::cuda {

// data 16-byte aligned, row_bytes a multiple of 16, box_columns 128 or 64 bytes. Costs a microsecond on the host. The
// errors are programming errors and end the process with a sentence.
CUtensorMap tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns, int64_t row_bytes, int box_rows,
                       int box_columns);

// `groups` matrices [2 * width, columns] one after the other, gate rows before up rows. A tile is, `box_eights` times,
// eight gate rows and the eight up rows that belong to them; its columns are 128 bytes. Its coordinates for
// paired_tile_copy() are (column, width / 8, group). Otherwise as tensor_map().
CUtensorMap paired_tensor_map(const void* data, DType dtype, int64_t groups, int64_t width, int64_t columns,
                              int box_eights);

// Boxes of 16 rows and `box_chunks` times 128 bytes for box_copy(). Dimensions are bytes of a chunk, rows
// (`inner_rows`, eight of a box), groups of rows (`outer`, `outer_stride` bytes apart, two of a box), turns
// (neighbouring chunks) and chunks (`chunks`, `turns` * 128 bytes apart, `box_chunks` of a box). In shared memory chunk
// after chunk, of each the first group's rows, then the second's, 16-byte units exchanged as above.
CUtensorMap box_map(const void* data, int64_t row_bytes, int64_t inner_rows, int64_t outer, int64_t outer_stride,
                    int turns, int chunks, int box_chunks);

}  // namespace tokenspeed::kernels::cuda
