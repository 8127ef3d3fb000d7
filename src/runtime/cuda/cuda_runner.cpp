#include "runtime/cuda/cuda_runner.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <string>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/step.h"

namespace tokenspeed::runtime {
namespace {

constexpr int32_t kMostGraphTokens = 128;  // beyond it a step takes longer than its launches
constexpr int64_t kLeastContextClass = 1024;
constexpr int kPollsPerQuery = 4096;

// Whether the device finishes the sequence's rows. Everything else is worked out on the host.
bool is_plain(const SequenceStep& step) {
  if (step.logits_out || !step.next_tokens.empty()) return false;
  if (!step.sample) return true;
  const SamplingParameters& sampling = *step.sampling;
  return sampling.logprobs < 0 && sampling.repetition_penalty == 1.0f && sampling.presence_penalty == 0.0f &&
         sampling.frequency_penalty == 0.0f && sampling.logit_bias.empty() && step.allowed_tokens.empty();
}

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

// What the device writes into mapped host memory at the end of a step; the tokens follow.
struct Published {
  uint64_t number;
  uint64_t times[2];
};
int32_t* published_tokens(Published* published) { return reinterpret_cast<int32_t*>(published + 1); }

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

// Lays the step out in the input block.
Result<CudaRunner::GraphKey> CudaRunner::begin(std::span<const SequenceStep> sequences) {
  if (!fault_.ok()) return fault_;
  if (in_flight_) return internal_error("a step was submitted before the last one was waited for");
  TS_RETURN_IF_ERROR(batch_->assign(sequences));
  list_wanted_rows(sequences, &wanted_);
  wanted_rows_.clear();
  host_rows_.clear();
  sample_rows_.clear();
  const bool few = static_cast<int64_t>(wanted_.size()) <= capacity_.max_sequences;
  for (size_t i = 0; i < wanted_.size(); ++i) {
    const WantedRow& row = wanted_[i];
    wanted_rows_.push_back(batch_->first_row(static_cast<size_t>(row.sequence)) + row.index);
    const SequenceStep& step = sequences[row.sequence];
    const bool on_device = is_plain(step) && (few || !draws(step));
    if (!on_device) host_rows_.push_back(static_cast<int32_t>(i));
    if (few) sample_rows_.push_back(sample_row(step, on_device));
  }
  const bool any_draws =
      std::any_of(sample_rows_.begin(), sample_rows_.end(), [](const auto& row) { return row.temperature > 0; });
  one_group_ = static_cast<int64_t>(wanted_.size()) <= body_.program().logit_rows;
  results_.resize(sequences.size());
  for (SequenceResult& result : results_) clear(&result);
  sequences_ = sequences;
  input_->fill(*batch_, sequences, wanted_rows_, sample_rows_, ++number_);
  const kernels::SequenceBatch& batch = batch_->batch();
  const int64_t context = context_class(sequences);
  const bool planned = runs_planned(batch.sequences, batch.tokens, context);
  return GraphKey{batch.sequences, batch.tokens, planned ? context : 0, any_draws};
}

Status CudaRunner::submit(std::span<const SequenceStep> sequences) {
  TS_ASSIGN_OR_RETURN(const GraphKey key, begin(sequences));
  TS_RETURN_IF_ERROR(note_fault(run(key)));
  in_flight_ = true;
  return {};
}

Status CudaRunner::run(const GraphKey& key) {
  TS_RETURN_IF_ERROR(input_->send(rank_.streams[0]));
  const bool one_token_each = key.tokens == key.sequences && static_cast<int32_t>(wanted_.size()) == key.tokens;
  cudaGraphExec_t graph = nullptr;
  if (options_.graphs && one_group_ && one_token_each && key.tokens <= kMostGraphTokens) {
    TS_ASSIGN_OR_RETURN(graph, graph_of(key));
  }
  if (graph) {
    TS_RETURN_IF_ERROR(cuda_check(cudaGraphLaunch(graph, rank_.streams[0]), "launching the step's graph"));
  } else {
    TS_RETURN_IF_ERROR(enqueue_step(key));
  }
  return one_group_ ? fetch_logits(host_rows_, 0) : Status();
}

// Everything after the input block has been sent; captured for graphs.
Status CudaRunner::enqueue(const GraphKey& key, const LaunchObserver& observe) {
  TS_RETURN_IF_ERROR(input_->expand(key.sequences, key.tokens, rank_.streams[0]));
  const CudaStep step = input_->step(key.sequences, key.tokens, static_cast<int32_t>(wanted_.size()));
  const bool fused = runs_fused(key.tokens);
  TS_RETURN_IF_ERROR(key.max_context > 0 ? decode_.run_body(rank_, step, key.max_context, observe)
                                         : body_.run_body(rank_, step, observe));
  return one_group_ ? enqueue_sampling(key, step, fused, observe) : Status();
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
                                    const LaunchObserver& observe) {
  int32_t* tokens = reinterpret_cast<int32_t*>(tokens_.data());
  if (step.wanted_count > 0) {
    TS_RETURN_IF_ERROR(fused ? decode_.run_head(rank_, step, observe) : body_.run_head(rank_, step, observe));
    TS_ASSIGN_OR_RETURN(const bool sampled, shall_launch(observe, {}));
    const compile::Program& program = body_.program();
    const kernels::Rows logits = body_.rows(rank_, program.logits);
    const kernels::cuda::Launch launch = {.stream = rank_.streams[0], .dependent = false};
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
  auto* const published = reinterpret_cast<Published*>(published_.data());
  kernels::cuda::publish_tokens({step.wanted_count, tokens, input_->device_number(), input_->device_begin(),
                                 published_tokens(published), published->times, &published->number},
                                rank_.streams[0]);
  return cuda_check(cudaPeekAtLastError(), "publishing tokens");
}

Result<cudaGraphExec_t> CudaRunner::graph_of(const GraphKey& key) {
  const auto [known, first_use] = graphs_.try_emplace(key);
  if (first_use || known->second.get()) return known->second.get();
  TS_ASSIGN_OR_RETURN(known->second, capture([&] { return enqueue_step(key); }));
  return known->second.get();
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

CudaRunner::StepTimes CudaRunner::last_step_times() const {
  const auto* const published = reinterpret_cast<const Published*>(published_.data());
  if (published->number != number_ || in_flight_) return {};
  return {published->times[0], published->times[1]};
}

// Sends the logits of these of wanted_ to their places in logits_; `first` is the first one of the group in the arena.
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
  if (!in_flight_) return internal_error("waited for a step that was not submitted");
  in_flight_ = false;
  TS_RETURN_IF_ERROR(note_fault(one_group_ ? wait_for_tokens() : finish_groups()));
  results->swap(results_);
  return {};
}

Status CudaRunner::wait_for_tokens() {
  const volatile uint64_t* number = &reinterpret_cast<const Published*>(published_.data())->number;
  for (int polls = 0; *number != number_; ++polls) {
    if (polls % kPollsPerQuery != kPollsPerQuery - 1) continue;
    const cudaError_t state = cudaStreamQuery(rank_.streams[0]);
    if (state == cudaErrorNotReady) continue;
    TS_RETURN_IF_ERROR(cuda_check(state, "running a step"));
    if (*number != number_) {  // the stream is empty, so it is there by now or never
      return internal_error("step " + std::to_string(number_) + " ended on the GPU without its tokens; step " +
                            std::to_string(*number) + " was the last to publish any");
    }
  }
  std::atomic_thread_fence(std::memory_order_acquire);
  const int32_t* tokens = published_tokens(reinterpret_cast<Published*>(published_.data()));
  auto host_row = host_rows_.begin();
  for (size_t i = 0; i < wanted_.size(); ++i) {
    if (host_row != host_rows_.end() && *host_row == static_cast<int32_t>(i)) {
      ++host_row;
      continue;
    }
    const SequenceStep& step = sequences_[wanted_[i].sequence];
    SequenceResult& result = results_[wanted_[i].sequence];
    result.token = tokens[i];
    if (tokens[i] < 0) result.status = not_finite(int64_t{step.context} + wanted_[i].index);
  }
  if (host_rows_.empty()) return {};
  TS_RETURN_IF_ERROR(cuda_check(cudaStreamSynchronize(rank_.streams[0]), "running a step"));
  finish_rows(host_rows_, 0);
  return {};
}

// More rows than the head takes at once: group by group, logits to the host, then each row's results there.
Status CudaRunner::finish_groups() {
  const int64_t group = body_.program().logit_rows;
  const int64_t count = static_cast<int64_t>(wanted_.size());
  CudaStep step = input_->step(batch_->batch().sequences, batch_->batch().tokens, static_cast<int32_t>(wanted_.size()));
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
    finish_rows(indices, begin);
  }
  return {};
}

// Rows of one sequence in order, sequences side by side. `first` is the index of the first row in logits_.
void CudaRunner::finish_rows(std::span<const int32_t> indices, int64_t first) {
  std::vector<size_t> begins;
  for (size_t i = 0; i < indices.size(); ++i) {
    if (i == 0 || wanted_[indices[i]].sequence != wanted_[indices[i - 1]].sequence) begins.push_back(i);
  }
  begins.push_back(indices.size());
  const int64_t row_bytes = body_.rows(rank_, body_.program().logits).stride * 4;
  pool_->parallel_for(static_cast<int64_t>(begins.size()) - 1, [&](int64_t s) {
    for (size_t i = begins[s]; i < begins[s + 1]; ++i) {
      const WantedRow& row = wanted_[indices[i]];
      finish_row(row, sequences_[row.sequence],
                 reinterpret_cast<const float*>(logits_.data() + (indices[i] - first) * row_bytes),
                 capacity_.vocabulary_size, &results_[row.sequence]);
    }
  });
}

}  // namespace tokenspeed::runtime
