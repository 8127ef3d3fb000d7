// From logits to a token, one row at a time, in fp32. The definition below is the engine's on every device.
//
//   1. logit_bias added;  2. repetition penalty over tokens of prompt and output (l > 0 ? l / r : l * r), then
//   l -= frequency * count_in_output + presence * (count_in_output > 0);
//   3. temperature 0: the greatest logit, ties to the lower id. Otherwise l /= temperature, p = softmax(l);
//   4. min_p: keep p >= min_p * max p;  top_k: keep the k greatest;  top_p: of the kept ones, renormalised, in
//   descending order, the shortest prefix whose sum reaches top_p (at least one). Ties break to the lower id.
//   5. the token is the kept id with the greatest l + gumbel(id), gumbel(id) = -log(-log(u)) with
//   u = (word 0 of philox(seed, position, id) >> 8 + 0.5) * 2^-24: sampling from the kept distribution without a scan,
//   and a pure function of (seed, position): the same whatever runs beside it.
// logprobs are log softmax of the raw logits (before step 1).
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "kernels/types.h"

namespace tokenspeed::kernels {

struct SampleRow {
  const float* logits = nullptr;  // [vocabulary]
  int64_t vocabulary = 0;         // logits entries that may be chosen; padding rows beyond are never read
  float temperature = 1.0f;
  int32_t top_k = 0;  // 0: off
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  std::span<const std::pair<int32_t, float>> logit_bias;
  std::span<const int32_t> prompt;  // read only when a penalty is set
  std::span<const int32_t> output;
  uint64_t seed = 0;
  int64_t position = 0;  // position of the token being sampled
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
};

struct Sampled {
  int32_t token = -1;  // -1: the logits hold a NaN or +inf, or only -inf; the request must end with an error
};

namespace reference {
// Straightforward sort-based version.
Sampled sample(const SampleRow& row);
}  // namespace reference
namespace cpu {
// No sort of the vocabulary in the common cases; same tokens as the reference.
Sampled sample(const SampleRow& row);
// log softmax(logits)[token], and the `top` greatest entries in descending order (ties: lower id) in *best.
// *rank is 1 + the number of entries greater than the token's.
float logprobs(const float* logits, int64_t vocabulary, int32_t token, int32_t top, std::vector<TokenLogprob>* best,
               int32_t* rank);
}  // namespace cpu

}  // namespace tokenspeed::kernels
