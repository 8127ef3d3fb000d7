#include "runtime/logit_rows.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>
#include <utility>

#include "kernels/sampling.h"

namespace tokenspeed::runtime {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;

// The greatest magnitude as bits, without branches: a NaN or infinity has at least the bits of infinity.
bool all_finite(const float* values, int64_t count) {
  uint32_t greatest = 0;
  for (int64_t i = 0; i < count; ++i) greatest = std::max(greatest, std::bit_cast<uint32_t>(values[i]) & 0x7fffffffu);
  return greatest < kInfinityBits;
}

TokenLogprobs logprobs_of(const float* logits, int64_t vocabulary, int32_t token, int32_t top) {
  std::vector<kernels::TokenLogprob> best;
  TokenLogprobs result;
  result.token = token;
  result.logprob = kernels::cpu::logprobs(logits, vocabulary, token, top, &best, &result.rank);
  for (const kernels::TokenLogprob& entry : best) result.top.emplace_back(entry.token, entry.logprob);
  return result;
}

// The logits of the allowed tokens; all others can't be sampled.
const float* only_allowed(std::span<const int32_t> allowed, const float* logits, int64_t vocabulary) {
  if (allowed.empty()) return logits;
  thread_local std::vector<float> masked;
  masked.assign(static_cast<size_t>(vocabulary), -std::numeric_limits<float>::infinity());
  for (const int32_t token : allowed) masked[static_cast<size_t>(token)] = logits[token];
  return masked.data();
}

int32_t sample(const SequenceStep& step, const float* logits, int64_t vocabulary) {
  const SamplingParameters& sampling = *step.sampling;
  kernels::SampleRow row;
  row.logits = only_allowed(step.allowed_tokens, logits, vocabulary);
  row.vocabulary = vocabulary;
  row.temperature = sampling.temperature;
  row.top_k = sampling.top_k;
  row.top_p = sampling.top_p;
  row.min_p = sampling.min_p;
  row.repetition_penalty = sampling.repetition_penalty;
  row.presence_penalty = sampling.presence_penalty;
  row.frequency_penalty = sampling.frequency_penalty;
  row.logit_bias = sampling.logit_bias;
  row.prompt = step.prompt;
  row.output = step.output;
  row.seed = sampling.seed;
  row.position = step.context + static_cast<int64_t>(step.tokens.size());
  return kernels::cpu::sample(row).token;
}

}  // namespace

Status not_finite(int64_t position) {
  return internal_error(
      "the model's logits after position " + std::to_string(position) +
      " of this request hold a NaN or an infinity; the request ends, others are not affected. Check the "
      "weights, or serve with --dtype float32");
}

void list_wanted_rows(std::span<const SequenceStep> sequences, std::vector<WantedRow>* wanted) {
  wanted->clear();
  for (size_t s = 0; s < sequences.size(); ++s) {
    const SequenceStep& step = sequences[s];
    const int32_t count = static_cast<int32_t>(step.tokens.size());
    const int32_t leading = step.logits_out ? count : static_cast<int32_t>(step.next_tokens.size());
    for (int32_t i = 0; i < count; ++i) {
      const bool sampled = step.sample && i == count - 1;
      if (i < leading || sampled) wanted->push_back({static_cast<int32_t>(s), i, sampled});
    }
  }
}

void finish_row(const WantedRow& row, const SequenceStep& step, const float* logits, int64_t vocabulary,
                SequenceResult* result) {
  if (step.logits_out) std::copy_n(logits, vocabulary, step.logits_out + row.index * vocabulary);
  if (!result->status.ok()) return;
  const int64_t position = static_cast<int64_t>(step.context) + row.index;
  if (!all_finite(logits, vocabulary)) {
    result->status = not_finite(position);
    return;
  }
  if (static_cast<size_t>(row.index) < step.next_tokens.size()) {
    result->prompt_logprobs.push_back(
        logprobs_of(logits, vocabulary, step.next_tokens[row.index], std::max(0, step.sampling->prompt_logprobs)));
  }
  if (!row.sampled) return;
  result->token = sample(step, logits, vocabulary);
  if (result->token < 0) {
    result->status = not_finite(position);
  } else if (step.sampling->logprobs >= 0) {
    result->logprobs.push_back(logprobs_of(logits, vocabulary, result->token, step.sampling->logprobs));
  }
}

}  // namespace tokenspeed::runtime
