#include "runtime/cuda/step_input.h"

#include <algorithm>

namespace tokenspeed::runtime {
namespace {

constexpr int32_t kMostChanges = 1024;
constexpr int64_t kFewPages = 8;  // of one sequence; a longer change is copied whole
constexpr int64_t kAlignment = 64;

}  // namespace

Result<StepInput> StepInput::allocate(const Capacity& capacity) {
  StepInput input;
  input.capacity_ = capacity;
  input.pages_per_sequence_ = (capacity.max_model_length + capacity.page_size - 1) / capacity.page_size;
  int64_t end = 8;
  const auto place = [&](int64_t bytes) {
    const int64_t begin = (end + kAlignment - 1) / kAlignment * kAlignment;
    end = begin + bytes;
    return begin;
  };
  const int64_t sequences = capacity.max_sequences;
  Layout& layout = input.layout_;
  layout.change_count = place(4);
  layout.token_begin = place((sequences + 1) * 4);
  layout.context = place(sequences * 4);
  layout.state_in = place(sequences * 4);
  layout.state_out = place(sequences * 4);
  layout.wanted = place(sequences * 4);
  layout.sampling = place(sequences * static_cast<int64_t>(sizeof(kernels::cuda::DecodeSampleRow)));
  layout.changes = place(kMostChanges * static_cast<int64_t>(sizeof(kernels::cuda::PageChange)));
  layout.ids = place(int64_t{capacity.max_step_tokens} * 4);
  layout.more_wanted = place(int64_t{capacity.max_step_tokens} * 4);
  layout.bytes = end;
  const int64_t table_size = sequences * input.pages_per_sequence_;
  for (int block = 0; block < kMostStepsInFlight; ++block) {
    TS_ASSIGN_OR_RETURN(input.host_[block], PinnedMemory::allocate(layout.bytes, "the step's input"));
    TS_ASSIGN_OR_RETURN(input.long_pages_[block], PinnedMemory::allocate(table_size * 4, "the page table"));
    TS_ASSIGN_OR_RETURN(input.device_[block], DeviceMemory::allocate(layout.bytes, "the step's input"));
  }
  input.table_mirror_.resize(static_cast<size_t>(table_size));
  TS_ASSIGN_OR_RETURN(input.position_, DeviceMemory::allocate(int64_t{capacity.max_step_tokens} * 4, "positions"));
  TS_ASSIGN_OR_RETURN(input.sequence_,
                      DeviceMemory::allocate(int64_t{capacity.max_step_tokens} * 4, "sequence numbers"));
  TS_ASSIGN_OR_RETURN(input.table_, DeviceMemory::allocate(table_size * 4, "the page table"));
  TS_ASSIGN_OR_RETURN(input.times_, DeviceMemory::allocate(kMostStepsInFlight * 16, "the step's times"));
  return input;
}

void StepInput::note_pages(int32_t sequence, const SequenceStep& step) {
  int32_t* mirror = table_mirror_.data() + sequence * pages_per_sequence_;
  const int64_t needed =
      (step.context + static_cast<int64_t>(step.tokens.size()) + capacity_.page_size - 1) / capacity_.page_size;
  const int64_t count = std::min(needed, pages_per_sequence_);
  const int64_t first = std::mismatch(mirror, mirror + count, step.pages.begin()).first - mirror;
  if (first == count) return;
  int64_t last = count - 1;
  while (mirror[last] == step.pages[last]) --last;
  int32_t& changes = *at<int32_t>(host(), layout_.change_count);
  const bool listed = last - first < kFewPages && changes + last - first < kMostChanges;
  for (int64_t i = first; i <= last; ++i) {
    mirror[i] = step.pages[i];
    const int64_t index = sequence * pages_per_sequence_ + i;
    if (listed)
      at<kernels::cuda::PageChange>(host(), layout_.changes)[changes++] = {static_cast<int32_t>(index), mirror[i]};
  }
  if (listed) return;
  const Range range = {sequence * pages_per_sequence_ + first, last - first + 1};
  std::copy_n(mirror + first, range.size, at<int32_t>(long_pages_[block_].data(), 0) + range.begin);
  long_changes_.push_back(range);
}

void StepInput::fill(const StepBatch& batch, std::span<const SequenceStep> sequences, std::span<const int32_t> wanted,
                     std::span<const kernels::cuda::DecodeSampleRow> sampling, uint64_t number) {
  block_ = static_cast<int32_t>(number % kMostStepsInFlight);
  std::byte* host = this->host();
  const kernels::SequenceBatch& from = batch.batch();
  *at<uint64_t>(host, 0) = number;
  *at<int32_t>(host, layout_.change_count) = 0;
  std::copy_n(from.token_begin, from.sequences + 1, at<int32_t>(host, layout_.token_begin));
  std::copy_n(from.context, from.sequences, at<int32_t>(host, layout_.context));
  std::copy_n(from.state_in, from.sequences, at<int32_t>(host, layout_.state_in));
  std::copy_n(from.state_out, from.sequences, at<int32_t>(host, layout_.state_out));
  std::copy_n(batch.token_ids(), from.tokens, at<int32_t>(host, layout_.ids));
  std::copy(sampling.begin(), sampling.end(), at<kernels::cuda::DecodeSampleRow>(host, layout_.sampling));
  const bool few = few_wanted(static_cast<int32_t>(wanted.size()));
  std::copy(wanted.begin(), wanted.end(), at<int32_t>(host, few ? layout_.wanted : layout_.more_wanted));
  used_bytes_ = few ? layout_.ids + int64_t{from.tokens} * 4 : layout_.bytes;
  long_changes_.clear();
  for (size_t s = 0; s < sequences.size(); ++s) note_pages(static_cast<int32_t>(s), sequences[s]);
}

Status StepInput::send(cudaStream_t stream) const {
  return cuda_check(cudaMemcpyAsync(device(), host(), static_cast<size_t>(used_bytes_), cudaMemcpyHostToDevice, stream),
                    "sending the step's input");
}

Status StepInput::send_pages(cudaStream_t stream) const {
  for (const Range& range : long_changes_) {
    TS_RETURN_IF_ERROR(cuda_check(cudaMemcpyAsync(at<int32_t>(table_.data(), 0) + range.begin,
                                                  at<int32_t>(long_pages_[block_].data(), 0) + range.begin,
                                                  static_cast<size_t>(range.size) * 4, cudaMemcpyHostToDevice, stream),
                                  "sending page numbers"));
  }
  return {};
}

Status StepInput::expand(int32_t sequences, int32_t tokens, const int32_t* sampled, cudaStream_t stream) const {
  kernels::cuda::ExpandBatch args;
  args.sequences = sequences;
  args.tokens = tokens;
  args.token_begin = at<const int32_t>(device(), layout_.token_begin);
  args.context = at<const int32_t>(device(), layout_.context);
  args.changes = at<const kernels::cuda::PageChange>(device(), layout_.changes);
  args.change_count = at<const int32_t>(device(), layout_.change_count);
  args.sampled = sampled;
  args.ids = at<int32_t>(device(), layout_.ids);
  args.position = at<int32_t>(position_.data(), 0);
  args.sequence = at<int32_t>(sequence_.data(), 0);
  args.page_table = at<int32_t>(table_.data(), 0);
  args.begin_ns = device_times();
  kernels::cuda::expand_batch(args, stream);
  return cuda_check(cudaPeekAtLastError(), "expanding the step's input");
}

CudaStep StepInput::step(int32_t sequences, int32_t tokens, int32_t wanted) const {
  CudaStep step;
  step.batch.sequences = sequences;
  step.batch.tokens = tokens;
  step.batch.token_begin = at<const int32_t>(device(), layout_.token_begin);
  step.batch.context = at<const int32_t>(device(), layout_.context);
  step.batch.position = at<const int32_t>(position_.data(), 0);
  step.batch.sequence = at<const int32_t>(sequence_.data(), 0);
  step.batch.page_table = at<const int32_t>(table_.data(), 0);
  step.batch.page_table_stride = pages_per_sequence_;
  step.batch.state_in = at<const int32_t>(device(), layout_.state_in);
  step.batch.state_out = at<const int32_t>(device(), layout_.state_out);
  step.token_ids = at<const int32_t>(device(), layout_.ids);
  step.wanted = at<const int32_t>(device(), few_wanted(wanted) ? layout_.wanted : layout_.more_wanted);
  step.wanted_count = wanted;
  return step;
}

}  // namespace tokenspeed::runtime
