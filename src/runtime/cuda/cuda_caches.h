// What a GPU remembers of its sequences: the pages of keys and values and the recurrent-state slots. Zero at first.
#pragma once

#include <cstdint>
#include <vector>

#include "compile/program.h"
#include "kernels/gated_delta_net.h"
#include "kernels/types.h"
#include "runtime/cuda/device.h"

namespace tokenspeed::runtime {

class CudaCaches {
 public:
  CudaCaches() = default;
  static Result<CudaCaches> allocate(const compile::KvLayout& kv, const compile::StateLayout& state, int64_t pages,
                                     int32_t page_size, int64_t slots);

  const kernels::KvPages& kv(int32_t kv_layer) const { return kv_layers_[kv_layer]; }
  const kernels::GdnState& state(int32_t state_layer) const { return state_layers_[state_layer]; }

 private:
  DeviceMemory kv_memory_;
  DeviceMemory state_memory_;
  std::vector<kernels::KvPages> kv_layers_;
  std::vector<kernels::GdnState> state_layers_;
};

}  // namespace tokenspeed::runtime
