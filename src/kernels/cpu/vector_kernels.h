// Inner loops over one row or one head, compiled once per instruction set. The cpu:: operations split their work over
// threads and call these; nothing here knows of threads.
#pragma once

#include <cstdint>

namespace tokenspeed::kernels::cpu {

// Consecutive elements of one row: float32 or bfloat16.
struct Elements {
  void* data = nullptr;
  bool is_bfloat16 = false;
};

// One sequence's depthwise convolution over `channels` channels (at most 256 a call).
struct ConvChannels {
  int64_t channels = 0;
  int64_t tokens = 0;
  Elements input;  // token t's channels at + t * input_stride elements
  int64_t input_stride = 0;
  Elements state_in;   // three rows, state_stride elements apart; data null: zeros
  Elements state_out;  // may be state_in
  int64_t state_stride = 0;
  const float* weight = nullptr;  // [channels][4]
  Elements output;
  int64_t output_stride = 0;
};

// The recurrence of one value head over consecutive tokens of one sequence.
struct DeltaHead {
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  int64_t tokens = 0;
  const float* query = nullptr;  // normalised; token t's at + t * key_stride
  const float* key = nullptr;
  int64_t key_stride = 0;
  const float* value = nullptr;
  int64_t value_stride = 0;
  const float* beta = nullptr;  // token t's at + t * gate_stride
  const float* decay = nullptr;
  int64_t gate_stride = 0;
  const float* state_in = nullptr;  // [value_dim][key_dim]; null: zeros
  float* state_out = nullptr;       // may be state_in
  Elements output;                  // [value_dim] of token t at + t * output_stride
  int64_t output_stride = 0;
};

// Softmax sums of several queries over keys [begin, end) of one KV head, end - begin <= kAttentionPartition.
struct AttentionPart {
  int64_t rows = 0;
  int64_t head_dim = 0;
  const float* query = nullptr;       // [rows][head_dim]
  const int32_t* position = nullptr;  // [rows] the last key each row sees
  int64_t begin = 0;
  int64_t end = 0;
  Elements keys;
  Elements values;
  const int64_t* offset = nullptr;  // [end - begin] element index of each key and value
  float scale = 0;
  float* greatest = nullptr;  // out, [rows]: greatest score (-inf when the row sees none of the keys)
  float* total = nullptr;     // out, [rows]: sum of exp(score - greatest)
  float* sum = nullptr;       // out, [rows][head_dim]: sum of exp(score - greatest) value
};

// Keys are summed in partitions at fixed positions and the partitions' sums merged in order, whoever computes them.
inline constexpr int64_t kAttentionPartition = 512;

struct VectorKernels {
  void (*convert)(Elements from, int64_t n, Elements to);
  void (*add)(Elements a, Elements b, int64_t n, Elements out);
  void (*rms_norm)(Elements x, const float* weight, float epsilon, int64_t n, Elements out);
  void (*gated_rms_norm)(Elements x, Elements z, const float* weight, float epsilon, int64_t n, Elements out);
  // x * factor / sqrt(sum x^2 + 1e-6), in place.
  void (*l2_norm)(Elements x, float factor, int64_t n);
  void (*swiglu)(Elements gate, Elements up, int64_t n, Elements out);
  void (*sigmoid_multiply)(Elements x, Elements gate, int64_t n, Elements out);
  void (*scale_by_sigmoid)(float logit, Elements x, int64_t n);
  // routed + shared * sigmoid(x . gate_weight) (+ residual when its data is set).
  void (*shared_expert_combine)(Elements x, const float* gate_weight, Elements shared, Elements routed,
                                Elements residual, int64_t n, Elements out);
  // Turns pairs (i, i + half) of one head in place.
  void (*rotate)(Elements x, const float* cosine, const float* sine, int64_t half);
  void (*conv)(const ConvChannels& args);
  void (*delta)(const DeltaHead& args);
  void (*attend)(const AttentionPart& args);
  // Folds one partition's sums of a row into the row's running sums.
  void (*merge)(float greatest, float total, const float* sum, int64_t n, float* into_greatest, float* into_total,
                float* into_sum);
  // sum / total, times sigmoid(gate) when its data is set.
  void (*finish_attention)(const float* sum, float total, Elements gate, int64_t n, Elements out);
  // The greatest of n > 0 logits; *invalid is set when one is NaN or +inf.
  float (*greatest)(const float* logits, int64_t n, bool* invalid);
  // Sum of weight[i] = exp((logits[i] - greatest) * inverse_temperature); weight may be null.
  double (*exp_sum)(const float* logits, int64_t n, float greatest, float inverse_temperature, float* weight);
  int64_t (*count_greater)(const float* logits, int64_t n, float bound);
  // Indices of the logits >= bound, ascending, at most `capacity` of them; returns how many there are.
  int64_t (*at_least)(const float* logits, int64_t n, float bound, int32_t* ids, int64_t capacity);
  // Ids in [begin, end) whose (logit - greatest) * inverse_temperature + gumbel noise may exceed `key`: all that do and
  // a few that do not. ids has room for end - begin.
  int64_t (*gumbel_candidates)(const float* logits, int64_t begin, int64_t end, float greatest,
                               float inverse_temperature, uint64_t seed, int64_t position, float key, int32_t* ids);
};

extern const VectorKernels kVectorKernelsAvx2;
extern const VectorKernels kVectorKernelsAvx512;

// Those of instruction_set().
const VectorKernels& vector_kernels();

}  // namespace tokenspeed::kernels::cpu
