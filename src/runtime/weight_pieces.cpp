#include "runtime/weight_pieces.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/shape.h"

namespace tokenspeed::runtime {
namespace {

std::string tensor_of(const std::string& pattern, int64_t expert) {
  const size_t star = pattern.find('*');
  if (star == std::string::npos) return pattern;
  return pattern.substr(0, star) + std::to_string(expert) + pattern.substr(star + 1);
}

Status check_shape(const compile::WeightPiece& piece, const std::string& tensor, const compile::WeightView& view) {
  const int64_t rows = view.shape.empty() ? 1 : view.shape[0];
  int64_t columns = 1;
  for (size_t i = 1; i < view.shape.size(); ++i) columns *= view.shape[i];
  if (rows == piece.tensor_rows && columns == piece.tensor_columns) return {};
  // A vector may be stored as one row or one column.
  if (rows * columns == piece.tensor_rows * piece.tensor_columns &&
      (piece.tensor_rows == 1 || piece.tensor_columns == 1)) {
    return {};
  }
  return data_loss("tensor '" + tensor + "' has shape " + shape_text(view.shape) +
                   ", but the model's configuration asks for [" + std::to_string(piece.tensor_rows) + ", " +
                   std::to_string(piece.tensor_columns) + "]; config.json and the weights do not belong together");
}

template <typename Element>
void read_piece(const ResolvedPiece& piece, int64_t row, int64_t rows, int64_t columns, Element* out) {
  const int64_t source_row = piece.source_row + (row - piece.row_begin);
  const auto read = [&](int64_t at, int64_t count, Element* to) {
    if constexpr (sizeof(Element) == sizeof(float)) {
      compile::read_rows_as_float(piece.view, at, count, to);
    } else {
      compile::read_rows_as_bfloat16(piece.view, at, count, to);
    }
  };
  if (piece.source_columns == columns) {
    read(source_row, rows, out);
    return;
  }
  std::vector<Element> whole(static_cast<size_t>(piece.source_columns));
  for (int64_t i = 0; i < rows; ++i) {
    read(source_row + i, 1, whole.data());
    std::copy_n(whole.data() + piece.source_column, columns, out + i * columns);
  }
}

template <typename Element>
void read_all(const ResolvedMatrix& matrix, int64_t row, int64_t rows, int64_t columns, Element* out) {
  for (const ResolvedPiece& piece : matrix.pieces) {
    const int64_t begin = std::max(row, piece.row_begin);
    const int64_t end = std::min(row + rows, piece.row_begin + piece.rows);
    if (begin < end) read_piece(piece, begin, end - begin, columns, out + (begin - row) * columns);
  }
}

}  // namespace

Result<ResolvedMatrix> resolve(const compile::ProgramWeight& weight, int64_t index,
                               const compile::WeightSource& source) {
  ResolvedMatrix matrix;
  matrix.all_bfloat16 = true;
  int64_t row = 0;
  for (const compile::WeightPiece& piece : weight.pieces) {
    const std::string tensor = tensor_of(piece.tensor, index);
    TS_ASSIGN_OR_RETURN(compile::WeightView view, source.view(tensor));
    TS_RETURN_IF_ERROR(check_shape(piece, tensor, view));
    view.shape = {piece.tensor_rows, piece.tensor_columns};
    matrix.all_bfloat16 = matrix.all_bfloat16 && view.dtype == DType::kBFloat16;
    matrix.pieces.push_back(
        {std::move(view), row, piece.rows, piece.row_begin, piece.column_begin, piece.tensor_columns});
    row += piece.rows;
  }
  return matrix;
}

void read_rows(const ResolvedMatrix& matrix, int64_t row, int64_t rows, int64_t columns, DType dtype, void* out) {
  if (dtype == DType::kFloat32) {
    read_all(matrix, row, rows, columns, static_cast<float*>(out));
  } else {
    read_all(matrix, row, rows, columns, static_cast<BFloat16*>(out));
  }
}

}  // namespace tokenspeed::runtime
