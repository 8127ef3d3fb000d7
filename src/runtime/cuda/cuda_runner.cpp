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

// Random draws, penalties, biases and log probabilities are worked out on the host.
bool is_plain(const SequenceStep& step) {
  if (step.logits_out || !step.next_tokens.empty()) return false;
  if (!step.sample) return true;
  const SamplingParameters& sampling = *step.sampling;
  return sampling.temperature == 0 && sampling.logprobs < 0 && sampling.repetition_penalty == 1.0f &&
         sampling.presence_penalty == 0.0f && sampling.frequency_penalty == 0.0f && sampling.logit_bias.empty();
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

bool CudaRunner::samples_on_device(std::span<const SequenceStep> sequences) const {
  return std::all_of(sequences.begin(), sequences.end(), is_plain) &&
         static_cast<int64_t>(wanted_.size()) <= body_.program().logit_rows;
}

Status CudaRunner::submit(std::span<const SequenceStep> sequences) {
  if (in_flight_) return internal_error("a step was submitted before the last one was waited for");
  TS_RETURN_IF_ERROR(batch_->assign(sequences));
  list_wanted_rows(sequences, &wanted_);
  wanted_rows_.clear();
  for (const WantedRow& row : wanted_) {
    wanted_rows_.push_back(batch_->first_row(static_cast<size_t>(row.sequence)) + row.index);
  }
  results_.resize(sequences.size());
  for (SequenceResult& result : results_) clear(&result);
  sequences_ = sequences;
  on_device_ = samples_on_device(sequences);

  input_->fill(*batch_, sequences, wanted_rows_, ++number_);
  TS_RETURN_IF_ERROR(input_->send(rank_.streams[0]));
  const kernels::SequenceBatch& batch = batch_->batch();
  const GraphKey key = {batch.sequences, batch.tokens, context_class(sequences)};
  const bool one_token_each = batch.tokens == batch.sequences && static_cast<int32_t>(wanted_.size()) == batch.tokens;
  cudaGraphExec_t graph = nullptr;
  if (use_graphs_ && on_device_ && one_token_each && batch.tokens <= kMostGraphTokens) {
    TS_ASSIGN_OR_RETURN(graph, graph_of(key));
  }
  if (graph) {
    TS_RETURN_IF_ERROR(cuda_check(cudaGraphLaunch(graph, rank_.streams[0]), "launching the step's graph"));
  } else {
    TS_RETURN_IF_ERROR(enqueue(key));
  }
  in_flight_ = true;
  return {};
}

// Everything after the input block has been sent; captured for graphs.
Status CudaRunner::enqueue(const GraphKey& key) {
  TS_RETURN_IF_ERROR(input_->expand(key.sequences, key.tokens, rank_.streams[0]));
  const CudaStep step = input_->step(key.sequences, key.tokens, static_cast<int32_t>(wanted_.size()));
  const bool fused = !decode_.empty() && key.tokens <= kernels::cuda::kDecodeTokens;
  TS_RETURN_IF_ERROR(fused ? decode_.run_body(rank_, step, key.max_context) : body_.run_body(rank_, step));
  return on_device_ ? enqueue_sampling(step, fused) : Status();
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

Status CudaRunner::enqueue_sampling(const CudaStep& step, bool fused) {
  int32_t* tokens = reinterpret_cast<int32_t*>(tokens_.data());
  if (step.wanted_count > 0) {
    TS_RETURN_IF_ERROR(fused ? decode_.run_head(rank_, step) : body_.run_head(rank_, step));
    const compile::Program& program = body_.program();
    const kernels::Rows logits = body_.rows(rank_, program.logits);
    const kernels::cuda::Launch launch = {.stream = rank_.streams[0], .dependent = false};
    TS_RETURN_IF_ERROR(kernels::cuda::decode_argmax(
        {step.wanted_count, program.vocabulary_size, static_cast<const float*>(logits.data), logits.stride, tokens,
         sample_workspace_.data()},
        launch));
  }
  uint64_t* host_number = reinterpret_cast<uint64_t*>(published_.data());
  kernels::cuda::publish_tokens(
      {step.wanted_count, tokens, input_->device_number(), reinterpret_cast<int32_t*>(host_number + 1), host_number},
      rank_.streams[0]);
  return cuda_check(cudaPeekAtLastError(), "publishing tokens");
}

Result<cudaGraphExec_t> CudaRunner::graph_of(const GraphKey& key) {
  const auto [known, first_use] = graphs_.try_emplace(key);
  if (first_use || known->second.get()) return known->second.get();
  const cudaStream_t stream = rank_.streams[0];
  TS_RETURN_IF_ERROR(cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a step"));
  const Status enqueued = enqueue(key);
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
  const CudaOwner<cudaGraph_t, cudaGraphDestroy> owner(graph);
  TS_RETURN_IF_ERROR(enqueued);
  TS_RETURN_IF_ERROR(cuda_check(ended, "capturing a step"));
  cudaGraphExec_t executable = nullptr;
  TS_RETURN_IF_ERROR(cuda_check(cudaGraphInstantiate(&executable, graph, 0), "instantiating a step's graph"));
  known->second = GraphExec(executable);
  return executable;
}

Status CudaRunner::wait(std::vector<SequenceResult>* results) {
  if (!in_flight_) return internal_error("waited for a step that was not submitted");
  in_flight_ = false;
  TS_RETURN_IF_ERROR(on_device_ ? wait_for_tokens() : finish_on_host());
  results->swap(results_);
  return {};
}

Status CudaRunner::wait_for_tokens() {
  const volatile uint64_t* number = reinterpret_cast<const volatile uint64_t*>(published_.data());
  for (int polls = 0; *number != number_; ++polls) {
    if (polls % kPollsPerQuery != kPollsPerQuery - 1) continue;
    const cudaError_t state = cudaStreamQuery(rank_.streams[0]);
    if (state != cudaSuccess && state != cudaErrorNotReady) return cuda_check(state, "running a step");
  }
  std::atomic_thread_fence(std::memory_order_acquire);
  const int32_t* tokens = reinterpret_cast<const int32_t*>(published_.data() + sizeof(uint64_t));
  for (size_t i = 0; i < wanted_.size(); ++i) {
    SequenceResult& result = results_[wanted_[i].sequence];
    result.token = tokens[i];
    const SequenceStep& step = sequences_[wanted_[i].sequence];
    if (tokens[i] < 0) result.status = not_finite(int64_t{step.context} + wanted_[i].index);
  }
  return {};
}

// Group by group: logits to the host, then each row's results there.
Status CudaRunner::finish_on_host() {
  const compile::Program& program = body_.program();
  const int64_t group = program.logit_rows;
  const int64_t row_bytes = program.vocabulary_size * 4;
  if (logits_.size() == 0) {
    TS_ASSIGN_OR_RETURN(logits_, PinnedMemory::allocate(group * row_bytes, "logits"));
    pool_ = std::make_unique<ThreadPool>();
  }
  CudaStep step = input_->step(batch_->batch().sequences, batch_->batch().tokens, static_cast<int32_t>(wanted_.size()));
  const int32_t* rows = step.wanted;
  for (int64_t begin = 0; begin < static_cast<int64_t>(wanted_.size()); begin += group) {
    const int64_t count = std::min<int64_t>(group, static_cast<int64_t>(wanted_.size()) - begin);
    step.wanted = rows + begin;
    step.wanted_count = static_cast<int32_t>(count);
    TS_RETURN_IF_ERROR(body_.run_head(rank_, step));
    TS_RETURN_IF_ERROR(
        cuda_check(cudaMemcpyAsync(logits_.data(), body_.rows(rank_, program.logits).data,
                                   static_cast<size_t>(count * row_bytes), cudaMemcpyDeviceToHost, rank_.streams[0]),
                   "fetching logits"));
    TS_RETURN_IF_ERROR(cuda_check(cudaStreamSynchronize(rank_.streams[0]), "running a step"));
    // Rows of one sequence in order, sequences side by side.
    std::vector<int64_t> firsts;
    for (int64_t i = begin; i < begin + count; ++i) {
      if (i == begin || wanted_[i].sequence != wanted_[i - 1].sequence) firsts.push_back(i);
    }
    firsts.push_back(begin + count);
    pool_->parallel_for(static_cast<int64_t>(firsts.size()) - 1, [&](int64_t s) {
      for (int64_t i = firsts[s]; i < firsts[s + 1]; ++i) {
        const WantedRow& row = wanted_[i];
        finish_row(row, sequences_[row.sequence],
                   reinterpret_cast<const float*>(logits_.data() + (i - begin) * row_bytes), capacity_.vocabulary_size,
                   &results_[row.sequence]);
      }
    });
  }
  if (wanted_.empty()) return cuda_check(cudaStreamSynchronize(rank_.streams[0]), "running a step");
  return {};
}

}  // namespace tokenspeed::runtime
