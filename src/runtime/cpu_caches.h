// What a CPU rank remembers of its sequences: the pages of keys and values and the recurrent-state slots.
// Contents are undefined until written; a step only reads positions and slots that it or an earlier step wrote.
#pragma once

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "compile/program.h"
#include "kernels/gated_delta_net.h"
#include "kernels/types.h"
#include "runtime/host_memory.h"

namespace tokenspeed::runtime {

class CpuCaches {
 public:
  CpuCaches() = default;
  // resource_exhausted when the system refuses the memory.
  static Result<CpuCaches> allocate(const compile::KvLayout& kv, const compile::StateLayout& state, int64_t pages,
                                    int32_t page_size, int64_t slots);

  const kernels::KvPages& kv(int32_t kv_layer) const { return kv_layers_[kv_layer]; }
  const kernels::GdnState& state(int32_t state_layer) const { return state_layers_[state_layer]; }

 private:
  HostMemory kv_memory_;
  HostMemory state_memory_;
  std::vector<kernels::KvPages> kv_layers_;
  std::vector<kernels::GdnState> state_layers_;
};

}  // namespace tokenspeed::runtime
