// A Program bound to a GPU rank's weights, and its execution with the kernels for any number of tokens: one call per
// operation, on the operation's stream. Streams meet through events where a value made on one is read on the other.
//
// Collectives are done only when the caller asks for a stand-in: a rank measured alone then skips what others would
// add.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/status.h"
#include "compile/program.h"
#include "kernels/types.h"
#include "runtime/caches.h"
#include "runtime/cuda/cuda_weights.h"
#include "runtime/cuda/device.h"
#include "runtime/launch_time.h"

namespace tokenspeed::runtime {

inline constexpr int kStreams = 2;
using CudaCaches = Caches<DeviceMemory>;

// What a step gives the operations besides the arena. All pointers are device memory.
struct CudaStep {
  kernels::SequenceBatch batch;
  const int32_t* token_ids = nullptr;  // [T]
  const int32_t* wanted = nullptr;     // rows whose logits the head computes
  int32_t wanted_count = 0;
};

// Where a Program runs; shared by the Programs of a rank, which run one at a time.
struct CudaRank {
  std::byte* arena = nullptr;
  std::byte* workspace[kStreams] = {};
  const CudaCaches* caches = nullptr;
  cudaStream_t streams[kStreams] = {};
  cudaEvent_t forked = nullptr;
  cudaEvent_t joined = nullptr;
};

// Called before a launch (or the launches of one operation) with what it carries out: false leaves it out (for
// measurements: what follows then reads stale values), an error ends the step. Without an observer all is launched.
using LaunchObserver = std::function<Result<bool>(std::span<const OperationPart> parts)>;
inline Result<bool> shall_launch(const LaunchObserver& observe, std::span<const OperationPart> parts) {
  if (!observe) return true;
  return observe(parts);
}

class CudaProgram {
 public:
  CudaProgram() = default;
  // unimplemented: float32 activations, sizes the kernels do not take, collectives without stand_in.
  static Status check(const compile::Program& program, bool stand_in);
  // The program must have passed check(), the weights must hold all that it names.
  CudaProgram(compile::Program program, const CudaWeights& weights);

  const compile::Program& program() const { return program_; }
  // Of the greatest operation on either stream at the Program's greatest number of rows.
  int64_t workspace_bytes() const;

  // Everything is enqueued, nothing waited for. Errors name the operation.
  Status run_body(const CudaRank& rank, const CudaStep& step, const LaunchObserver& observe = {}) const;
  Status run_head(const CudaRank& rank, const CudaStep& step, const LaunchObserver& observe = {}) const;

  std::span<const LoadedWeight> weights() const { return weights_; }
  kernels::Rows rows(const CudaRank& rank, int32_t value, int64_t row = 0) const;
  const LoadedWeight& weight(const compile::Operation& op, size_t i) const { return weights_[op.weights[i]]; }

 private:
  Status run(const CudaRank& rank, const CudaStep& step, int32_t begin, int32_t end,
             const LaunchObserver& observe) const;
  void plan_streams();

  compile::Program program_;
  std::vector<LoadedWeight> weights_;  // by the Program's index
  std::vector<bool> waits_;            // operation waits for the other stream
};

}  // namespace tokenspeed::runtime
