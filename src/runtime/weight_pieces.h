// A Program's weight found in a WeightSource: which rows and columns of which checkpoint tensors make it up. Shared by
// all runners; what differs is where and in which layout they put the rows.
#pragma once

#include <vector>

#include "base/status.h"
#include "compile/program.h"
#include "compile/weight_source.h"

namespace tokenspeed::runtime {

struct ResolvedPiece {
  compile::WeightView view;
  int64_t row_begin = 0;  // in the weight
  int64_t rows = 0;
  int64_t source_row = 0;  // in the view
  int64_t source_column = 0;
  int64_t source_columns = 0;  // of the view
};

// One matrix of a weight (an expert, or the whole weight).
struct ResolvedMatrix {
  std::vector<ResolvedPiece> pieces;  // by ascending row_begin
  bool all_bfloat16 = false;          // every piece is stored as bfloat16: holding it so is exact
};

// Matrix `index` of the weight. Errors: the source's not_found; data_loss when a tensor's shape is not the model's.
Result<ResolvedMatrix> resolve(const compile::ProgramWeight& weight, int64_t index,
                               const compile::WeightSource& source);

// Writes rows [row, row + rows) of the matrix as float32 or bfloat16, row-major and contiguous.
void read_rows(const ResolvedMatrix& matrix, int64_t row, int64_t rows, int64_t columns, DType dtype, void* out);

}  // namespace tokenspeed::runtime
