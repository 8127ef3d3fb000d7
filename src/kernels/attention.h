// Full attention of the family: gated, grouped-query, partial rotary, over paged keys and values.
#pragma once

#include "kernels/types.h"

namespace tokenspeed::kernels {

// q_proj's output holds, per head, head_dim query elements followed by head_dim gate elements.
struct AttentionShape {
  int64_t query_heads = 0;
  int64_t kv_heads = 0;  // query head h reads KV head h / (query_heads / kv_heads)
  int64_t head_dim = 256;
  int64_t rotary_dim =
      64;  // the first rotary_dim dims of a head turn, in half-rotate (NeoX) pairs (i, i + rotary_dim/2)
  float rope_theta = 1e7f;  // angle of pair i at position p: p * theta^(-2i / rotary_dim)
};

// Unfused steps ------------------------------------------------------------------------------------------------------

// query[t, h, :] = q_gate[t, h, 0:head_dim], gate[t, h, :] = q_gate[t, h, head_dim:2*head_dim].
struct SplitQueryGate {
  AttentionShape shape;
  int64_t tokens = 0;
  Rows q_gate;  // [T, query_heads * 2 * head_dim]
  Rows query;   // [T, query_heads * head_dim]
  Rows gate;    // [T, query_heads * head_dim]
};

// Rotary embedding in place over `heads` heads of head_dim. cos and sin are computed in fp32; with bfloat16 rows they
// are rounded to bfloat16 first, as the model does.
struct Rope {
  AttentionShape shape;
  int64_t heads = 0;
  int64_t tokens = 0;
  const int32_t* position = nullptr;  // [T]
  Rows x;                             // [T, heads * head_dim]
};

// Writes each row's key and value at its position's page, rounded to the pages' dtype.
struct KvWrite {
  AttentionShape shape;
  SequenceBatch batch;
  KvPages pages;
  Rows key;    // [T, kv_heads * head_dim]
  Rows value;  // [T, kv_heads * head_dim]
};

// out = x * sigmoid(gate), elementwise over [T, columns]; out may alias x.
struct SigmoidMultiply {
  int64_t rows = 0;
  int64_t columns = 0;
  Rows x;
  Rows gate;
  Rows out;
};

// Fused: gate split + q/k norm + rope + KV write (5 -> 1). query is written; the gate stays in q_gate and is read there
// by PagedAttention.
struct AttentionPrepare {
  AttentionShape shape;
  SequenceBatch batch;
  KvPages pages;
  Rows q_gate;
  Rows key;
  Rows value;
  const float* query_norm = nullptr;  // [head_dim], zero-centred
  const float* key_norm = nullptr;
  float epsilon = 1e-6f;
  Rows query;  // out, [T, query_heads * head_dim]
};

// out[t, h] = softmax_{j <= position[t]}(q[t,h] . k[j] / sqrt(head_dim)) v[j], softmax and sums in fp32; then, if gate
// is set, multiplied by sigmoid(gate) (fp32, one rounding). The keys of this step must already be written. Bytes: per
// sequence, context * kv_heads * head_dim * 2 * element size, once per step for small T. The order of the sum over j
// depends on the position only (fixed blocks of kAttentionBlock keys), so a row's bits do not depend on T, the split
// over threads or the chunking of the prompt.
struct PagedAttention {
  AttentionShape shape;
  SequenceBatch batch;
  KvPages pages;
  Rows query;
  Rows gate;                     // optional: element (t, h, d) at t * stride + h * gate_head_stride + d
  int64_t gate_head_stride = 0;  // 2 * head_dim with data pointing at the first gate inside q_gate
  Rows out;                      // [T, query_heads * head_dim]
};
inline constexpr int kAttentionBlock = 64;

namespace reference {
void split_query_gate(const SplitQueryGate& args);
void rope(const Rope& args);
void kv_write(const KvWrite& args);
void sigmoid_multiply(const SigmoidMultiply& args);
void attention_prepare(const AttentionPrepare& args);
void paged_attention(const PagedAttention& args);
}  // namespace reference

// head_dim a multiple of 16 up to 256. attention_prepare gives the bits of the separate steps.
namespace cpu {
void split_query_gate(const SplitQueryGate& args, ThreadPool& pool);
void rope(const Rope& args, ThreadPool& pool);
void kv_write(const KvWrite& args, ThreadPool& pool);
void sigmoid_multiply(const SigmoidMultiply& args, ThreadPool& pool);
void attention_prepare(const AttentionPrepare& args, ThreadPool& pool);
void paged_attention(const PagedAttention& args, ThreadPool& pool);
}  // namespace cpu

}  // namespace tokenspeed::kernels
