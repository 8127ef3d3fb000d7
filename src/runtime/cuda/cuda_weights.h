// The weights of one GPU: bfloat16 matrices and FP8 blocks with float32 scales row-major, small vectors as float32,
// each once however many Programs name it. Streamed from the source through page-locked staging by several threads.
#pragma once

#include <map>
#include <span>
#include <string>

#include "compile/program.h"
#include "compile/weight_source.h"
#include "kernels/types.h"
#include "runtime/cuda/device.h"
#include "runtime/loaded_weight.h"

namespace tokenspeed::runtime {

class CudaWeights {
 public:
  // FP8 is kept where the Program wants it, the source has it and blocks are not cut; everything else that is no vector
  // becomes bfloat16. resource_exhausted says how much is wanted and free. Shows progress; the source may be closed
  // afterwards. threads 0: as many as help.
  static Result<CudaWeights> load(std::span<const compile::Program* const> programs,
                                  const compile::WeightSource& source, int32_t threads);
  const LoadedWeight& at(const std::string& name) const { return weights_.at(name); }
  int64_t bytes() const { return memory_.size(); }

 private:
  DeviceMemory memory_;
  std::map<std::string, LoadedWeight> weights_;
};

}  // namespace tokenspeed::runtime
