#include "runtime/cpu_runner.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace tokenspeed::runtime {
namespace {

void store(const float* from, int64_t count, const kernels::Rows& to) {
  if (to.dtype == DType::kFloat32) {
    std::copy_n(from, count, static_cast<float*>(to.data));
  } else {
    std::transform(from, from + count, static_cast<BFloat16*>(to.data), to_bfloat16);
  }
}

void fetch(const kernels::Rows& from, int64_t count, float* to) {
  if (from.dtype == DType::kFloat32) {
    std::copy_n(static_cast<const float*>(from.data), count, to);
  } else {
    std::transform(static_cast<const BFloat16*>(from.data), static_cast<const BFloat16*>(from.data) + count, to,
                   [](BFloat16 value) { return to_float(value); });
  }
}

void clear(SequenceResult* result) {
  result->token = -1;
  result->status = Status();
  result->logprobs.clear();
  result->prompt_logprobs.clear();
}

}  // namespace

Status CpuRunner::submit(std::span<const SequenceStep> sequences) {
  if (in_flight_ == capacity_.steps_in_flight) return too_many_steps(in_flight_);
  TS_RETURN_IF_ERROR(batch_->assign(sequences, sampled_));
  std::vector<SequenceResult>& results = results_[in_flight_];
  results.resize(sequences.size());
  for (SequenceResult& result : results) clear(&result);
  const CpuProgram& program = batch_->batch().tokens <= small_.program().tokens ? small_ : large_;
  program.run_body(rank_, step());
  last_ = &program;
  run_head(program, sequences, results.data());
  sampled_.clear();
  for (size_t i = 0; i < sequences.size(); ++i) {
    sampled_.push_back(sequences[i].sample ? std::max(results[i].token, 0) : StepBatch::kNotSampled);
  }
  ++in_flight_;
  return {};
}

Result<std::vector<LaunchTime>> CpuRunner::profile(std::span<const SequenceStep> sequences,
                                                   std::vector<SequenceResult>* results) {
  operation_seconds_.assign(program().operations.size(), 0);
  const auto start = std::chrono::steady_clock::now();
  const Status submitted = submit(sequences);
  const std::chrono::duration<double> whole = std::chrono::steady_clock::now() - start;
  const std::vector<double> seconds = std::exchange(operation_seconds_, {});
  TS_RETURN_IF_ERROR(submitted);
  TS_RETURN_IF_ERROR(wait(results));
  std::vector<LaunchTime> launches;
  double rest = whole.count();
  for (size_t i = 0; i < seconds.size(); ++i) {
    launches.push_back({{{.operation = static_cast<int32_t>(i)}}, seconds[i]});
    rest -= seconds[i];
  }
  launches.push_back({{}, rest});
  return launches;
}

Status CpuRunner::wait(std::vector<SequenceResult>* results) {
  if (in_flight_ == 0) return internal_error("waited for a step that was not submitted");
  if (--in_flight_ == 0) sampled_.clear();
  results->swap(results_[0]);
  results_[0].swap(results_[1]);
  return {};
}

void CpuRunner::run_head(const CpuProgram& program, std::span<const SequenceStep> sequences, SequenceResult* results) {
  list_wanted_rows(sequences, &wanted_);
  wanted_rows_.clear();
  for (const WantedRow& row : wanted_) {
    wanted_rows_.push_back(batch_->first_row(static_cast<size_t>(row.sequence)) + row.index);
  }
  const size_t group = static_cast<size_t>(program.program().logit_rows);
  for (size_t begin = 0; begin < wanted_.size(); begin += group) {
    const size_t end = std::min(begin + group, wanted_.size());
    CpuStep head = step();
    head.wanted = wanted_rows_.data() + begin;
    head.wanted_count = static_cast<int32_t>(end - begin);
    program.run_head(rank_, head);
    finish_rows(program, sequences, begin, end, results);
  }
}

// Rows of one sequence are finished in order, sequences side by side.
void CpuRunner::finish_rows(const CpuProgram& program, std::span<const SequenceStep> sequences, size_t begin,
                            size_t end, SequenceResult* results) {
  sequence_begins_.clear();
  for (size_t i = begin; i < end; ++i) {
    if (i == begin || wanted_[i].sequence != wanted_[i - 1].sequence) sequence_begins_.push_back(i);
  }
  const int64_t count = static_cast<int64_t>(sequence_begins_.size());
  sequence_begins_.push_back(end);
  pool_->parallel_for(count, [&](int64_t s) {
    for (size_t i = sequence_begins_[s]; i < sequence_begins_[s + 1]; ++i) {
      const WantedRow& row = wanted_[i];
      const kernels::Rows logits = program.rows(rank_, program.program().logits, static_cast<int64_t>(i - begin));
      finish_row(row, sequences[row.sequence], static_cast<const float*>(logits.data), capacity_.vocabulary_size,
                 &results[row.sequence]);
    }
  });
}

std::vector<float> CpuRunner::last_hidden() const {
  if (last_ == nullptr) return {};
  const int64_t columns = last_->program().hidden_size;
  std::vector<float> hidden(static_cast<size_t>(batch_->batch().tokens * columns));
  for (int64_t row = 0; row < batch_->batch().tokens; ++row) {
    fetch(last_->rows(rank_, last_->program().hidden, row), columns, hidden.data() + row * columns);
  }
  return hidden;
}

Status CpuRunner::run_mtp(const MtpStep& mtp) {
  if (!mtp_) return failed_precondition("model '" + large_.program().name + "' has no multi-token-prediction layer");
  const compile::Program& program = mtp_->program();
  const int64_t columns = program.hidden_size;
  const int64_t rows = static_cast<int64_t>(mtp.tokens.size());
  if (static_cast<int64_t>(mtp.hidden.size()) != rows * columns) {
    return invalid_argument("the MTP layer got " + std::to_string(mtp.hidden.size()) + " hidden elements for " +
                            std::to_string(rows) + " tokens of " + std::to_string(columns));
  }
  const SequenceStep sequence{.tokens = mtp.tokens, .context = mtp.context, .pages = mtp.pages};
  TS_RETURN_IF_ERROR(batch_->assign({&sequence, 1}));
  last_ = nullptr;
  for (int64_t row = 0; row < rows; ++row) {
    store(mtp.hidden.data() + row * columns, columns, mtp_->rows(rank_, program.hidden_in, row));
  }
  mtp_->run_body(rank_, step());
  if (mtp.hidden_out) {
    for (int64_t row = 0; row < rows; ++row) {
      fetch(mtp_->rows(rank_, program.hidden, row), columns, mtp.hidden_out + row * columns);
    }
  }
  if (mtp.logits_out) {
    const int32_t last = static_cast<int32_t>(rows) - 1;
    CpuStep head = step();
    head.wanted = &last;
    head.wanted_count = 1;
    mtp_->run_head(rank_, head);
    fetch(mtp_->rows(rank_, program.logits), program.vocabulary_size, mtp.logits_out);
  }
  return {};
}

}  // namespace tokenspeed::runtime
