// From rows of logits in host memory to a step's results: which rows a step wants, and sampling, log probabilities and
// the check for NaN of each. Shared by runners whose logits reach the host.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/runner.h"

namespace tokenspeed::runtime {

// One row whose logits the step needs.
struct WantedRow {
  int32_t sequence = 0;
  int32_t index = 0;     // among the sequence's tokens of the step
  bool sampled = false;  // the token after it is to be sampled
};

// Replaces *wanted by the step's rows in order of sequence and index: all of a sequence whose logits go out, those with
// a next token for prompt logprobs, and the last one where a token is sampled.
void list_wanted_rows(std::span<const SequenceStep> sequences, std::vector<WantedRow>* wanted);

// The error of a request whose logits after `position` hold a NaN or an infinity.
Status not_finite(int64_t position);

// Fills what `row` owes to its sequence's result from its logits [vocabulary]. A NaN or infinity among them sets
// result->status (internal_error naming the position) and leaves the rest. May run for different sequences at once.
void finish_row(const WantedRow& row, const SequenceStep& step, const float* logits, int64_t vocabulary,
                SequenceResult* result);

}  // namespace tokenspeed::runtime
