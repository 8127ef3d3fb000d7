#include "kernels/embedding.h"

#include "kernels/elements.h"

namespace tokenspeed::kernels::reference {

void embedding(const Embedding& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t k = 0; k < args.table.k; ++k) {
      store_element(args.out, row, k, matrix_element(args.table, args.ids[row], k));
    }
  }
}

void gather_rows(const GatherRows& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t i = 0; i < args.columns; ++i) {
      store_element(args.out, row, i, load_element(args.x, args.index[row], i));
    }
  }
}

}  // namespace tokenspeed::kernels::reference
