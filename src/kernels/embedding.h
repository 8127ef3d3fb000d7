// Token embedding lookup and row gathering. Bytes moved: rows * columns * (table + output element sizes).
#pragma once

#include "kernels/types.h"

namespace tokenspeed::kernels {

// out[t, :] = table[ids[t], :]. ids are in [0, table.n). The table may be in any layout: a tied model reads its
// embedding from the LM head's panels.
struct Embedding {
  int64_t rows = 0;
  const int32_t* ids = nullptr;
  Matrix table;
  Rows out;
};

// out[i, :] = x[index[i], :]; picks the rows whose logits are wanted. columns elements per row; x.dtype == out.dtype.
struct GatherRows {
  int64_t rows = 0;
  int64_t columns = 0;
  const int32_t* index = nullptr;
  Rows x;
  Rows out;
};

namespace reference {
void embedding(const Embedding& args);
void gather_rows(const GatherRows& args);
}  // namespace reference

namespace cpu {
void embedding(const Embedding& args, ThreadPool& pool);
void gather_rows(const GatherRows& args, ThreadPool& pool);
}  // namespace cpu

}  // namespace tokenspeed::kernels
