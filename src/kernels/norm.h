// RMS norms of the family (docs: model mathematics, norms). Bytes moved: rows * columns * (in + out element sizes).
#pragma once

#include "kernels/types.h"

namespace tokenspeed::kernels {

// out = x * rsqrt(mean(x^2) + epsilon) * (1 + weight), all in fp32, one rounding at the end.
// Used over the hidden size and, with rows = tokens * heads, per head. out may alias x.
// If add.data is set: first x <- round(x + add), stored back to x (the residual stream), then normalised.
struct RmsNorm {
  int64_t rows = 0;
  int64_t columns = 0;
  Rows x;
  Rows add;                       // optional; same dtype as x
  const float* weight = nullptr;  // [columns], zero-centred: multiplied as 1 + weight
  float epsilon = 1e-6f;
  Rows out;
};

// Gated norm of Gated DeltaNet, per head of `columns` (128): n = x * rsqrt(mean(x^2) + epsilon);
// out = weight * n * silu(z), fp32 inside. rows = tokens * value heads, weight [columns] is shared by all heads.
// x, z and out hold `heads` heads per token row: head h of token t is at row t, elements [h * columns, (h+1) *
// columns).
struct GatedRmsNorm {
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t columns = 0;
  Rows x;
  Rows z;
  const float* weight = nullptr;
  float epsilon = 1e-6f;
  Rows out;
};

// The same per-head addressing for the zero-centred norm, in place: head h of token t is at
// x + t * x.stride + h * head_stride. Used for q_norm and k_norm when they are not fused.
struct HeadRmsNorm {
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t columns = 0;
  int64_t head_stride = 0;
  Rows x;
  const float* weight = nullptr;
  float epsilon = 1e-6f;
};

namespace reference {
void rms_norm(const RmsNorm& args);
void gated_rms_norm(const GatedRmsNorm& args);
void head_rms_norm(const HeadRmsNorm& args);
}  // namespace reference

namespace cpu {
void rms_norm(const RmsNorm& args, ThreadPool& pool);
void gated_rms_norm(const GatedRmsNorm& args, ThreadPool& pool);
void head_rms_norm(const HeadRmsNorm& args, ThreadPool& pool);
}  // namespace cpu

}  // namespace tokenspeed::kernels
