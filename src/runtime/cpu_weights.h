// The weights of a CPU rank, packed for its kernels: matrices as 16-row panels (row-major for the reference kernels and
// for lookup tables), small vectors as float32. One buffer holds all; a weight named by several Programs, or a tied
// embedding, is there once.
#pragma once

#include <map>
#include <span>
#include <string>

#include "base/status.h"
#include "base/thread_pool.h"
#include "compile/program.h"
#include "compile/weight_source.h"
#include "kernels/types.h"
#include "runtime/host_memory.h"
#include "runtime/loaded_weight.h"

namespace tokenspeed::runtime {

class CpuWeights {
 public:
  // Packs in parallel and shows its progress. Weights wanted as float32 whose tensors are all bfloat16 are held as
  // bfloat16 (exact); FP8 blocks are dequantised. The source may be closed afterwards.
  static Result<CpuWeights> load(std::span<const compile::Program* const> programs, const compile::WeightSource& source,
                                 kernels::MatrixLayout layout, ThreadPool* pool);
  const LoadedWeight& at(const std::string& name) const { return weights_.at(name); }
  int64_t bytes() const { return memory_.size(); }

 private:
  HostMemory memory_;
  std::map<std::string, LoadedWeight> weights_;
};

}  // namespace tokenspeed::runtime
