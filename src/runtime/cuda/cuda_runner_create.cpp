// Making a CudaRunner: checks of the options, the Program, the weights, and the division of the GPU's memory.
#include <algorithm>
#include <string>
#include <utility>

#include "base/log.h"
#include "compile/cost.h"
#include "kernels/cuda/decode.h"
#include "runtime/cuda/cuda_runner.h"
#include "runtime/gpu_support.h"

namespace tokenspeed::runtime {
namespace {

constexpr int32_t kLogitRows = 64;
constexpr int32_t kWarmUpTokens = 64;

Status check_positive(const char* what, int64_t value) {
  if (value > 0) return {};
  return invalid_argument(std::string(what) + " must be at least 1, not " + std::to_string(value));
}

Status check_options(const CudaRunnerOptions& options) {
  if (options.weights != DType::kBFloat16 && options.weights != DType::kFloat8E4M3) {
    return invalid_argument(std::string("the CUDA runner has no ") + std::string(dtype_name(options.weights)) +
                            " weights; choose bfloat16 or float8_e4m3");
  }
  if (options.kv != DType::kBFloat16 && options.kv != DType::kFloat8E4M3) {
    return unimplemented(std::string("the CUDA runner has no ") + std::string(dtype_name(options.kv)) +
                         " KV cache; choose bfloat16 or float8_e4m3");
  }
  TS_RETURN_IF_ERROR(check_positive("the tokens of a step", options.max_step_tokens));
  TS_RETURN_IF_ERROR(check_positive("the sequences of a step", options.max_sequences));
  TS_RETURN_IF_ERROR(check_positive("the page size", options.page_size));
  TS_RETURN_IF_ERROR(check_positive("the model length", options.max_model_length));
  if (options.pages < 0 || options.kv_bytes < 0 || options.state_slots < 0) {
    return invalid_argument("KV pages, KV bytes and state slots must not be negative");
  }
  if (options.memory_fraction <= 0 || options.memory_fraction > 1) {
    return invalid_argument("the share of GPU memory must be above 0 and at most 1, not " +
                            std::to_string(options.memory_fraction));
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<CudaRunner>> CudaRunner::create(const compile::ModelGraph& graph,
                                                       const compile::WeightSource& source,
                                                       const CudaRunnerOptions& options) {
  TS_RETURN_IF_ERROR(check_options(options));
  std::unique_ptr<CudaRunner> runner(new CudaRunner());
  TS_ASSIGN_OR_RETURN(runner->device_, open_device(options.device));
  TS_RETURN_IF_ERROR(runner->load(graph, source, options));
  TS_RETURN_IF_ERROR(runner->allocate(options));
  if (options.fault_in_step == 0) TS_RETURN_IF_ERROR(runner->warm_up());
  return runner;
}

Status CudaRunner::load(const compile::ModelGraph& graph, const compile::WeightSource& source,
                        const CudaRunnerOptions& options) {
  compile::CompileOptions compiled;
  compiled.rank = options.rank;
  compiled.activation = DType::kBFloat16;
  compiled.weights = options.weights;
  compiled.kv = options.kv;
  compiled.tokens = options.max_step_tokens;
  compiled.logit_rows = std::min(options.max_step_tokens, std::max(kLogitRows, options.max_sequences));
  compiled.passes = options.passes;
  TS_ASSIGN_OR_RETURN(compile::Program program, compile::compile_program(graph.body, compiled));
  TS_RETURN_IF_ERROR(CudaProgram::check(program, options.rank_only));
  const compile::Program* pointer = &program;
  // Before anything is loaded: an answer in milliseconds instead of a failed allocation after minutes.
  TS_RETURN_IF_ERROR(check_weights_fit(
      {.model = program.name,
       .gpu = "GPU " + std::to_string(device_.ordinal) + " (" + device_.name + ")",
       .bytes = compile::weight_memory({&pointer, 1}),
       .usable = static_cast<int64_t>(static_cast<double>(device_.free_bytes) * options.memory_fraction),
       .is_fp8 = options.weights == DType::kFloat8E4M3,
       .ranks = program.mesh.size(compile::Axis::kTensor)}));
  TS_ASSIGN_OR_RETURN(weights_, CudaWeights::load({&pointer, 1}, source, options.load_threads));
  body_ = CudaProgram(std::move(program), weights_);
  return {};
}

// Runs steps of the two kinds, so that no request waits for kernels and libraries to be loaded or for the first graphs,
// of which there is one for each input block.
// What they leave in page 0 and slot 0 is overwritten before it is read.
Status CudaRunner::warm_up() {
  const SamplingParameters greedy = {.temperature = 0};
  const std::vector<int32_t> tokens(static_cast<size_t>(
      std::min({kWarmUpTokens, capacity_.max_step_tokens, capacity_.page_size, capacity_.max_model_length})));
  const std::vector<int32_t> pages = {0};
  std::vector<SequenceResult> results;
  for (const size_t count : {tokens.size(), size_t{1}, size_t{1}, size_t{1}}) {
    SequenceStep step;
    step.tokens = std::span(tokens).first(count);
    step.pages = pages;
    step.sample = true;
    step.sampling = &greedy;
    TS_RETURN_IF_ERROR(submit({&step, 1}));
    TS_RETURN_IF_ERROR(wait(&results));
  }
  return {};
}

Status CudaRunner::allocate(const CudaRunnerOptions& options) {
  const compile::Program& program = body_.program();
  capacity_.page_size = options.page_size;
  capacity_.state_slots = options.state_slots ? options.state_slots : options.max_sequences;
  capacity_.max_step_tokens = options.max_step_tokens;
  capacity_.max_sequences = options.max_sequences;
  capacity_.max_model_length = options.max_model_length;
  capacity_.vocabulary_size = static_cast<int32_t>(program.vocabulary_size);
  capacity_.steps_in_flight = kMostStepsInFlight;

  const int64_t workspace = body_.workspace_bytes();
  TS_ASSIGN_OR_RETURN(arena_,
                      DeviceMemory::allocate(program.arena_bytes, "activations; lower --max-num-batched-tokens"));
  for (int i = 0; i < kStreams; ++i) {
    TS_ASSIGN_OR_RETURN(workspace_[i],
                        DeviceMemory::allocate(workspace, "the kernels' workspace; lower --max-num-batched-tokens"));
    TS_ASSIGN_OR_RETURN(streams_[i], make_stream());
    rank_.workspace[i] = workspace_[i].data();
    rank_.streams[i] = streams_[i].get();
  }
  TS_ASSIGN_OR_RETURN(forked_, make_event(false));
  TS_ASSIGN_OR_RETURN(joined_, make_event(false));
  TS_ASSIGN_OR_RETURN(input_stream_, make_stream());
  TS_ASSIGN_OR_RETURN(input_sent_, make_event(false));
  TS_ASSIGN_OR_RETURN(tokens_, DeviceMemory::allocate(program.logit_rows * 4, "tokens"));
  TS_ASSIGN_OR_RETURN(
      sample_workspace_,
      DeviceMemory::allocate(kernels::cuda::decode_argmax_workspace_bytes(program.logit_rows), "sampling"));
  for (PinnedMemory& record : published_) {
    TS_ASSIGN_OR_RETURN(record, PinnedMemory::allocate(program.logit_rows * 8, "tokens"));
  }
  if (options.fused_decode) {
    TS_ASSIGN_OR_RETURN(decode_, DecodePlan::build(body_, std::max(options.max_model_length, 1024)));
  }
  const int64_t pages_of_one = (int64_t{options.max_model_length} + options.page_size - 1) / options.page_size;
  const int64_t page_bytes = std::max<int64_t>(1, program.kv.bytes_per_position() * options.page_size);
  int64_t pages = options.pages;
  if (pages == 0) {
    const int64_t reserve =
        static_cast<int64_t>(static_cast<double>(device_.total_bytes) * (1 - options.memory_fraction));
    const int64_t left = free_device_memory() - reserve - capacity_.state_slots * program.state.bytes_per_slot;
    const int64_t budget = options.kv_bytes ? options.kv_bytes : left;
    pages = std::min(pages_of_one * options.max_sequences, std::max<int64_t>(0, budget) / page_bytes);
  }
  TS_RETURN_IF_ERROR(check_kv_fits({.pages = pages,
                                    .page_size = options.page_size,
                                    .page_bytes = page_bytes,
                                    .max_model_length = options.max_model_length,
                                    .state_slots = capacity_.state_slots,
                                    .state_bytes = capacity_.state_slots * program.state.bytes_per_slot,
                                    .is_fp8 = options.weights == DType::kFloat8E4M3}));
  capacity_.pages = static_cast<int32_t>(std::min<int64_t>(pages, INT32_MAX));
  TS_ASSIGN_OR_RETURN(caches_, CudaCaches::allocate(program.kv, program.state, capacity_.pages, capacity_.page_size,
                                                    capacity_.state_slots));
  rank_.arena = arena_.data();
  rank_.caches = &caches_;
  rank_.forked = forked_.get();
  rank_.joined = joined_.get();
  batch_.emplace(capacity_);
  TS_ASSIGN_OR_RETURN(input_, StepInput::allocate(capacity_));
  options_ = options;
  options_.graphs = options.graphs && !options.debug_sync;
  pool_ = std::make_unique<ThreadPool>();
  TS_ASSIGN_OR_RETURN(
      logits_, PinnedMemory::allocate(program.logit_rows * body_.rows(rank_, program.logits).stride * 4, "logits"));
  spdlog::info(
      "GPU {} ({}): {} weights, {} KV pages of {} positions ({}), {} state slots ({}), {} activations and workspace",
      device_.ordinal, device_.name, gigabytes(weights_.bytes()), capacity_.pages, capacity_.page_size,
      gigabytes(capacity_.pages * page_bytes), capacity_.state_slots,
      gigabytes(capacity_.state_slots * program.state.bytes_per_slot),
      gigabytes(program.arena_bytes + kStreams * workspace));
  return {};
}

}  // namespace tokenspeed::runtime
