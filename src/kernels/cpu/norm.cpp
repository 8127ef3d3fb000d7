#include "kernels/norm.h"

#include "kernels/cpu/rows.h"

namespace tokenspeed::kernels::cpu {

void rms_norm(const RmsNorm& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  for_each_row(pool, args.rows, args.columns, [&](int64_t row) {
    const Elements x = elements(args.x, row);
    if (args.add.data != nullptr) vector.add(x, elements(args.add, row), args.columns, x);
    vector.rms_norm(x, args.weight, args.epsilon, args.columns, elements(args.out, row));
  });
}

void gated_rms_norm(const GatedRmsNorm& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  for_each_row(pool, args.tokens, args.heads * args.columns, [&](int64_t token) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const int64_t column = head * args.columns;
      vector.gated_rms_norm(elements(args.x, token, column), elements(args.z, token, column), args.weight, args.epsilon,
                            args.columns, elements(args.out, token, column));
    }
  });
}

void head_rms_norm(const HeadRmsNorm& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  for_each_row(pool, args.tokens, args.heads * args.columns, [&](int64_t token) {
    for (int64_t head = 0; head < args.heads; ++head) {
      const Elements x = elements(args.x, token, head * args.head_stride);
      vector.rms_norm(x, args.weight, args.epsilon, args.columns, x);
    }
  });
}

}  // namespace tokenspeed::kernels::cpu
