// A Program of the family as fused calls for steps of at most kDecodeTokens rows (kernels/cuda/decode.h): five or six
// launches per layer; or of up to kBatchTokens sequences of one token each (kernels/cuda/batch.h). The residual stream
// stays in its place in the arena and every branch is added to it there.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "compile/program.h"
#include "kernels/cuda/decode.h"
#include "runtime/cuda/batch_phases.h"
#include "runtime/cuda/cuda_program.h"

namespace tokenspeed::runtime {

class DecodePlan {
 public:
  DecodePlan() = default;
  // Empty when the Program has operations or sizes that the fused kernels do not take. `program` must outlive the plan.
  static Result<DecodePlan> build(const CudaProgram& program, int64_t max_context);
  bool empty() const { return calls_.empty(); }
  // Where a launch of several layers stood when the GPU failed: the call before the one that its first block had begun,
  // that one, and those whose data it was fetching, each of which may have failed. Empty: nowhere.
  std::vector<std::span<const OperationPart>> reached() const;
  // What one launch of a step's body may carry out.
  std::vector<std::span<const OperationPart>> launches() const;

  // Whether a step of more than kDecodeTokens rows can be run: one token of each sequence, and contexts for which there
  // is workspace (8 times shorter ones with 64 sequences than with 8, but never below 32,768).
  bool takes_batch(int32_t sequences, int32_t tokens, int64_t max_context) const;

  // No sequence reaches beyond max_context positions. At most kDecodeTokens rows, or a step that takes_batch() allows.
  // apart: every operation of few tokens as a launch of its own, so that it can be timed; a step runs those of several
  // layers in one where decode_layers takes them, with other bits (both within the tolerance of bfloat16), the head
  // behind the last layer (head_along()).
  Status run_body(const CudaRank& rank, const CudaStep& step, int64_t max_context, const LaunchObserver& observe = {},
                  bool apart = false) const;
  // What run_body() has left of the head. At most kDecodeTokens wanted rows; apart: as for run_body().
  Status run_head(const CudaRank& rank, const CudaStep& step, const LaunchObserver& observe = {},
                  bool apart = false) const;

 private:
  friend class DecodePlanBuilder;
  struct Context {
    const CudaRank& rank;
    const CudaStep& step;
    int64_t max_context;
  };
  using Phase = kernels::cuda::DecodePhase;
  struct Call {
    std::vector<OperationPart> parts;
    std::function<Phase(const Context&)> phase;  // or, where there is no fused kernel,
    std::function<Status(const Context&)> run;
    bool alone = false;  // decode_layers does not take it
  };
  // Calls that run_layers() makes together.
  struct LayerRun {
    size_t begin = 0;
    size_t end = 0;
    std::vector<OperationPart> parts;
  };
  // The last norm, the choice of rows and the head behind the last layers, instead of the last two layer_runs_.
  struct HeadRun {
    LayerRun layers;  // its parts are the head's as well
    std::vector<OperationPart> parts;
    std::function<Phase(const Context&)> phase;
  };
  void group_calls();
  void add_head(std::vector<OperationPart> parts, std::function<Phase(const Context&)> phase);
  bool runs_layers(const CudaStep& step, bool apart) const;
  bool head_along(const CudaStep& step, bool apart) const;
  Status run_layers(const Context& context, const LaunchObserver& observe) const;
  Status run_layer_run(const LayerRun& run, const std::function<Phase(const Context&)>& head, const Context& context,
                       const LaunchObserver& observe) const;
  Status run_apart(const Context& context, const LaunchObserver& observe) const;

  const CudaProgram* program_ = nullptr;
  std::vector<Call> calls_;
  std::vector<LayerRun> layer_runs_;
  std::optional<HeadRun> head_run_;
  DeviceMemory layers_;    // workspace of decode_layers; empty: models without experts, which it would not make faster
  DeviceMemory scratch_;   // router and gate logits, expert activations, attention partial results, shared gates
  BatchScratch batch_;     // in scratch_
  PinnedMemory progress_;  // of decode_layers: numbers of calls
  bool batches_ = false;
  std::optional<kernels::AttentionShape> attention_shape_;
  int64_t attention_bytes_ = 0;
};

}  // namespace tokenspeed::runtime
