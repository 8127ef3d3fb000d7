// What the engine needs from a device: run one step of tokens for many sequences, sample, report.
//
// A Runner executes one Program per shape class on one device. The engine (host, logical) decides which sequences run
// and which pages and slots they read and write; the Runner owns the physical pages and slots, the weights and the
// logits. Invariant: a step's result for one sequence does not depend on the others in it (bit for bit on the CPU).
// submit() and wait() are split so that a device can work while the host plans; at most one step is in flight. The CPU
// runner computes inside submit().
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

// One sequence's share of a step. Spans must stay valid until wait() returns.
struct SequenceStep {
  std::span<const int32_t> tokens;               // new tokens, at positions [context, context + tokens.size())
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
};

class Runner {
 public:
  virtual ~Runner() = default;
  virtual const Capacity& capacity() const = 0;
  // Starts a step over `sequences` (1..max_sequences, their tokens together <= max_step_tokens). An error is a fault of
  // the device or a misuse; all sequences of the step are then lost.
  virtual Status submit(std::span<const SequenceStep> sequences) = 0;
  // Waits for the step and fills one result per sequence, in order.
  virtual Status wait(std::vector<SequenceResult>* results) = 0;
};

}  // namespace tokenspeed::runtime
