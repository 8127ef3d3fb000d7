#include "kernels/mlp.h"

#include "kernels/cpu/rows.h"

namespace tokenspeed::kernels::cpu {

void swiglu(const SwiGlu& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  for_each_row(pool, args.rows, args.width, [&](int64_t row) {
    vector.swiglu(elements(args.gate_up, row), elements(args.gate_up, row, args.width), args.width,
                  elements(args.out, row));
  });
}

void add(const Add& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  for_each_row(pool, args.rows, args.columns, [&](int64_t row) {
    vector.add(elements(args.a, row), elements(args.b, row), args.columns, elements(args.out, row));
  });
}

void moe_router(const MoeRouter& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  for_each_row(pool, args.rows, args.experts * args.top_k, [&](int64_t row) {
    const float* logits = args.logits + row * args.experts;
    int32_t* ids = args.expert_ids + row * args.top_k;
    float* weights = args.expert_weights + row * args.top_k;
    // Insertion into the short descending list of the best so far; an equal later id goes behind.
    int64_t count = 0;
    for (int64_t expert = 0; expert < args.experts; ++expert) {
      if (count == args.top_k && !(logits[expert] > logits[ids[count - 1]])) continue;
      int64_t at = count < args.top_k ? count++ : count - 1;
      for (; at > 0 && logits[expert] > logits[ids[at - 1]]; --at) ids[at] = ids[at - 1];
      ids[at] = static_cast<int32_t>(expert);
    }
    const float greatest = logits[ids[0]];
    for (int64_t i = 0; i < args.top_k; ++i) weights[i] = logits[ids[i]];
    double total = vector.exp_sum(weights, args.top_k, greatest, 1.0f, weights);
    if (!args.normalize) total = vector.exp_sum(logits, args.experts, greatest, 1.0f, nullptr);
    for (int64_t i = 0; i < args.top_k; ++i) weights[i] = static_cast<float>(weights[i] / total);
  });
}

void shared_expert_combine(const SharedExpertCombine& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  for_each_row(pool, args.rows, args.hidden, [&](int64_t row) {
    const Elements residual = args.residual.data != nullptr ? elements(args.residual, row) : Elements{};
    vector.shared_expert_combine(elements(args.x, row), args.gate_weight, elements(args.shared, row),
                                 elements(args.routed, row), residual, args.hidden, elements(args.y, row));
  });
}

void scale_rows_by_sigmoid(const ScaleRowsBySigmoid& args, ThreadPool& pool) {
  const VectorKernels& vector = vector_kernels();
  for_each_row(pool, args.rows, args.columns, [&](int64_t row) {
    vector.scale_by_sigmoid(load_element(args.gate_logit, row, 0), elements(args.x, row), args.columns);
  });
}

}  // namespace tokenspeed::kernels::cpu
