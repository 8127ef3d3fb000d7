// The Runner of one GPU.
//
// submit() sends one block of input and enqueues the whole step: a captured graph for steps of one token per sequence,
// single launches otherwise. Tokens, greedy or drawn, come back through mapped host memory that wait() polls. Rows that
// want more (log probabilities, penalties, biases, a set of allowed tokens) follow as logits, and the host samples them
// with the CPU's sampler.
// Invariant: one step in flight. A fault of the device fails the step and every later one: the process should end.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "compile/graph.h"
#include "compile/passes/pass.h"
#include "compile/weight_source.h"
#include "runtime/cuda/cuda_program.h"
#include "runtime/cuda/decode_plan.h"
#include "runtime/cuda/step_input.h"
#include "runtime/logit_rows.h"
#include "runtime/runner.h"
#include "runtime/step_batch.h"

namespace tokenspeed::runtime {

struct CudaRunnerOptions {
  int32_t device = 0;
  DType weights = DType::kBFloat16;  // bfloat16 or float8_e4m3 (where the checkpoint has FP8 blocks)
  DType kv = DType::kBFloat16;
  int32_t max_step_tokens = 8192;
  int32_t max_sequences = 64;
  int32_t page_size = 64;
  int32_t max_model_length = 32768;
  int32_t pages = 0;              // KV pages; 0: as many as kv_bytes hold
  int64_t kv_bytes = 0;           // 0: what is left of memory_fraction after everything else
  double memory_fraction = 0.92;  // of the GPU's memory, all told
  int32_t state_slots = 0;        // 0: max_sequences
  int32_t load_threads = 0;       // 0: as many as help
  bool graphs = true;             // capture steps of one token per sequence
  bool fused_decode = true;       // the kernels for few tokens where the model allows
  bool rank_only = false;         // run rank `rank` of a tensor-parallel layout alone, collectives left out
  int32_t rank = 0;
  bool debug_sync = false;  // wait after every launch: slow, but a fault of the device names its operation
  // Told once, on the thread that runs steps, when the device has failed; every request will fail from then on.
  std::function<void(const Status&)> on_fault;
  // Tests only: this launch of that step (from 1 on) is followed by one that faults on the same weight.
  int32_t fault_after_launch = -1;
  uint64_t fault_in_step = 1;
  compile::PassOptions passes;
};

class CudaRunner : public Runner {
 public:
  // Compiles, loads the weights (the source may be closed afterwards) and allocates. Errors: those of open_device;
  // invalid_argument (an option); unimplemented (a model the kernels do not take); resource_exhausted (memory; says
  // what would fit); those of the source.
  static Result<std::unique_ptr<CudaRunner>> create(const compile::ModelGraph& graph,
                                                    const compile::WeightSource& source,
                                                    const CudaRunnerOptions& options);
  ~CudaRunner() override;

  const Capacity& capacity() const override { return capacity_; }
  Status submit(std::span<const SequenceStep> sequences) override;
  Status wait(std::vector<SequenceResult>* results) override;

  // Runs the step like submit() and wait(), launch by launch on one stream with an event between each two, so that
  // nothing overlaps: the times add up to more than a step's. Greedy steps of at most max_sequences wanted rows.
  Result<std::vector<LaunchTime>> profile(std::span<const SequenceStep> sequences,
                                          std::vector<SequenceResult>* results);
  // Times each kind of launch alone: those of all layers one after the other in a graph, as in a step (weights of one
  // are fetched while the one before ends), with the operands that a real step leaves for the first of them; medians
  // over `rounds` rounds of all kinds, so that no kind finds its weights in a cache. Steps that profile() takes and
  // that have run before. The sequences' caches are spoiled afterwards.
  Result<std::vector<LaunchTime>> time_kinds(std::span<const SequenceStep> sequences, int32_t rounds);

  // When the GPU began the last step and had its tokens, by its own clock in ns; both 0 before the first and after one
  // of more rows than the head takes at once.
  struct StepTimes {
    uint64_t begin = 0;
    uint64_t end = 0;
  };
  StepTimes last_step_times() const;

  const compile::Program& program() const { return body_.program(); }
  const Device& device() const { return device_; }
  int64_t weight_bytes() const { return weights_.bytes(); }
  bool decodes_fused() const { return runs_fused(1); }  // few tokens run on the fused kernels

 private:
  // A step that is replayed: its sizes, a bound on its contexts, and whether rows draw at random.
  struct GraphKey {
    int32_t sequences;
    int32_t tokens;
    int64_t max_context;  // 0: not a step of the DecodePlan, whose kernels alone depend on it
    bool draws;
    auto operator<=>(const GraphKey&) const = default;
  };
  using GraphExec = CudaOwner<cudaGraphExec_t, cudaGraphExecDestroy>;

  CudaRunner() = default;
  Status load(const compile::ModelGraph& graph, const compile::WeightSource& source, const CudaRunnerOptions& options);
  Status allocate(const CudaRunnerOptions& options);
  Status warm_up();
  bool runs_fused(int32_t tokens) const { return !decode_.empty() && tokens <= kernels::cuda::kDecodeTokens; }
  bool runs_planned(int32_t sequences, int32_t tokens, int64_t max_context) const {
    return runs_fused(tokens) || (!decode_.empty() && decode_.takes_batch(sequences, tokens, max_context));
  }
  Result<GraphKey> begin(std::span<const SequenceStep> sequences);
  Status run(const GraphKey& key);
  int64_t context_class(std::span<const SequenceStep> sequences) const;
  Status enqueue(const GraphKey& key, const LaunchObserver& observe);
  Status enqueue_sampling(const GraphKey& key, const CudaStep& step, bool fused, const LaunchObserver& observe);
  Status enqueue_step(const GraphKey& key);  // with what debug_sync and tests of faults want
  Status enqueue_checked(const GraphKey& key);
  // Captures at the second use of a key: the first runs singly and loads what its kernels need. Null: not captured yet.
  Result<cudaGraphExec_t> graph_of(const GraphKey& key);
  // What enqueue_all puts on stream 0.
  Result<GraphExec> capture(const std::function<Status()>& enqueue_all);
  Result<GraphKey> begin_measured(std::span<const SequenceStep> sequences);
  struct LaunchKind;
  Result<std::vector<LaunchKind>> list_kinds(const GraphKey& key);
  Status capture_kind(const GraphKey& key, LaunchKind* kind);
  Status fetch_logits(std::span<const int32_t> indices, int64_t first);
  Status wait_for_tokens();
  Status finish_groups();
  void finish_rows(std::span<const int32_t> indices, int64_t first);
  std::string describe_step() const;
  std::string describe_faulted_launches() const;
  void launch_fault(int32_t operation);
  // The device's faults are remembered; other errors belong to the step.
  Status note_fault(Status status);

  Capacity capacity_;
  Device device_;
  CudaWeights weights_;
  CudaProgram body_;
  DecodePlan decode_;  // empty: the kernels for any number of tokens do
  CudaCaches caches_;
  DeviceMemory arena_, workspace_[kStreams], tokens_, sample_workspace_;
  Stream streams_[kStreams];
  CudaEvent forked_, joined_;
  CudaRank rank_;
  std::optional<StepBatch> batch_;
  std::optional<StepInput> input_;
  PinnedMemory published_;  // step number, its times, then tokens
  PinnedMemory logits_;     // one group of rows
  std::unique_ptr<ThreadPool> pool_;
  std::map<GraphKey, GraphExec> graphs_;
  CudaRunnerOptions options_;

  uint64_t number_ = 0;
  bool in_flight_ = false;
  bool one_group_ = false;                   // the head computes all wanted rows at once, and the device samples
  std::span<const SequenceStep> sequences_;  // of the step in flight
  std::vector<WantedRow> wanted_;
  std::vector<int32_t> wanted_rows_;
  std::vector<int32_t> host_rows_;  // indices of those among wanted_ that the host finishes, ascending
  std::vector<kernels::cuda::DecodeSampleRow> sample_rows_;  // of wanted_, when any draws on the device
  std::vector<SequenceResult> results_;
  Status fault_;
};

}  // namespace tokenspeed::runtime
