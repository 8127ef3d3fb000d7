// The Runner of one CPU: executes a model's Programs on a pool of threads.
//
// Two Programs share weights, caches and arena: one for steps of few rows (decoding), one for the greatest step. Both
// hold the same operations; the smaller one's values lie close together. submit() computes; wait() only hands over. So
// nothing is gained by a second step in flight, which would only keep back the tokens of the first; and such a step may
// follow any other.
// Invariant: a row's bits do not depend on the other rows of the step, the number of threads, or the chunking of
// prompts.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "compile/graph.h"
#include "compile/passes/pass.h"
#include "compile/weight_source.h"
#include "runtime/cpu_execute.h"
#include "runtime/launch_time.h"
#include "runtime/logit_rows.h"
#include "runtime/runner.h"
#include "runtime/step_batch.h"

namespace tokenspeed::runtime {

struct CpuRunnerOptions {
  DType weights = DType::kBFloat16;     // float32 or bfloat16; bfloat16 tensors are held as they are either way
  DType activation = DType::kBFloat16;  // float32 or bfloat16 (then weights must be bfloat16)
  DType kv = DType::kBFloat16;          // float32, bfloat16 or float8_e4m3
  int32_t threads = 0;                  // 0: one per CPU the process may use
  bool pin = true;                      // bind each thread to a CPU
  int32_t max_step_tokens = 512;
  int32_t max_sequences = 64;
  int32_t page_size = 64;
  int32_t max_model_length = 32768;
  int32_t pages = 0;               // KV pages; 0: as many as kv_bytes hold
  int64_t kv_bytes = 0;            // 0: half of the free memory, at most what max_sequences full sequences need
  int32_t state_slots = 0;         // 0: max_sequences
  int32_t steps_in_flight = 1;     // 2: for tests of what plans ahead
  bool reference_kernels = false;  // the plain kernels, one thread: for comparison
  compile::PassOptions passes;
};

class CpuRunner : public Runner {
 public:
  // Compiles, loads the weights (the source may be closed afterwards) and allocates. Errors: invalid_argument (an
  // option), failed_precondition (a CPU without AVX2), resource_exhausted (memory; says what to lower), those of the
  // source.
  static Result<std::unique_ptr<CpuRunner>> create(const compile::ModelGraph& graph,
                                                   const compile::WeightSource& source,
                                                   const CpuRunnerOptions& options);

  const Capacity& capacity() const override { return capacity_; }
  Status submit(std::span<const SequenceStep> sequences) override;
  Status wait(std::vector<SequenceResult>* results) override;

  // Runs the step like submit() and wait(), with the time of every operation; last, without parts, that of sampling
  // and everything else. No step may be in flight.
  Result<std::vector<LaunchTime>> profile(std::span<const SequenceStep> sequences,
                                          std::vector<SequenceResult>* results);

  // Multi-token prediction: one chunk of one sequence through the MTP layer, to be run after the step that computed the
  // hidden rows. tokens[i] is the token after the one at position context + i.
  struct MtpStep {
    std::span<const int32_t> tokens;
    int32_t context = 0;
    std::span<const int32_t> pages;
    std::span<const float> hidden;  // [tokens, hidden_size], from last_hidden() or hidden_out
    float* logits_out = nullptr;    // [vocabulary_size] of the last row, or null
    float* hidden_out = nullptr;    // [tokens, hidden_size] after the MTP norm, or null
  };
  // failed_precondition when the model has no MTP layer.
  Status run_mtp(const MtpStep& step);
  // [T, hidden_size] of the last submitted step, after the final norm. Gone after run_mtp, which leaves it empty.
  std::vector<float> last_hidden() const;

  const compile::Program& program() const { return large_.program(); }
  const CpuCaches& caches() const { return caches_; }
  int64_t weight_bytes() const { return weights_.bytes(); }

 private:
  CpuRunner() = default;
  Status load(const compile::ModelGraph& graph, const compile::WeightSource& source, const CpuRunnerOptions& options);
  Status allocate(const CpuRunnerOptions& options);
  CpuStep step() {
    return {.batch = &batch_->batch(),
            .token_ids = batch_->token_ids(),
            .seconds = operation_seconds_.empty() ? nullptr : operation_seconds_.data()};
  }
  void run_head(const CpuProgram& program, std::span<const SequenceStep> sequences, SequenceResult* results);
  void finish_rows(const CpuProgram& program, std::span<const SequenceStep> sequences, size_t begin, size_t end,
                   SequenceResult* results);

  Capacity capacity_;
  std::unique_ptr<ThreadPool> pool_;
  CpuWeights weights_;
  CpuProgram small_, large_;
  std::optional<CpuProgram> mtp_;
  CpuCaches caches_;
  HostMemory arena_, workspace_;
  CpuRank rank_;
  std::optional<StepBatch> batch_;
  const CpuProgram* last_ = nullptr;  // whose hidden rows are in the arena
  std::vector<WantedRow> wanted_;
  std::vector<int32_t> wanted_rows_;
  std::vector<size_t> sequence_begins_;
  int32_t in_flight_ = 0;
  std::vector<SequenceResult> results_[kMostStepsInFlight];  // of the steps in flight, the oldest first
  std::vector<int32_t> sampled_;                             // of the last step in flight, for StepBatch::assign
  std::vector<double> operation_seconds_;                    // of the step being profiled; else empty
};

}  // namespace tokenspeed::runtime
