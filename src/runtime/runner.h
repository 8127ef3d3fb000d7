// What the engine needs from a device: run one step of tokens for many sequences, sample, report.
//
// A Runner executes one Program per shape class on one device. The engine (host, logical) decides which sequences run
// and which pages and slots they read and write; the Runner owns the physical pages and slots, the weights and the
// logits. Invariant: a step's result for one sequence does not depend on the others in it (bit for bit on the CPU).
// submit() and wait() are split so that a device can work while the host plans. Capacity::steps_in_flight says how many
// steps may be submitted before the first of them is waited for; steps run, and are waited for, in the order of
// submit(). A sequence can go on in a step before the host knows the token that the step before it gives: token_from
// names that token, which then stays on the device.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"

namespace tokenspeed::runtime {

struct SamplingParameters {
  float temperature = 1.0f;
  int32_t top_k = 0;  // 0: off
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  uint64_t seed = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;
  int32_t logprobs = -1;  // -1: none; n >= 0: the sampled token's and the n greatest
  int32_t prompt_logprobs = -1;
};

// One sequence's share of a step. Spans and pointers must stay valid until the step's wait() returns.
struct SequenceStep {
  std::span<const int32_t> tokens;  // new tokens, at positions [context, context + tokens.size())
  // Not below 0: the one new token is what the step in flight samples for its sequence of this index. `tokens` has
  // length 1 and is not read. When that sequence fails, so that there is no token, the step runs with some token in its
  // place, and the result means nothing.
  int32_t token_from = -1;
  int32_t context = 0;                           // tokens already in the caches
  std::span<const int32_t> pages;                // KV pages covering [0, context + tokens.size())
  int32_t state_in = -1;                         // state slot read; -1: the zero state
  int32_t state_out = 0;                         // state slot written; may equal state_in
  bool sample = false;                           // sample the token that follows the last one given
  const SamplingParameters* sampling = nullptr;  // required when sample or prompt logprobs are wanted
  std::span<const int32_t> prompt;  // the request's prompt and its output so far, including `tokens`: for penalties
  std::span<const int32_t> output;
  std::span<const int32_t> allowed_tokens;  // only these may be sampled; empty: any
  // Prompt logprobs: of each token at positions (context, context + tokens.size()], given in next_tokens[i] = the token
  // after tokens[i]; empty when not wanted. May be one shorter than tokens (the last one's successor is not known).
  std::span<const int32_t> next_tokens;
  float* logits_out = nullptr;  // tests only: [tokens.size(), vocabulary_size] raw logits of every row, or null
};

// Whether a device can finish the sequence's rows by itself. What needs the history, log probabilities or a choice of
// tokens is worked out by the host.
inline bool finishes_on_device(const SequenceStep& step) {
  if (step.logits_out || !step.next_tokens.empty()) return false;
  if (!step.sample) return true;
  const SamplingParameters& sampling = *step.sampling;
  return sampling.logprobs < 0 && sampling.repetition_penalty == 1.0f && sampling.presence_penalty == 0.0f &&
         sampling.frequency_penalty == 0.0f && sampling.logit_bias.empty() && step.allowed_tokens.empty();
}

struct TokenLogprobs {
  int32_t token = 0;
  float logprob = 0;
  int32_t rank = 0;                            // 1 = most likely
  std::vector<std::pair<int32_t, float>> top;  // descending
};

struct SequenceResult {
  int32_t token = -1;                   // sampled token, -1 when none was asked for or on error
  Status status;                        // not ok: this sequence failed (NaN or inf in its logits); others are untouched
  std::vector<TokenLogprobs> logprobs;  // the sampled token's, when asked for (0 or 1 entry)
  std::vector<TokenLogprobs> prompt_logprobs;  // one per entry of next_tokens
};

// Sizes the engine plans with; fixed at load.
struct Capacity {
  int32_t pages = 0;      // KV pages
  int32_t page_size = 0;  // positions per page
  int32_t state_slots = 0;
  int32_t max_step_tokens = 0;   // T: rows of one step over all sequences
  int32_t max_sequences = 0;     // sequences of one step
  int32_t max_model_length = 0;  // positions a sequence may reach
  int32_t vocabulary_size = 0;
  int32_t steps_in_flight = 1;  // 1 or 2
};
inline constexpr int32_t kMostStepsInFlight = 2;

class Runner {
 public:
  virtual ~Runner() = default;
  virtual const Capacity& capacity() const = 0;
  // Starts a step over `sequences` (1..max_sequences, their tokens together <= max_step_tokens). An error is a fault of
  // the device or a misuse; all sequences of the step are then lost. Misuses are a step too many, and a step behind one
  // of which finishes_on_device() does not hold for every sequence: that one must have been waited for.
  virtual Status submit(std::span<const SequenceStep> sequences) = 0;
  // Waits for the oldest step in flight and fills one result per sequence, in order.
  virtual Status wait(std::vector<SequenceResult>* results) = 0;
};

}  // namespace tokenspeed::runtime
