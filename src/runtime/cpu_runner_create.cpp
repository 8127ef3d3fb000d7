// Making a CpuRunner: checks of the options, the Programs, the weights, and the sizes of the caches.
#include <algorithm>
#include <string>
#include <utility>

#include "kernels/cpu/cpu_features.h"
#include "runtime/cpu_runner.h"

namespace tokenspeed::runtime {
namespace {

// Rows of logits in memory at once: enough to stream the head's weights once for a usual step.
constexpr int32_t kLogitRows = 64;

Status check_dtype(const char* what, DType dtype) {
  if (dtype == DType::kFloat32 || dtype == DType::kBFloat16) return {};
  return invalid_argument(std::string("the CPU runner has no ") + std::string(dtype_name(dtype)) + " " + what +
                          "; choose float32 or bfloat16");
}

Status check_positive(const char* what, int64_t value) {
  if (value > 0) return {};
  return invalid_argument(std::string(what) + " must be at least 1, not " + std::to_string(value));
}

Status check_options(const CpuRunnerOptions& options) {
  TS_RETURN_IF_ERROR(check_dtype("weights", options.weights));
  TS_RETURN_IF_ERROR(check_dtype("activations", options.activation));
  if (options.kv != DType::kFloat8E4M3) TS_RETURN_IF_ERROR(check_dtype("KV cache", options.kv));
  if (options.activation == DType::kBFloat16 && options.weights == DType::kFloat32) {
    return invalid_argument("bfloat16 activations need bfloat16 weights; choose float32 for both, or bfloat16 weights");
  }
  TS_RETURN_IF_ERROR(check_positive("the tokens of a step", options.max_step_tokens));
  TS_RETURN_IF_ERROR(check_positive("the sequences of a step", options.max_sequences));
  TS_RETURN_IF_ERROR(check_positive("the page size", options.page_size));
  TS_RETURN_IF_ERROR(check_positive("the model length", options.max_model_length));
  if (options.threads < 0 || options.pages < 0 || options.kv_bytes < 0 || options.state_slots < 0) {
    return invalid_argument("threads, KV pages, KV bytes and state slots must not be negative");
  }
  if (options.steps_in_flight < 1 || options.steps_in_flight > kMostStepsInFlight) {
    return invalid_argument("a runner has 1 or 2 steps in flight, not " + std::to_string(options.steps_in_flight));
  }
  if (options.reference_kernels || kernels::cpu::supported()) return {};
  return failed_precondition("this CPU has no AVX2 with FMA, which the kernels need; use another machine");
}

Status check_mesh(const compile::Graph& graph) {
  for (const int32_t size : graph.mesh.sizes) {
    if (size == 1) continue;
    return unimplemented("model '" + graph.name + "' is laid out for " + std::to_string(size) +
                         " ranks, but the CPU runner is a single one; use --tp 1");
  }
  return {};
}

compile::CompileOptions shape_class(const CpuRunnerOptions& options, int32_t tokens) {
  compile::CompileOptions compiled;
  compiled.activation = options.activation;
  compiled.weights = options.weights;
  compiled.kv = options.kv;
  compiled.tokens = tokens;
  compiled.logit_rows = std::min(tokens, kLogitRows);
  compiled.passes = options.passes;
  return compiled;
}

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

Result<int32_t> choose_pages(const CpuRunnerOptions& options, int64_t bytes_per_position) {
  const int64_t pages_of_one = divide_up(options.max_model_length, options.page_size);
  // A model without attention layers still needs page ids to count positions with.
  const int64_t page_bytes = std::max<int64_t>(1, bytes_per_position * options.page_size);
  int64_t pages = options.pages;
  if (pages == 0) {
    const int64_t budget = options.kv_bytes ? options.kv_bytes : available_host_memory() / 2;
    pages = std::min(pages_of_one * options.max_sequences, budget / page_bytes);
  }
  if (pages < pages_of_one) {
    return resource_exhausted(
        "the KV cache holds " + std::to_string(pages * options.page_size) +
        " positions, fewer than one sequence of --max-model-len " + std::to_string(options.max_model_length) + " (" +
        std::to_string(pages_of_one * page_bytes) + " bytes); lower --max-model-len or give the cache more memory");
  }
  return static_cast<int32_t>(std::min<int64_t>(pages, INT32_MAX));
}

}  // namespace

Result<std::unique_ptr<CpuRunner>> CpuRunner::create(const compile::ModelGraph& graph,
                                                     const compile::WeightSource& source,
                                                     const CpuRunnerOptions& options) {
  TS_RETURN_IF_ERROR(check_options(options));
  TS_RETURN_IF_ERROR(check_mesh(graph.body));
  std::unique_ptr<CpuRunner> runner(new CpuRunner());
  const int32_t threads = options.reference_kernels ? 1 : options.threads;
  runner->pool_ = std::make_unique<ThreadPool>(threads, options.pin);
  TS_RETURN_IF_ERROR(runner->load(graph, source, options));
  TS_RETURN_IF_ERROR(runner->allocate(options));
  return runner;
}

Status CpuRunner::load(const compile::ModelGraph& graph, const compile::WeightSource& source,
                       const CpuRunnerOptions& options) {
  const int32_t few = std::min(options.max_sequences, options.max_step_tokens);
  std::vector<compile::Program> programs;
  for (const int32_t tokens : {few, options.max_step_tokens}) {
    TS_ASSIGN_OR_RETURN(compile::Program program, compile::compile_program(graph.body, shape_class(options, tokens)));
    programs.push_back(std::move(program));
  }
  if (graph.has_mtp) {
    TS_ASSIGN_OR_RETURN(compile::Program program,
                        compile::compile_program(graph.mtp, shape_class(options, options.max_step_tokens)));
    programs.push_back(std::move(program));
  }
  std::vector<const compile::Program*> pointers;
  pointers.reserve(programs.size());
  for (const compile::Program& program : programs) pointers.push_back(&program);
  const auto layout = options.reference_kernels ? kernels::MatrixLayout::kRowMajor : kernels::MatrixLayout::kPanel16;
  TS_ASSIGN_OR_RETURN(weights_, CpuWeights::load(pointers, source, layout, pool_.get()));
  small_ = CpuProgram(std::move(programs[0]), weights_);
  large_ = CpuProgram(std::move(programs[1]), weights_);
  if (graph.has_mtp) mtp_ = CpuProgram(std::move(programs[2]), weights_);
  return {};
}

Status CpuRunner::allocate(const CpuRunnerOptions& options) {
  const compile::Program& program = large_.program();
  capacity_.page_size = options.page_size;
  capacity_.state_slots = options.state_slots ? options.state_slots : options.max_sequences;
  capacity_.max_step_tokens = options.max_step_tokens;
  capacity_.max_sequences = options.max_sequences;
  capacity_.max_model_length = options.max_model_length;
  capacity_.vocabulary_size = static_cast<int32_t>(program.vocabulary_size);
  capacity_.steps_in_flight = options.steps_in_flight;
  TS_ASSIGN_OR_RETURN(capacity_.pages, choose_pages(options, program.kv.bytes_per_position()));
  TS_ASSIGN_OR_RETURN(caches_, CpuCaches::allocate(program.kv, program.state, capacity_.pages, capacity_.page_size,
                                                   capacity_.state_slots));
  int64_t arena = std::max(small_.program().arena_bytes, large_.program().arena_bytes);
  int64_t workspace = std::max(small_.workspace_bytes(), large_.workspace_bytes());
  if (mtp_) {
    arena = std::max(arena, mtp_->program().arena_bytes);
    workspace = std::max(workspace, mtp_->workspace_bytes());
  }
  TS_ASSIGN_OR_RETURN(arena_, HostMemory::allocate(arena, "activations"));
  TS_ASSIGN_OR_RETURN(workspace_, HostMemory::allocate(workspace, "the kernels' workspace"));
  rank_ = {arena_.data(), workspace_.data(), &caches_, pool_.get(), options.reference_kernels};
  batch_.emplace(capacity_);
  for (auto& results : results_) results.resize(static_cast<size_t>(capacity_.max_sequences));
  return {};
}

}  // namespace tokenspeed::runtime
