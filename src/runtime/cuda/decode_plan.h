// A Program of the family as fused calls for steps of at most kDecodeTokens rows (kernels/cuda/decode.h): five or six
// launches per layer. The residual stream stays in its place in the arena and every branch is added to it there.
#pragma once

#include <functional>
#include <variant>
#include <vector>

#include "compile/program.h"
#include "kernels/cuda/decode.h"
#include "runtime/cuda/cuda_program.h"

namespace tokenspeed::runtime {

class DecodePlan {
 public:
  DecodePlan() = default;
  // Empty when the Program has operations or sizes that the fused kernels do not take. `program` must outlive the plan.
  static Result<DecodePlan> build(const CudaProgram& program, int64_t max_context);
  bool empty() const { return calls_.empty(); }

  // No sequence reaches beyond max_context positions. At most kDecodeTokens rows, and as many wanted ones.
  Status run_body(const CudaRank& rank, const CudaStep& step, int64_t max_context,
                  const LaunchObserver& observe = {}) const;
  Status run_head(const CudaRank& rank, const CudaStep& step, const LaunchObserver& observe = {}) const;

 private:
  friend class DecodePlanBuilder;
  struct Context {
    const CudaRank& rank;
    const CudaStep& step;
    int64_t max_context;
  };
  // What one fused kernel takes.
  using Phase = std::variant<kernels::cuda::DecodeLinear, kernels::GdnMixer, kernels::cuda::DecodeAttention,
                             kernels::cuda::DecodeGateUp, kernels::cuda::DecodeDown>;
  struct Call {
    std::vector<OperationPart> parts;            // the first names the call
    std::function<Phase(const Context&)> phase;  // or, where there is no fused kernel,
    std::function<Status(const Context&)> run;
  };
  const CudaProgram* program_ = nullptr;
  std::vector<Call> calls_;
  DeviceMemory scratch_;  // router and gate logits, expert activations, attention partial results, shared gates
};

}  // namespace tokenspeed::runtime
