// Feed-forward parts: SwiGLU, the router, routed experts, the gated shared expert, addition.
#pragma once

#include "kernels/types.h"

namespace tokenspeed::kernels {

// out[t, i] = silu(gate_up[t, i]) * gate_up[t, width + i], fp32 inside.
struct SwiGlu {
  int64_t rows = 0;
  int64_t width = 0;
  Rows gate_up;  // [T, 2 * width]
  Rows out;      // [T, width]; may not alias
};

// out = a + b over [rows, columns]; out may alias either.
struct Add {
  int64_t rows = 0;
  int64_t columns = 0;
  Rows a;
  Rows b;
  Rows out;
};

// p = softmax(logits) over all experts; the top_k greatest (ties: the lower id), in descending order;
// weights = p_i (/ sum of the chosen p when normalize).
struct MoeRouter {
  int64_t rows = 0;
  int64_t experts = 0;
  int64_t top_k = 0;
  bool normalize = true;
  const float* logits = nullptr;    // [T, experts]
  int32_t* expert_ids = nullptr;    // [T, top_k]
  float* expert_weights = nullptr;  // [T, top_k]
};

// y[t] = sum_i weight[t, i] * down_e( silu(gate_e x[t]) * (up_e x[t]) ), e = expert_ids[t, i]; the sum over i in fp32
// in the order of i; the product with `down` stays fp32; the activation between is rounded to x.dtype. gate_up:
// `experts` matrices [2 * width, hidden] one after the other (gate rows first), gate_up_stride bytes apart; down:
// [hidden, width] each, down_stride bytes apart. Experts not in [0, experts) are skipped (another rank's). Bytes:
// distinct experts * 3 * width * hidden * element size. Workspace: moe_experts_workspace_bytes().
struct MoeExperts {
  int64_t rows = 0;
  int64_t experts = 0;
  int64_t top_k = 0;
  int64_t hidden = 0;
  int64_t width = 0;
  Rows x;
  Matrix gate_up;  // of expert 0
  int64_t gate_up_stride = 0;
  Matrix down;  // of expert 0
  int64_t down_stride = 0;
  const int32_t* expert_ids = nullptr;
  const float* expert_weights = nullptr;
  Rows y;
  void* workspace = nullptr;
};
int64_t moe_experts_workspace_bytes(int64_t rows, int64_t experts, int64_t top_k, int64_t hidden, int64_t width);

// Fused end of a MoE block (5 -> 1): y[t] = routed[t] + shared[t] * sigmoid(x[t] . gate_weight) (+ residual[t]); fp32
// inside.
struct SharedExpertCombine {
  int64_t rows = 0;
  int64_t hidden = 0;
  Rows x;                              // the block's (normalised) input
  const float* gate_weight = nullptr;  // [hidden]
  Rows shared;
  Rows routed;
  Rows residual;  // optional; y may alias it
  Rows y;
};

// Unfused form: gate[t] = sigmoid(gate_logit[t]); x[t, :] *= gate[t]. gate_logit [T, 1].
struct ScaleRowsBySigmoid {
  int64_t rows = 0;
  int64_t columns = 0;
  Rows gate_logit;
  Rows x;  // in place
};

namespace reference {
void swiglu(const SwiGlu& args);
void add(const Add& args);
void moe_router(const MoeRouter& args);
void moe_experts(const MoeExperts& args);
void shared_expert_combine(const SharedExpertCombine& args);
void scale_rows_by_sigmoid(const ScaleRowsBySigmoid& args);
}  // namespace reference

namespace cpu {
void swiglu(const SwiGlu& args, ThreadPool& pool);
void add(const Add& args, ThreadPool& pool);
void moe_router(const MoeRouter& args, ThreadPool& pool);
void moe_experts(const MoeExperts& args, ThreadPool& pool);  // kPanel16 weights only
void shared_expert_combine(const SharedExpertCombine& args, ThreadPool& pool);
void scale_rows_by_sigmoid(const ScaleRowsBySigmoid& args, ThreadPool& pool);
}  // namespace cpu

}  // namespace tokenspeed::kernels
