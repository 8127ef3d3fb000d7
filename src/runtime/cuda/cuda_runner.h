// The Runner of one GPU.
//
// submit() sends one block of input and enqueues the whole step: a captured graph for steps of one token per sequence,
// single launches otherwise. Tokens, greedy or drawn, come back through mapped host memory that wait() polls. Rows that
// want more (log probabilities, penalties, biases, a set of allowed tokens) follow as logits, and the host samples them
// with the CPU's sampler.
// Two steps may be in flight. The second one's input is copied while the first one runs, and its tokens go from the
// sampler to the embedding on the device. Input block, graph and published record of a step are those of its number's
// parity; everything else is used by one step after the other, in stream order.
// Invariant: the last submitted step alone may have rows that the host finishes. A fault of the device fails the step
// and every later one: the process should end.
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
  bool debug_sync = false;        // wait after every launch: slow, but a fault of the device names its operations
  bool operations_apart = false;  // with debug_sync: every operation of few tokens is a launch of its own
  // Told once, on the thread that runs steps, when the device has failed; every request will fail from then on.
  std::function<void(const Status&)> on_fault;
  // Tests only: the first launch of this step (from 1 on) that reads a sequence's state fails on the device. 0: none.
  uint64_t fault_in_step = 0;
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
  // nothing overlaps, and every operation is a launch of its own: the times add up to more than a step's. Greedy steps
  // of at most max_sequences wanted rows; none may be in flight.
  Result<std::vector<LaunchTime>> profile(std::span<const SequenceStep> sequences,
                                          std::vector<SequenceResult>* results);
  // Times each kind of launch alone: those of all layers one after the other in a graph, as in a step (weights of one
  // are fetched while the one before ends), with the operands that a real step leaves for the first of them; medians
  // over `rounds` rounds of all kinds, so that no kind finds its weights in a cache. Steps that profile() takes and
  // that have run before. The sequences' caches are spoiled afterwards.
  Result<std::vector<LaunchTime>> time_kinds(std::span<const SequenceStep> sequences, int32_t rounds);

  // When the GPU began the step that was waited for last, and had the tokens of the step before, by its own clock in
  // ns; 0 where there is none and of a step of more rows than the head takes at once. Asks the GPU; no other step than
  // the next may have been submitted since, and that one must not have ended.
  struct StepTimes {
    uint64_t begin = 0;
    uint64_t end_before = 0;
  };
  Result<StepTimes> last_step_times() const;

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
  struct StepGraphs {
    GraphExec of_block[kMostStepsInFlight];
  };
  // What the host keeps of a step until it has been waited for.
  struct Submitted {
    uint64_t number = 0;
    bool one_group = false;           // the head computes all wanted rows at once, and the device samples
    const uint64_t* times = nullptr;  // begin and end on the device; null: not taken
    std::span<const SequenceStep> sequences;
    std::vector<WantedRow> wanted;
    std::vector<int32_t> host_rows;  // indices of those among wanted that the host finishes, ascending
    std::vector<SequenceResult> results;
  };

  CudaRunner() = default;
  Status load(const compile::ModelGraph& graph, const compile::WeightSource& source, const CudaRunnerOptions& options);
  Status allocate(const CudaRunnerOptions& options);
  Status warm_up();
  bool runs_fused(int32_t tokens) const { return !decode_.empty() && tokens <= kernels::cuda::kDecodeTokens; }
  bool runs_planned(int32_t sequences, int32_t tokens, int64_t max_context) const {
    return runs_fused(tokens) || (!decode_.empty() && decode_.takes_batch(sequences, tokens, max_context));
  }
  Submitted& step_of(uint64_t number) { return submitted_[number % kMostStepsInFlight]; }
  const Submitted& last() const { return submitted_[number_ % kMostStepsInFlight]; }
  Status check_can_follow() const;
  Result<GraphKey> begin(std::span<const SequenceStep> sequences);
  void list_rows(std::span<const SequenceStep> sequences, Submitted* step);
  Status run(const GraphKey& key);
  Status send_input();
  int64_t context_class(std::span<const SequenceStep> sequences) const;
  Status enqueue(const GraphKey& key, const LaunchObserver& observe, bool apart = false);
  Status enqueue_sampling(const GraphKey& key, const CudaStep& step, bool fused, const LaunchObserver& observe,
                          bool apart);
  Status enqueue_step(const GraphKey& key);  // with what debug_sync and tests of faults want
  Status spoil_state_slots(const GraphKey& key);
  Status enqueue_checked(const GraphKey& key);
  // The last step's graph. Captures from the second use of a key on, for each input block: the first runs singly and
  // loads what its kernels need. Null: not captured yet.
  Result<cudaGraphExec_t> graph_of(const GraphKey& key);
  // What enqueue_all puts on stream 0.
  Result<GraphExec> capture(const std::function<Status()>& enqueue_all);
  Result<GraphKey> begin_measured(std::span<const SequenceStep> sequences);
  struct LaunchKind;
  Result<std::vector<LaunchKind>> list_kinds(const GraphKey& key);
  Status capture_kind(const GraphKey& key, LaunchKind* kind);
  Status fetch_logits(std::span<const int32_t> indices, int64_t first);
  Result<int32_t> wait_for_token(const Submitted& step, size_t index);
  Status wait_for_tokens(Submitted* step);
  Status finish_groups(Submitted* step);
  void finish_rows(Submitted* step, std::span<const int32_t> indices, int64_t first);
  std::string describe_step() const;
  std::string describe_faulted_launches() const;
  std::string describe_progress() const;
  // The device's faults are remembered; other errors belong to the step.
  Status note_fault(Status status);

  Capacity capacity_;
  Device device_;
  CudaWeights weights_;
  CudaProgram body_;
  DecodePlan decode_;  // empty: the kernels for any number of tokens do
  CudaCaches caches_;
  DeviceMemory arena_, workspace_[kStreams], tokens_, sample_workspace_;
  Stream streams_[kStreams], input_stream_;
  CudaEvent forked_, joined_, input_sent_;
  CudaRank rank_;
  std::optional<StepBatch> batch_;
  std::optional<StepInput> input_;
  PinnedMemory published_[kMostStepsInFlight];  // a step's tokens, each with the step's number
  PinnedMemory logits_;                         // one group of rows
  std::unique_ptr<ThreadPool> pool_;
  std::map<GraphKey, StepGraphs> graphs_;
  CudaRunnerOptions options_;

  uint64_t number_ = 0;    // of the last step; odd and even take turns in flight
  int32_t in_flight_ = 0;  // that step and the one before it, or it alone
  Submitted submitted_[kMostStepsInFlight];
  std::vector<int32_t> sampled_;  // of the last step in flight, for StepBatch::assign: ~row among its sampled tokens
  std::vector<int32_t> wanted_rows_;
  std::vector<kernels::cuda::DecodeSampleRow> sample_rows_;  // of the wanted, when any draws on the device
  const uint64_t* times_ = nullptr;                          // of the step waited for last
  const uint64_t* times_before_ = nullptr;                   // and of the one before
  Status fault_;
};

}  // namespace tokenspeed::runtime
