#include "runtime/step_batch.h"

#include <algorithm>
#include <string>

namespace tokenspeed::runtime {
namespace {

Status refuse(size_t sequence, const std::string& what, int64_t value, int64_t limit) {
  return invalid_argument("sequence " + std::to_string(sequence) + " of the step has " + what + " " +
                          std::to_string(value) + "; the limit is " + std::to_string(limit));
}

Status check_token(size_t index, const SequenceStep& step, std::span<const int32_t> sampled) {
  if (step.tokens.size() != 1)
    return refuse(index, "a token of the step in flight and new tokens:", static_cast<int64_t>(step.tokens.size()), 1);
  const auto from = static_cast<size_t>(step.token_from);
  if (from < sampled.size() && sampled[from] != StepBatch::kNotSampled) return {};
  return invalid_argument("sequence " + std::to_string(index) + " of the step wants the token of sequence " +
                          std::to_string(step.token_from) + " of the step in flight, which samples none");
}

Status check_sequence(size_t index, const SequenceStep& step, const Capacity& capacity,
                      std::span<const int32_t> sampled) {
  const int64_t end = step.context + static_cast<int64_t>(step.tokens.size());
  if (step.tokens.empty()) return refuse(index, "a number of tokens of", 0, capacity.max_step_tokens);
  if (step.context < 0 || end > capacity.max_model_length)
    return refuse(index, "its last position at", end, capacity.max_model_length);
  if (static_cast<int64_t>(step.pages.size()) * capacity.page_size < end) {
    return refuse(index, "positions up to", end, static_cast<int64_t>(step.pages.size()) * capacity.page_size);
  }
  if (step.token_from >= 0) TS_RETURN_IF_ERROR(check_token(index, step, sampled));
  for (int32_t id : step.token_from >= 0 ? std::span<const int32_t>() : step.tokens) {
    if (id < 0 || id >= capacity.vocabulary_size) return refuse(index, "the token id", id, capacity.vocabulary_size);
  }
  for (int32_t page : step.pages) {
    if (page < 0 || page >= capacity.pages) return refuse(index, "the KV page", page, capacity.pages);
  }
  if (step.state_in < -1 || step.state_in >= capacity.state_slots)
    return refuse(index, "the state slot", step.state_in, capacity.state_slots);
  if (step.state_out < 0 || step.state_out >= capacity.state_slots)
    return refuse(index, "the state slot", step.state_out, capacity.state_slots);
  if (step.next_tokens.size() > step.tokens.size()) {
    return refuse(index, "next tokens for prompt logprobs:", static_cast<int64_t>(step.next_tokens.size()),
                  static_cast<int64_t>(step.tokens.size()));
  }
  for (int32_t id : step.next_tokens) {
    if (id < 0 || id >= capacity.vocabulary_size) return refuse(index, "the token id", id, capacity.vocabulary_size);
  }
  if ((step.sample || !step.next_tokens.empty()) && step.sampling == nullptr) {
    return invalid_argument("sequence " + std::to_string(index) +
                            " of the step wants tokens but gives no sampling parameters");
  }
  return {};
}

}  // namespace

Status too_many_steps(int32_t in_flight) {
  return internal_error("a step was submitted while " + std::to_string(in_flight) +
                        " in flight had not been waited for");
}

StepBatch::StepBatch(const Capacity& capacity)
    : capacity_(capacity),
      pages_per_sequence_((capacity.max_model_length + capacity.page_size - 1) / capacity.page_size),
      ids_(capacity.max_step_tokens),
      token_begin_(capacity.max_sequences + 1),
      context_(capacity.max_sequences),
      position_(capacity.max_step_tokens),
      sequence_(capacity.max_step_tokens),
      page_table_(static_cast<size_t>(capacity.max_sequences * pages_per_sequence_)),
      state_in_(capacity.max_sequences),
      state_out_(capacity.max_sequences) {
  batch_.token_begin = token_begin_.data();
  batch_.context = context_.data();
  batch_.position = position_.data();
  batch_.sequence = sequence_.data();
  batch_.page_table = page_table_.data();
  batch_.page_table_stride = pages_per_sequence_;
  batch_.state_in = state_in_.data();
  batch_.state_out = state_out_.data();
}

Status StepBatch::check(std::span<const SequenceStep> sequences, std::span<const int32_t> sampled) const {
  if (sequences.empty() || sequences.size() > static_cast<size_t>(capacity_.max_sequences)) {
    return invalid_argument("a step has " + std::to_string(sequences.size()) + " sequences; it must have 1 to " +
                            std::to_string(capacity_.max_sequences));
  }
  int64_t tokens = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    TS_RETURN_IF_ERROR(check_sequence(i, sequences[i], capacity_, sampled));
    tokens += static_cast<int64_t>(sequences[i].tokens.size());
  }
  if (tokens > capacity_.max_step_tokens) {
    return invalid_argument("a step has " + std::to_string(tokens) + " tokens; the limit is " +
                            std::to_string(capacity_.max_step_tokens));
  }
  return {};
}

Status StepBatch::assign(std::span<const SequenceStep> sequences, std::span<const int32_t> sampled) {
  TS_RETURN_IF_ERROR(check(sequences, sampled));
  int32_t row = 0;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const SequenceStep& step = sequences[s];
    token_begin_[s] = row;
    context_[s] = step.context;
    state_in_[s] = step.state_in;
    state_out_[s] = step.state_out;
    const size_t pages = std::min(step.pages.size(), static_cast<size_t>(pages_per_sequence_));
    std::copy_n(step.pages.begin(), pages, page_table_.begin() + static_cast<int64_t>(s) * pages_per_sequence_);
    for (size_t i = 0; i < step.tokens.size(); ++i, ++row) {
      ids_[row] = step.token_from >= 0 ? sampled[step.token_from] : step.tokens[i];
      position_[row] = step.context + static_cast<int32_t>(i);
      sequence_[row] = static_cast<int32_t>(s);
    }
  }
  token_begin_[sequences.size()] = row;
  batch_.sequences = static_cast<int32_t>(sequences.size());
  batch_.tokens = row;
  return {};
}

}  // namespace tokenspeed::runtime
