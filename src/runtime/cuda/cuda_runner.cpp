#include "runtime/cuda/cuda_runner.h"

#include <algorithm>
#include <bit>
#include <string>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/step.h"

namespace tokenspeed::runtime {
namespace {

constexpr int32_t kMostGraphTokens = 128;  // beyond it a step takes longer than its launches
constexpr int64_t kLeastContextClass = 1024;
constexpr int kPollsPerQuery = 4096;

bool draws(const SequenceStep& step) { return step.sample && step.sampling->temperature > 0; }

kernels::cuda::DecodeSampleRow sample_row(const SequenceStep& step, bool on_device) {
  kernels::cuda::DecodeSampleRow row = {.temperature = 0};
  if (!on_device || !draws(step)) return row;
  const SamplingParameters& sampling = *step.sampling;
  row.temperature = sampling.temperature;
  row.top_p = sampling.top_p;
  row.min_p = sampling.min_p;
  row.top_k = sampling.top_k;
  row.seed = sampling.seed;
  row.position = step.context + static_cast<int64_t>(step.tokens.size());
  return row;
}

void clear(SequenceResult* result) {
  result->token = -1;
  result->status = Status();
  result->logprobs.clear();
  result->prompt_logprobs.clear();
}

}  // namespace

CudaRunner::~CudaRunner() {
  for (const Stream& stream : streams_) {
    if (stream.get()) cudaStreamSynchronize(stream.get());
  }
}

Status CudaRunner::check_can_follow() const {
  if (!fault_.ok()) return fault_;
  if (in_flight_ == kMostStepsInFlight) return too_many_steps(in_flight_);
  if (in_flight_ == 0 || last().host_rows.empty()) return {};
  return internal_error(
      "a step was submitted behind one with rows that the host finishes; that one must have been waited for");
}

// Lays the step out in its input block. An error leaves everything as it was.
Result<CudaRunner::GraphKey> CudaRunner::begin(std::span<const SequenceStep> sequences) {
  TS_RETURN_IF_ERROR(check_can_follow());
  TS_RETURN_IF_ERROR(batch_->assign(sequences, sampled_));
  Submitted& step = step_of(++number_);
  step.number = number_;
  step.sequences = sequences;
  step.results.resize(sequences.size());
  for (SequenceResult& result : step.results) clear(&result);
  list_rows(sequences, &step);
  input_->fill(*batch_, sequences, wanted_rows_, sample_rows_, number_);
  step.times = step.one_group ? input_->device_times() : nullptr;
  const bool any_draws =
      std::any_of(sample_rows_.begin(), sample_rows_.end(), [](const auto& row) { return row.temperature > 0; });
  const kernels::SequenceBatch& batch = batch_->batch();
  const int64_t context = context_class(sequences);
  const bool planned = runs_planned(batch.sequences, batch.tokens, context);
  return GraphKey{batch.sequences, batch.tokens, planned ? context : 0, any_draws};
}

// The rows whose logits the step needs, and who finishes them.
void CudaRunner::list_rows(std::span<const SequenceStep> sequences, Submitted* step) {
  list_wanted_rows(sequences, &step->wanted);
  step->host_rows.clear();
  wanted_rows_.clear();
  sample_rows_.clear();
  sampled_.assign(sequences.size(), StepBatch::kNotSampled);
  const int64_t count = static_cast<int64_t>(step->wanted.size());
  const bool few = count <= capacity_.max_sequences;
  step->one_group = count <= body_.program().logit_rows;
  for (int32_t i = 0; i < count; ++i) {
    const WantedRow& row = step->wanted[i];
    wanted_rows_.push_back(batch_->first_row(static_cast<size_t>(row.sequence)) + row.index);
    const SequenceStep& sequence = sequences[row.sequence];
    const bool on_device = finishes_on_device(sequence) && (few || !draws(sequence));
    if (on_device) {
      sampled_[row.sequence] = ~i;
    } else {
      step->host_rows.push_back(i);
    }
    if (few) sample_rows_.push_back(sample_row(sequence, on_device));
  }
}

Status CudaRunner::submit(std::span<const SequenceStep> sequences) {
  TS_ASSIGN_OR_RETURN(const GraphKey key, begin(sequences));
  Status status = note_fault(run(key));
  if (status.ok()) {
    ++in_flight_;
    return status;
  }
  cudaDeviceSynchronize();  // what was enqueued has done with the block, which is the next step's, too
  ++number_;                // and the next step's number is another one of the same parity
  sampled_.clear();
  return status;
}

Status CudaRunner::run(const GraphKey& key) {
  const Submitted& step = last();
  TS_RETURN_IF_ERROR(send_input());
  const bool one_token_each = key.tokens == key.sequences && static_cast<int32_t>(step.wanted.size()) == key.tokens;
  cudaGraphExec_t graph = nullptr;
  if (options_.graphs && step.one_group && one_token_each && key.tokens <= kMostGraphTokens) {
    TS_ASSIGN_OR_RETURN(graph, graph_of(key));
  }
  if (graph) {
    TS_RETURN_IF_ERROR(cuda_check(cudaGraphLaunch(graph, rank_.streams[0]), "launching the step's graph"));
  } else {
    TS_RETURN_IF_ERROR(enqueue_step(key));
  }
  return step.one_group ? fetch_logits(step.host_rows, 0) : Status();
}

// Behind a step in flight the copy goes beside it, so that it is no part of the time between the two.
Status CudaRunner::send_input() {
  const cudaStream_t stream = rank_.streams[0];
  TS_RETURN_IF_ERROR(input_->send_pages(stream));
  if (in_flight_ == 0) return input_->send(stream);
  TS_RETURN_IF_ERROR(input_->send(input_stream_.get()));
  TS_RETURN_IF_ERROR(cuda_check(cudaEventRecord(input_sent_.get(), input_stream_.get()), "recording an event"));
  return cuda_check(cudaStreamWaitEvent(stream, input_sent_.get()), "waiting for the step's input");
}

// Everything after the input block has been sent; captured for graphs.
// apart: see DecodePlan::run_body().
Status CudaRunner::enqueue(const GraphKey& key, const LaunchObserver& observe, bool apart) {
  TS_RETURN_IF_ERROR(
      input_->expand(key.sequences, key.tokens, reinterpret_cast<const int32_t*>(tokens_.data()), rank_.streams[0]));
  const CudaStep step = input_->step(key.sequences, key.tokens, static_cast<int32_t>(last().wanted.size()));
  const bool fused = runs_fused(key.tokens);
  TS_RETURN_IF_ERROR(key.max_context > 0 ? decode_.run_body(rank_, step, key.max_context, observe, apart)
                                         : body_.run_body(rank_, step, observe));
  return last().one_group ? enqueue_sampling(key, step, fused, observe, apart) : Status();
}

// Positions no sequence of the step reaches beyond: a power of two, so that a captured step serves for long.
int64_t CudaRunner::context_class(std::span<const SequenceStep> sequences) const {
  int64_t longest = kLeastContextClass;
  for (const SequenceStep& step : sequences) {
    longest = std::max(longest, step.context + static_cast<int64_t>(step.tokens.size()));
  }
  const int64_t rounded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(longest)));
  return std::min<int64_t>(rounded, std::max<int64_t>(capacity_.max_model_length, longest));
}

Status CudaRunner::enqueue_sampling(const GraphKey& key, const CudaStep& step, bool fused,
                                    const LaunchObserver& observe, bool apart) {
  int32_t* tokens = reinterpret_cast<int32_t*>(tokens_.data());
  if (step.wanted_count > 0) {
    TS_RETURN_IF_ERROR(fused ? decode_.run_head(rank_, step, observe, apart) : body_.run_head(rank_, step, observe));
    TS_ASSIGN_OR_RETURN(const bool sampled, shall_launch(observe, {}));
    const compile::Program& program = body_.program();
    const kernels::Rows logits = body_.rows(rank_, program.logits);
    const kernels::cuda::Launch launch = {.stream = rank_.streams[0]};
    for (int64_t row = 0; sampled && row < step.wanted_count; row += kernels::cuda::kDecodeTokens) {
      const int64_t rows = std::min<int64_t>(step.wanted_count - row, kernels::cuda::kDecodeTokens);
      const float* from = static_cast<const float*>(logits.data) + row * logits.stride;
      TS_RETURN_IF_ERROR(key.draws ? kernels::cuda::decode_sample({rows, program.vocabulary_size, from, logits.stride,
                                                                   input_->device_sampling() + row, tokens + row},
                                                                  launch)
                                   : kernels::cuda::decode_argmax({rows, program.vocabulary_size, from, logits.stride,
                                                                   tokens + row, sample_workspace_.data()},
                                                                  launch));
    }
  }
  kernels::cuda::publish_tokens({step.wanted_count, tokens, input_->device_number(), input_->device_times() + 1,
                                 reinterpret_cast<uint64_t*>(published_[input_->block()].data())},
                                rank_.streams[0]);
  return cuda_check(cudaPeekAtLastError(), "publishing tokens");
}

Result<cudaGraphExec_t> CudaRunner::graph_of(const GraphKey& key) {
  const auto [known, first_use] = graphs_.try_emplace(key);
  GraphExec& graph = known->second.of_block[input_->block()];
  if (first_use || graph.get()) return graph.get();
  TS_ASSIGN_OR_RETURN(graph, capture([&] { return enqueue_step(key); }));
  return graph.get();
}

Result<CudaRunner::GraphExec> CudaRunner::capture(const std::function<Status()>& enqueue_all) {
  const cudaStream_t stream = rank_.streams[0];
  TS_RETURN_IF_ERROR(cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a step"));
  const Status enqueued = enqueue_all();
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
  const CudaOwner<cudaGraph_t, cudaGraphDestroy> owner(graph);
  TS_RETURN_IF_ERROR(enqueued);
  TS_RETURN_IF_ERROR(cuda_check(ended, "capturing a step"));
  cudaGraphExec_t executable = nullptr;
  TS_RETURN_IF_ERROR(cuda_check(cudaGraphInstantiate(&executable, graph, 0), "instantiating a step's graph"));
  return GraphExec(executable);
}

Result<CudaRunner::StepTimes> CudaRunner::last_step_times() const {
  if (!times_ || !times_before_) return StepTimes{};
  StepTimes times;
  const auto fetch = [&](uint64_t* to, const uint64_t* from) {
    return cuda_check(cudaMemcpyAsync(to, from, sizeof(*to), cudaMemcpyDeviceToHost, input_stream_.get()),
                      "reading times");
  };
  TS_RETURN_IF_ERROR(fetch(&times.begin, times_));
  TS_RETURN_IF_ERROR(fetch(&times.end_before, times_before_ + 1));
  TS_RETURN_IF_ERROR(cuda_check(cudaStreamSynchronize(input_stream_.get()), "reading times"));
  return times;
}

// Sends the logits of these of the wanted rows to their places in logits_; `first` is the first one of the group in the
// arena.
Status CudaRunner::fetch_logits(std::span<const int32_t> indices, int64_t first) {
  const kernels::Rows logits = body_.rows(rank_, body_.program().logits);
  const int64_t row_bytes = logits.stride * 4;
  for (size_t i = 0, end = 0; i < indices.size(); i = end) {
    for (end = i + 1; end < indices.size() && indices[end] == indices[end - 1] + 1;) ++end;
    const int64_t offset = (indices[i] - first) * row_bytes;
    TS_RETURN_IF_ERROR(cuda_check(
        cudaMemcpyAsync(logits_.data() + offset, static_cast<const std::byte*>(logits.data) + offset,
                        (end - i) * static_cast<size_t>(row_bytes), cudaMemcpyDeviceToHost, rank_.streams[0]),
        "fetching logits"));
  }
  return {};
}

Status CudaRunner::wait(std::vector<SequenceResult>* results) {
  if (in_flight_ == 0) return internal_error("waited for a step that was not submitted");
  Submitted& step = step_of(number_ - static_cast<uint64_t>(--in_flight_));
  if (in_flight_ == 0) sampled_.clear();
  if (!fault_.ok()) return fault_;
  times_ = step.times;
  times_before_ = step_of(step.number - 1).times;
  TS_RETURN_IF_ERROR(note_fault(step.one_group ? wait_for_tokens(&step) : finish_groups(&step)));
  results->swap(step.results);
  return {};
}

// The token that the device publishes as the step's `index`-th.
Result<int32_t> CudaRunner::wait_for_token(const Submitted& step, size_t index) {
  const auto* words = reinterpret_cast<const uint64_t*>(published_[step.number % kMostStepsInFlight].data());
  const volatile uint64_t& word = words[index];
  const auto number = static_cast<uint32_t>(step.number);
  uint64_t seen = word;
  for (int polls = 0; seen >> 32 != number; ++polls, seen = word) {
    if (polls % kPollsPerQuery != kPollsPerQuery - 1) continue;
    const cudaError_t state = cudaStreamQuery(rank_.streams[0]);
    if (state == cudaErrorNotReady) continue;
    TS_RETURN_IF_ERROR(cuda_check(state, "running a step"));
    if (word >> 32 != number) {  // the stream is empty, so it is there by now or never
      return internal_error("step " + std::to_string(number) +
                            " ended on the GPU without its tokens; in their place are those of step " +
                            std::to_string(word >> 32));
    }
  }
  return static_cast<int32_t>(static_cast<uint32_t>(seen));
}

Status CudaRunner::wait_for_tokens(Submitted* step) {
  if (step->wanted.empty()) return wait_for_token(*step, 0).status();
  auto host_row = step->host_rows.begin();
  for (size_t i = 0; i < step->wanted.size(); ++i) {
    if (host_row != step->host_rows.end() && *host_row == static_cast<int32_t>(i)) {
      ++host_row;
      continue;
    }
    const WantedRow& row = step->wanted[i];
    SequenceResult& result = step->results[row.sequence];
    TS_ASSIGN_OR_RETURN(result.token, wait_for_token(*step, i));
    if (result.token < 0) result.status = not_finite(int64_t{step->sequences[row.sequence].context} + row.index);
  }
  if (step->host_rows.empty()) return {};
  TS_RETURN_IF_ERROR(cuda_check(cudaStreamSynchronize(rank_.streams[0]), "running a step"));
  finish_rows(step, step->host_rows, 0);
  return {};
}

// More rows than the head takes at once: group by group, logits to the host, then each row's results there. It is the
// last step submitted, so the arena and the input block are still its own.
Status CudaRunner::finish_groups(Submitted* submitted) {
  const int64_t group = body_.program().logit_rows;
  const int64_t count = static_cast<int64_t>(submitted->wanted.size());
  CudaStep step = input_->step(batch_->batch().sequences, batch_->batch().tokens, static_cast<int32_t>(count));
  const int32_t* rows = step.wanted;
  std::vector<int32_t> indices;
  for (int64_t begin = 0; begin < count; begin += group) {
    const int64_t end = std::min(begin + group, count);
    step.wanted = rows + begin;
    step.wanted_count = static_cast<int32_t>(end - begin);
    TS_RETURN_IF_ERROR(body_.run_head(rank_, step));
    indices.clear();
    for (int64_t i = begin; i < end; ++i) indices.push_back(static_cast<int32_t>(i));
    TS_RETURN_IF_ERROR(fetch_logits(indices, begin));
    TS_RETURN_IF_ERROR(cuda_check(cudaStreamSynchronize(rank_.streams[0]), "running a step"));
    finish_rows(submitted, indices, begin);
  }
  return {};
}

// Rows of one sequence in order, sequences side by side. `first` is the index of the first row in logits_.
void CudaRunner::finish_rows(Submitted* step, std::span<const int32_t> indices, int64_t first) {
  std::vector<size_t> begins;
  for (size_t i = 0; i < indices.size(); ++i) {
    if (i == 0 || step->wanted[indices[i]].sequence != step->wanted[indices[i - 1]].sequence) begins.push_back(i);
  }
  begins.push_back(indices.size());
  const int64_t row_bytes = body_.rows(rank_, body_.program().logits).stride * 4;
  pool_->parallel_for(static_cast<int64_t>(begins.size()) - 1, [&](int64_t s) {
    for (size_t i = begins[s]; i < begins[s + 1]; ++i) {
      const WantedRow& row = step->wanted[indices[i]];
      finish_row(row, step->sequences[row.sequence],
                 reinterpret_cast<const float*>(logits_.data() + (indices[i] - first) * row_bytes),
                 capacity_.vocabulary_size, &step->results[row.sequence]);
    }
  });
}

}  // namespace tokenspeed::runtime
