// The phases of a DecodePlan for steps of 9 to 64 sequences of one token each, on the kernels of kernels/cuda/batch.h
// (and, for sizes those do not take, the ones for any number of tokens).
//
// A norm is a launch of its own here; the sum over the experts waits for the norm that follows and goes with it.
#pragma once

#include <optional>

#include "kernels/cuda/batch.h"
#include "kernels/cuda/decode.h"
#include "runtime/cuda/cuda_program.h"

namespace tokenspeed::runtime {

// Device memory of the phases for kBatchTokens rows.
struct BatchScratch {
  std::byte* normed = nullptr;   // [kBatchTokens, hidden] bfloat16
  std::byte* split = nullptr;    // batch_split_bytes() of the widest input of a projection
  std::byte* experts = nullptr;  // batch_experts_workspace_bytes()
};

class BatchPhases {
 public:
  BatchPhases(const CudaRank& rank, const BatchScratch& scratch)
      : rank_(rank), scratch_(scratch), launch_{.stream = rank.streams[0]} {}

  // Whether the batch kernels take the experts; the other phases always can be run.
  static bool takes(const kernels::cuda::DecodeGateUp& up);

  Status operator()(const kernels::cuda::DecodeLinear& args);
  Status operator()(const kernels::GdnMixer& args);
  Status operator()(const kernels::cuda::DecodeAttention& args);
  Status operator()(const kernels::cuda::DecodeGateUp& args);
  Status operator()(const kernels::cuda::DecodeDown& args);
  // To be called before anything else reads the residual stream.
  Status finish();

 private:
  const CudaRank& rank_;
  const BatchScratch& scratch_;
  kernels::cuda::Launch launch_;
  const void* split_rows_ = nullptr;                 // whose split form the scratch holds
  kernels::cuda::DecodeGateUp up_;                   // whose down has not come yet
  std::optional<kernels::cuda::BatchNorm> unadded_;  // experts' results that are not in the residual stream yet
};

}  // namespace tokenspeed::runtime
