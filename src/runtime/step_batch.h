// The host arrays of a step: what a SequenceBatch points at, sized once for the greatest step and refilled for each.
#pragma once

#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/types.h"
#include "runtime/runner.h"

namespace tokenspeed::runtime {

// The error of a step submitted while `in_flight` others are, as many as the runner takes.
Status too_many_steps(int32_t in_flight);

class StepBatch {
 public:
  explicit StepBatch(const Capacity& capacity);

  // Checks the sequences against the capacity and lays them out one after the other. `sampled` has an entry for every
  // sequence of the step in flight, kNotSampled or what stands for the token sampled for it: sequences with token_from
  // get it as their token id. invalid_argument names the sequence, the number and the limit; the batch is then as it
  // was.
  static constexpr int32_t kNotSampled = INT32_MIN;
  Status assign(std::span<const SequenceStep> sequences, std::span<const int32_t> sampled = {});

  const kernels::SequenceBatch& batch() const { return batch_; }
  const int32_t* token_ids() const { return ids_.data(); }
  int32_t first_row(size_t sequence) const { return token_begin_[sequence]; }

 private:
  Status check(std::span<const SequenceStep> sequences, std::span<const int32_t> sampled) const;

  const Capacity capacity_;
  const int64_t pages_per_sequence_;
  kernels::SequenceBatch batch_;
  std::vector<int32_t> ids_, token_begin_, context_, position_, sequence_, page_table_, state_in_, state_out_;
};

}  // namespace tokenspeed::runtime
